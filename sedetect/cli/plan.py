"""sedetect plan: a checkpoint's size, whether it fits in memory, and how much streaming would read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from sedetect.cli.shared import (
    MEASURE,
    Anywhere,
    Device,
    Dtype,
    Revision,
    Tokens,
    TrustRemoteCode,
    app,
    print_line,
    print_whole,
)

if TYPE_CHECKING:
    import torch

    from sedetect.profiling.estimate import Plan


@app.command("plan", rich_help_panel=MEASURE)
def plan_command(
    model: Anywhere,
    tokens: Tokens = 32768,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the size, experts, memory and reading time of MODEL, from its config and headers alone."""
    from sedetect.checkpoints.memory import choose_device, size
    from sedetect.checkpoints.options import Loading
    from sedetect.profiling.estimate import layers_of_rule, make_plan, measure_read

    place = choose_device(device)
    plan = make_plan(model, Loading(dtype=dtype, revision=revision, trust_remote_code=trust_remote_code))
    stored = f"{size(plan.stored)} in {plan.files} file{'s' * (plan.files != 1)}"
    print_line(f"{plan.model}: {_count(plan.parameters)} parameters, {stored}", "bold")
    print_line(_experts(plan))
    _print_memory(plan, place)
    measured = measure_read(model) if Path(model).is_dir() else None
    print_line(_streamed(plan, tokens, measured))
    print_line(
        f"locate (one first token, {layers_of_rule(plan.layers)} layers): reads {size(plan.located)}, "
        f"{plan.located / plan.stored:.1%}"
    )
    for note in plan.notes:
        print_line(f"note: {note}")


def _experts(plan: Plan) -> str:
    each = sorted(set(plan.experts.values()))
    per_layer = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    chosen = "" if plan.top_k is None else f", top-{plan.top_k}"
    active = "" if plan.active is None else f"; {_count(plan.active)} active per token"
    return (
        f"{sum(plan.experts.values()):,} routed experts in {len(plan.experts)} of {plan.layers} layers "
        f"({per_layer} each{chosen}): {_count(plan.routed)} parameters; shared experts {_count(plan.shared)}, "
        f"the rest {_count(plan.rest)}{active}"
    )


def _print_memory(plan: Plan, device: torch.device) -> None:
    import torch

    from sedetect.checkpoints.memory import WEIGHTS_SHARE, dequantized_here, free_memory, size

    free = free_memory(device)
    way = "mxfp4" if plan.held == torch.uint8 else "fp8"
    default = plan.dtype if plan.held != plan.dtype and way in dequantized_here() else plan.held
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("precision", no_wrap=True)
    for column in ("weights", "streamed", f"on {device}, {size(free)} free"):
        table.add_column(column, justify="right", no_wrap=True)
    for dtype in dict.fromkeys((plan.held, default, torch.bfloat16, torch.float32)):
        weights, streamed = plan.weights(dtype), plan.streamed(dtype)
        fits = "fits" if weights <= WEIGHTS_SHARE * free else "streamed" if streamed <= WEIGHTS_SHARE * free else "no"
        if dtype == plan.held != default:
            fits = "-"  # transformers dequantizes it here
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"{name} (default)" if dtype == default else name, size(weights), size(streamed), fits)
    print_whole(table)


def _streamed(plan: Plan, tokens: int, measured: tuple[float, int] | None) -> str:
    """measured: bytes per second, and the bytes measured; None for a checkpoint that is not on a local disk."""
    from sedetect.checkpoints.memory import size

    total, largest = sum(plan.layer_bytes), max(plan.layer_bytes)
    hidden = tokens * plan.width * plan.dtype.itemsize
    took = ""
    if measured is not None:
        speed, sample = measured
        took = (
            f"at {size(speed)}/s, measured on {size(sample)} of it, {_seconds(largest / speed)} a layer and "
            f"{_seconds(total / speed)} in all, unless computing takes longer; "
        )
    return (
        f"streamed (embeddings and three layers in memory): reads {size(total)}, at most {size(largest)} a layer; "
        f"{took}hidden states of {tokens:,} tokens take {size(hidden)}"
    )


def _count(parameters: int) -> str:
    for unit, power in (("T", 12), ("B", 9), ("M", 6), ("k", 3)):
        if parameters >= 10**power:
            return f"{parameters / 10**power:.3g}{unit}"
    return str(parameters)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"
