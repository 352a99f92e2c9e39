"""sedetect super-weights: the single weights behind the outliers of the candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from sedetect.cli.shared import (
    MEASURE,
    Attn,
    Backend,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Revision,
    Seed,
    SeqLen,
    Tokens,
    TrustRemoteCode,
    app,
    check_file,
    console,
    progress_bar,
)

if TYPE_CHECKING:
    from sedetect.experiments.super_weights import SuperWeight


@app.command("super-weights", rich_help_panel=MEASURE)
def super_weights_command(
    model: Model,
    json: Annotated[Path | None, typer.Option("--json", help="write the result to this file")] = None,
    top: Annotated[int, typer.Option(min=1, help="weights to show of each expert")] = 3,
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    seed: Seed = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="apply the tokenizer's chat template")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the weights of down_proj behind each candidate's outlier."""
    from sedetect.calibration.windows import Text, calibration_windows, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.experiments.super_weights import SuperWeights, find_super_weights
    from sedetect.models.loading import prepare_model
    from sedetect.models.measure import Measuring
    from sedetect.ops.choose import check_backend
    from sedetect.profiling.pipeline import profile_model
    from sedetect.ranking.rule import rank

    if json is not None:
        check_file("--json", json)
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def show(domain: str, done: int, total: int | None) -> None:
            bar.update(task, description=domain, completed=done, total=total)

        text = Text(tokens, seq_len, batch_size, seed, chat_template)
        check_text(data, text)
        check_backend(backend)
        prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
        calibration_windows(prepared.empty, prepared.tokenizer, data, text)
        loaded, tokenizer, _, _ = prepared.load()
        measuring = Measuring(backend)
        result = profile_model(loaded, data, text=text, measuring=measuring, tokenizer=tokenizer, progress=show)
        ranking = rank(result.stats)
        found = find_super_weights(loaded, ranking, result.windows, top=top)
    console.print(ranking.headline, style="bold", markup=False, highlight=False, soft_wrap=True)
    if found:
        _print(found)
    if json is not None:
        SuperWeights(ranking.model, ranking.headline, found).save(json)


def _print(found: list[SuperWeight]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("expert", no_wrap=True)
    for name in ("outlier", "weight at", "weight", "h", "share", "sum of shares"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        for place, part in enumerate(one.top):
            head = ("", "") if place else (str(one.expert), f"{one.value:.5g}")
            numbers = (f"{part.weight:.4g}", f"{part.hidden:.4g}", f"{part.share:.1%}", f"{part.cumulative:.1%}")
            table.add_row(*head, f"{one.channel}, {part.intermediate}", *numbers)
    console.print(table)
    text = "weight at: output and intermediate channel of down_proj; share: weight x h over the outlier"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
