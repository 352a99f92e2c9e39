"""sedetect ablate: measure the model without chosen experts."""

from __future__ import annotations

import importlib.resources
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from sedetect.cli.choices import How
from sedetect.cli.shared import (
    PROVE,
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
    print_whole,
    progress_bar,
    saved_after,
)
from sedetect.cli.targets import check_choices, choose
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.experiments.study import Experiment, Outcome


@app.command("ablate", rich_help_panel=PROVE)
def ablate_command(
    model: Model,
    experts: Annotated[
        str, typer.Option(help="candidates, names (L1E28,L8shared,L1E28[101,14]), random:N, top-frequency:N")
    ] = "candidates",
    how: Annotated[list[How] | None, typer.Option(help="how experts are switched off (default: all three)")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder for ablation.json")] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="a .jsonl of prompts with answers, or 'arithmetic'")
    ] = None,
    controls: Annotated[int, typer.Option(min=0, help="random sets of the same size, drawn in two ways each")] = 5,
    seed: Annotated[int, typer.Option(help="of random:N")] = 0,
    sequences: Annotated[
        int, typer.Option(min=1, help="sequences in which the residual stream and attention are observed")
    ] = 8,
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
    """Switch experts of MODEL off and measure the cost, beside random controls."""
    from sedetect.calibration.windows import Text, calibration_windows, check_text, prefix_ids
    from sedetect.checkpoints.options import Loading
    from sedetect.experiments.ablation import HOW
    from sedetect.experiments.study import Trials, run_experiment
    from sedetect.models.layers import refuse_without_logits
    from sedetect.models.loading import prepare_model

    if output is not None:
        check_writable(output)
    questions = _questions(evaluate)
    text = Text(tokens, seq_len, batch_size)
    check_text(data, text)
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    refuse_without_logits(prepared.empty, "perplexity")
    domains = calibration_windows(prepared.empty, prepared.tokenizer, data, text).domains
    check_choices("--experts", experts, prepared.empty, stats)
    loaded, tokenizer, _, _ = prepared.load()
    chosen = choose("--experts", experts, loaded, tokenizer, data, text, stats=stats, draw=seed)
    if not chosen:
        console.print("nothing to switch off; name experts (L1E28) to try them", markup=False, highlight=False)
        return
    with progress_bar("runs") as bar:
        task = bar.add_task("none", total=None)
        experiment = run_experiment(
            loaded,
            tokenizer,
            domains,
            chosen,
            Trials(tuple(how or HOW), controls=controls, sequences=sequences, questions=questions),
            prefix=len(prefix_ids(tokenizer)),
            batch_size=batch_size,
            progress=lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
        )
    with saved_after(None if output is None else Results(output).ablation_path, experiment.save):
        _print(experiment)


def _questions(evaluate: str | None) -> list:
    from sedetect.experiments.evaluation import load_questions

    if evaluate is None:
        return []
    if evaluate == "arithmetic":
        with importlib.resources.as_file(
            importlib.resources.files("sedetect.calibration") / "corpus/arithmetic.jsonl"
        ) as path:
            return load_questions(path)
    return load_questions(evaluate)


def _print(experiment: Experiment) -> None:
    from sedetect.experiments.study import badness, conclusion

    console.print(conclusion(experiment), style="bold", markup=False, highlight=False, soft_wrap=True)
    domains = list(experiment.baseline.perplexity)
    asked, layer = experiment.baseline.accuracy is not None, experiment.sink_layer
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("switched off", no_wrap=True)
    decay = [] if layer is None else ["D_sink"]
    for name in [*domains, "mean", "sink", *decay, "residual", *(["exact"] if asked else [])]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    base = experiment.baseline
    table.add_row("nothing", *(f"{base.perplexity[d]:.2f}" for d in domains), "", *_rest([base], layer, asked))
    for outcome in experiment.outcomes:
        table.add_row(escape(outcome.label), *_changes(outcome, domains), *_rest([outcome], layer, asked))
    for name, runs in experiment.controls.items():
        if runs:
            blank = [""] * (len(table.columns) - len(domains) - 2)
            table.add_row(f"{name}: mean", *_summary(runs, domains, statistics.fmean), *_rest(runs, layer, asked))
            for word, of in (("min", min), ("max", max)) if len(runs) > 1 else ():
                table.add_row(f"{name}: {word}", *_summary(runs, domains, partial(of, key=badness)), *blank)
    print_whole(table)
    layer_said = "" if layer is None else f", D_sink is the share of it that layer {layer} loses"
    text = (
        f"each row changes the perplexity in the first; sink is the mean attention on the first token{layer_said}, and "
        f"residual the largest value of the residual stream inside, on {experiment.sequences} sequences; in a small "
        "model judge by the controls of the same layers, the sink and the residual together"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _changes(outcome: Outcome, domains: list[str]) -> list[str]:
    return [f"{outcome.change[d]:+.1%}" for d in domains] + [f"{outcome.mean_change:+.1%}"]


def _summary(runs: list[Outcome], domains: list[str], of) -> list[str]:
    return [f"{of([r.change[d] for r in runs]):+.1%}" for d in domains] + [f"{of([r.mean_change for r in runs]):+.1%}"]


def _rest(runs: list[Outcome], layer: int | None, asked: bool) -> list[str]:
    """Means over the runs: the sinks, D_sink of one layer, the residual maximum and, where tasks were given, exact
    answers.
    """
    cells = [_number([r.sink_mean for r in runs], "{:.3f}")]
    if layer is not None:
        cells.append(_number([r.sink_decay[layer] for r in runs], "{:.2f}"))
    cells.append(_number([r.residual_max for r in runs], "{:.4g}"))
    return cells + ([_number([r.accuracy for r in runs], "{:.0%}")] if asked else [])


def _number(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else "-"
