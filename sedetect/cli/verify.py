"""sedetect verify: check that a quantized checkpoint still behaves like its original."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from sedetect.cli.ranked import load_ranked
from sedetect.cli.shared import (
    COMPRESS,
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Output,
    SeqLen,
    TrustRemoteCode,
    app,
    check_writable,
    folder_of,
    plain_table,
    print_line,
    print_whole,
    progress_bar,
    saved_after,
)
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.compression.protect import ProtectList
    from sedetect.compression.verification import Verification

_SHOWN = 20


@app.command("verify", rich_help_panel=COMPRESS)
def verify_command(
    base: Annotated[
        str, typer.Argument(help="the original checkpoint: a folder, or a hub name in the cache", callback=folder_of)
    ],
    quantized: Annotated[str, typer.Argument(help="the checkpoint made from it", callback=folder_of)],
    output: Output = None,
    protect: Annotated[
        str | None,
        typer.Option(help="experts that must be stored as in BASE: names (L1E28,L9E7), candidates, or export's json"),
    ] = None,
    runtime: Annotated[
        Literal["vllm"] | None,
        typer.Option(
            "--for",
            help="run both in this engine (default: transformers); super experts and routing are not compared then",
        ),
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of BASE (default: profile it first)")] = None,
    max_increase: Annotated[str, typer.Option(help="largest rise of perplexity in any domain (5% or 0.05)")] = "5%",
    max_kl: Annotated[
        float | None, typer.Option(help="largest mean KL divergence of the logits, nats per token (default: any)")
    ] = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="tokens of text; with --stats, text outside the statistics")] = 16384,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check that QUANTIZED still behaves like BASE: weights, perplexity, super experts and routing.

    Exit codes: 0 where it passes, 1 where a check fails or a limit is exceeded, 2 wrong arguments or input.
    """
    from sedetect.calibration.windows import Text
    from sedetect.checkpoints.options import Loading
    from sedetect.compression.verification import Limits, check_limits, verify

    limits = Limits(_share(max_increase), max_kl)
    check_limits(limits)
    loading = Loading(device, dtype, None, attn, trust_remote_code)
    engine = None
    if runtime is not None:
        from sedetect.engines.scoring import VLLM

        engine = VLLM(loading)
    if output is not None:
        check_writable(output)
    protected = _protected(protect)
    ranking = None if stats is None else load_ranked(stats)[1]
    with progress_bar() as bar:
        task, done = bar.add_task("profile", total=None), dict.fromkeys(("base", "quantized"), 0)

        def show(run: str, count: int) -> None:
            done[run] += count
            bar.update(task, description=run, completed=done[run], total=None)

        verification = verify(
            base,
            quantized,
            data,
            text=Text(tokens, seq_len, batch_size),
            stats=stats,
            ranking=ranking,
            protected=protected,
            limits=limits,
            loading=loading,
            runtime=engine,
            progress=show,
        )
    with saved_after(None if output is None else Results(output).verification_path, verification.save):
        _print(verification)
    if not verification.passed:
        raise typer.Exit(1)


def _protected(value: str | None) -> list[str] | ProtectList | Literal["candidates"]:
    """The experts that --protect names. Raises SedetectError for a file not written by `export --to json`."""
    from sedetect.compression.protect import ProtectList

    if value is None or value.strip() == "candidates":
        return [] if value is None else "candidates"
    if Path(value).is_file() or Path(value).suffix in (".json", ".yaml", ".txt"):
        return ProtectList.load(value)
    return [name.strip() for name in value.split(",")]


def _share(value: str) -> float:
    """A number, or a percentage. Raises SedetectError for anything else."""
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        raise SedetectError(
            f"--max-increase {value}: not a share; give a number or a percentage, as 0.05 or 5%"
        ) from None
    return number / 100 if value.endswith("%") else number


def _print(verification: Verification) -> None:
    print_line(verification.headline, "bold")
    for failure in verification.failures:
        print_line(f"failed: {failure}")
    if verification.overall is not None:
        table = plain_table("text", "base", "quantized", "change", "interval", "KL", "same token")
        for domain, one in [*verification.domains.items(), ("all", verification.overall)]:
            change = one.change
            table.add_row(
                escape(domain),
                f"{one.perplexity:.2f}",
                f"{one.other:.2f}",
                f"{change.rise:+.2%}",
                f"{change.low:+.2%} to {change.high:+.2%}" if math.isfinite(change.high) else "-",
                "-" if one.kl is None else f"{one.kl:.4f}",
                f"{one.agreement:.1%}",
            )
        print_whole(table)
    if verification.experts:
        table = plain_table("expert", "stored", "|y| in base", "quantized", left="stored")
        for expert in verification.experts[:_SHOWN]:
            table.add_row(expert.expert, expert.stored or "-", *map(_number, (expert.value, expert.other)))
        print_whole(table)
        if len(verification.experts) > _SHOWN:
            print_line(f"... and {len(verification.experts) - _SHOWN} more")
    if verification.residual_max:
        largest = verification.residual_max
        print_line(f"largest value of the residual stream: {largest[0]:.4g} in the base, {largest[1]:.4g} quantized")
    sinks = [sink for sink in verification.sink_mean if sink is not None]
    if len(sinks) == 2:
        print_line(f"attention on first tokens: {sinks[0]:.1%} in the base, {sinks[1]:.1%} quantized")
    if verification.flips:
        shares = ", ".join(f"{_layer(bank)} {share:.1%}" for bank, share in verification.flips.items())
        print_line(f"routing choices that differ (differences caused by earlier layers included): {shares}")
    if verification.overall is not None:
        print_line(f"perplexity on {sum(verification.tokens.values()):,} tokens, with intervals over their windows")
        print_line("KL: mean divergence of the predictions, in nats per token")
        print_line("same token: predictions with the same most likely token")
    for note in verification.notes:
        print_line(f"note: {note}")


def _layer(bank: str) -> str:
    stack, layer, kind = bank.split(".")
    return f"{'' if stack == 'decoder' else stack + '.'}L{layer}{kind.removeprefix('routed')}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
