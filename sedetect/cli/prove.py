"""sedetect prove: which candidates the model depends on, by switching them off where they fire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from sedetect.cli.shared import (
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    SeqLen,
    TrustRemoteCode,
    app,
    check_writable,
    console,
    print_line,
    progress_bar,
    saved_after,
)
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.calibration.windows import Windows
    from sedetect.stats.model import ModelStats
    from sedetect.stats.proof import Effect, Proof, Verdict


@app.command("prove")
def prove_command(
    model: Model,
    experts: Annotated[
        str | None, typer.Option(help="names (L1E28,L8shared; default: those that the statistics point to)")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    output: Output = None,
    chain: Annotated[bool, typer.Option(help="also the upstream experts without which they fall silent")] = False,
    smallest: Annotated[float, typer.Option(help="rise of perplexity that matters")] = 0.03,
    level: Annotated[float, typer.Option(help="chance that any interval misses")] = 0.05,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="tokens of text, none of which the statistics saw")] = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Switch the candidates of MODEL off where they fire, and say which of them the model depends on."""
    from sedetect.calibration.windows import Text, calibration_windows, check_text, prefix_ids
    from sedetect.checkpoints.options import Loading
    from sedetect.compression.budget import held_out
    from sedetect.experiments.proof import candidates_of, check_names, check_numbers, prove
    from sedetect.experiments.residual_stream import observe_residual
    from sedetect.models.identity import check_statistics
    from sedetect.models.layers import refuse_without_logits
    from sedetect.models.loading import prepare_model
    from sedetect.profiling.pipeline import profile_model

    check_numbers(smallest, level)
    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size)
    check_text(data, text)
    state = None if stats is None else Results(stats).stats()
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    refuse_without_logits(prepared.empty, "proof")
    check_names(prepared.empty, experts)
    domains = calibration_windows(prepared.empty, prepared.tokenizer, data, text).domains
    if state is not None:
        check_statistics(state.header, prepared.empty, str(stats))
        _refuse_other_windows(domains, state, seq_len)
    loaded, tokenizer, _, _ = prepared.load()
    if state is not None:
        check_statistics(state.header, loaded, str(stats))
    prefix = len(prefix_ids(tokenizer))
    with progress_bar("runs") as bar:
        task = bar.add_task("profile", total=None)
        if state is None:
            state = profile_model(loaded, data, text=text, tokenizer=tokenizer).stats
        more = replace(text, tokens=tokens + state.header.tokens)
        domains = calibration_windows(loaded, tokenizer, data, more).domains
        residual = observe_residual(loaded, domains, prefix=prefix)
        chosen = candidates_of(state, residual, experts)
        if not chosen:
            print_line("nothing to prove: the statistics point to no expert; name some with --experts to try them")
            return
        proof = prove(
            loaded,
            held_out(domains, state, tokens),
            chosen,
            prefix=prefix,
            smallest=smallest,
            level=level,
            chain=chain,
            batch_size=batch_size,
            progress=lambda label, done, total, seconds: bar.update(
                task, description=f"{label} (about {seconds:.0f} s in all)", completed=done, total=total
            ),
        )
    with saved_after(None if output is None else Results(output).proof_path, proof.save):
        _print(proof)


def _refuse_other_windows(domains: dict[str, Windows], state: ModelStats, seq_len: int) -> None:
    """What statistics saw is told by windows: those of another length of the same text cannot be."""
    if any(windows.source in state.header.sources for windows in domains.values()):
        return
    corpora = {windows.info["corpus"] for windows in domains.values()}
    for source in state.header.sources.values():
        if source.info.get("corpus") in corpora:
            raise SedetectError(
                f"--seq-len {seq_len}: the statistics are of the same text in windows of {source.info.get('window')}; "
                "give that length, or other --data"
            )


def _print(proof: Proof) -> None:
    for verdict in proof.verdicts:
        print_line(f"{verdict.expert}: {verdict.level}: {verdict.reason}", "bold")
        for line in _more(verdict):
            print_line(f"  {line}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("switched off", no_wrap=True)
    for name in ("perplexity", "interval", "sink", "resid"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("nothing", "", "", _number(proof.sink_mean, ".3f"), f"{proof.residual_max:.4g}")
    for run in [*proof.runs, *proof.controls]:
        seen = _number(run.sink_mean, ".3f"), _number(run.residual_max, ".4g")
        table.add_row(run.label, f"{run.effect.rise:+.2%}", _interval(run.effect), *seen)
    console.print(table)
    sinks = ""
    if proof.sink_mean is not None and proof.best_head is not None:
        times = proof.sink_mean / proof.uniform
        sinks = f"; sinks: {times:.1f} times uniform attention, {proof.best_head:.2f} in the best head"
    print_line(
        f"each at its trigger tokens alone, on {proof.tokens:,} tokens in {proof.documents} windows that the "
        f"statistics did not see; matters: {proof.smallest:.0%}; controls: other experts that the same tokens visit"
        f"{sinks}; {proof.seconds:.0f} s"
    )
    for note in proof.notes:
        print_line(f"note: {note}")


def _more(verdict: Verdict) -> list[str]:
    lines = []
    if verdict.triggers:
        begin = f", {verdict.firsts:,} of which begin a sequence" if verdict.firsts else ""
        lines.append(f"fires on {verdict.triggers:,} tokens{begin}")
    if verdict.feeders:
        fed = ", ".join(f"{one.expert} ({one.left:.0%} of |y| left without it)" for one in verdict.feeders)
        lines.append(f"fed by {fed}")
    elif verdict.feeders is not None:
        lines.append("no upstream expert without which it falls silent")
    return lines


def _interval(effect: Effect) -> str:
    return f"{effect.low:+.2%} to {effect.high:+.2%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
