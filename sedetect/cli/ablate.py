"""sedetect ablate: what the model is without chosen experts."""

import importlib.resources
import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from sedetect.ablation import HOW
from sedetect.calibration import prefix_ids
from sedetect.cli.shared import (
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Revision,
    SeqLen,
    TrustRemoteCode,
    app,
    check_writable,
    console,
    progress_bar,
)
from sedetect.errors import SedetectError
from sedetect.evaluation import load_questions
from sedetect.experiment import Experiment, Outcome, choose_experts, conclusion, run_experiment
from sedetect.files import write_json
from sedetect.pipeline import calibration_windows, open_model, profile_model
from sedetect.stats import ModelStats


@app.command("ablate")
def ablate_command(
    model: Model,
    experts: Annotated[str, typer.Option(help="super, names (L1E28,L8shared), random:N or top-frequency:N")] = "super",
    how: Annotated[list[str] | None, typer.Option(help="skip, renormalize, remove (default: all three)")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder for ablation.json")] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="a .jsonl of prompts with answers, or 'arithmetic'")
    ] = None,
    controls: Annotated[int, typer.Option(help="random sets of the same size, each in two places")] = 5,
    seed: Annotated[int, typer.Option(help="of random:N")] = 0,
    sequences: Annotated[int, typer.Option(help="sequences on which residual and attention are observed")] = 8,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="tokens of evaluation text")] = 16384,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Switch experts of MODEL off at dispatch and measure what it costs, beside random controls."""
    for name in how or ():
        if name not in HOW:
            raise SedetectError(f"--how {name}: is not known; use {', '.join(HOW)}")
    if controls < 0:
        raise SedetectError(f"--controls {controls}: must be at least 0")
    if output is not None:
        check_writable(output)
    questions = _questions(evaluate)
    options = {"device": device, "dtype": dtype, "revision": revision, "attn": attn}
    loaded, tokenizer, _ = open_model(model, **options, trust_remote_code=trust_remote_code)
    cut = {"tokens": tokens, "seq_len": seq_len, "seed": None, "chat_template": False}
    domains = calibration_windows(loaded, tokenizer, data, **cut).domains
    with progress_bar("runs") as bar:
        task = bar.add_task("profile", total=None)
        if stats is None:
            state = profile_model(
                loaded, data, tokens=tokens, seq_len=seq_len, batch_size=batch_size, tokenizer=tokenizer
            ).stats
        else:
            state = ModelStats.load(stats)
        experiment = run_experiment(
            loaded,
            tokenizer,
            domains,
            choose_experts(experts, state, seed),
            state,
            prefix=len(prefix_ids(tokenizer)),
            hows=tuple(how or HOW),
            controls=controls,
            sequences=sequences,
            batch_size=batch_size,
            questions=questions,
            progress=lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
        )
    if output is not None:
        write_json(output / "ablation.json", experiment.to_dict())
    _print(experiment)
    if output is not None:
        console.print(f"written to {output / 'ablation.json'}", markup=False, soft_wrap=True)


def _questions(evaluate: str | None) -> list:
    if evaluate is None:
        return []
    if evaluate == "arithmetic":
        with importlib.resources.as_file(importlib.resources.files("sedetect") / "corpus/arithmetic.jsonl") as path:
            return load_questions(path)
    return load_questions(evaluate)


def _print(experiment: Experiment) -> None:
    console.print(conclusion(experiment), style="bold", markup=False, highlight=False, soft_wrap=True)
    domains = list(experiment.baseline.perplexity)
    asked = experiment.baseline.accuracy is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("switched off", no_wrap=True)
    for name in [*(d[:7] for d in domains), "mean", "sink", "residual", *(["exact"] if asked else [])]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    base = experiment.baseline
    table.add_row("nothing", *(f"{base.perplexity[d]:.2f}" for d in domains), "", *_rest(base, asked))
    for outcome in experiment.outcomes:
        table.add_row(escape(outcome.label), *_changes(outcome, domains), *_rest(outcome, asked))
    for name, runs in experiment.controls.items():
        if runs:
            table.add_row(f"{name}: mean", *_summary(runs, domains, statistics.fmean), *_mean(runs, asked))
            table.add_row(f"{name}: worst", *_summary(runs, domains, max), "", "", *([""] if asked else []))
    console.print(table)
    text = (
        "perplexity, then its change, also without random experts of the same layers and anywhere "
        f"({len(experiment.controls['anywhere'])} draws each); sink: mean attention on the first token; residual: its "
        f"largest value; both on {experiment.sequences} sequences. In a small model perplexity alone proves little: judge by the controls of "
        "the same layers, the sinks and the residual together."
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _changes(outcome: Outcome, domains: list[str]) -> list[str]:
    return [f"{outcome.change[d]:+.1%}" for d in domains] + [f"{outcome.mean_change:+.1%}"]


def _summary(runs: list[Outcome], domains: list[str], of) -> list[str]:
    return [f"{of([r.change[d] for r in runs]):+.1%}" for d in domains] + [f"{of([r.mean_change for r in runs]):+.1%}"]


def _rest(outcome: Outcome, asked: bool) -> list[str]:
    sink = "-" if outcome.sink_mean is None else f"{outcome.sink_mean:.3f}"
    return [sink, f"{outcome.residual_max:.4g}", *([f"{outcome.accuracy:.0%}"] if asked else [])]


def _mean(runs: list[Outcome], asked: bool) -> list[str]:
    sinks = [r.sink_mean for r in runs if r.sink_mean is not None]
    cells = [
        f"{statistics.fmean(sinks):.3f}" if sinks else "-",
        f"{statistics.fmean(r.residual_max for r in runs):.4g}",
    ]
    return cells + ([f"{statistics.fmean(r.accuracy for r in runs):.0%}"] if asked else [])
