"""Plans of a frontier in the mixed-precision formats of tools whose checkpoints were tested to load."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from sedetect.compression.allocations import KEPT
from sedetect.compression.frontier import Frontier, Point
from sedetect.compression.protect import as_protected, export
from sedetect.compression.runtimes import MIXED
from sedetect.compression.simulated import bits_of
from sedetect.errors import Argument, SedetectError
from sedetect.stats.model import ModelStats, same_model
from sedetect.stats.place import BankId, Place


def export_plan(
    frontier: Frontier,
    stats: ModelStats,
    tool: str,
    runtime: str,
    granularity: str = "layer",
    model: nn.Module | str | Path | None = None,
    increase: float = 0.05,
) -> tuple[dict[str, Any] | str, list[str]]:
    """The smallest plan whose perplexity rose by at most increase, in a tool's form, and what the reader must know.

    Plans with protection, where the frontier has them; only those whose formats were seen to load in the runtime.
    stats, model: as export takes them. Raises SedetectError for a frontier of another model, where no plan is left, and
    for what export refuses.
    """
    if not same_model(stats.header.digest, frontier.digest):
        raise SedetectError(
            Argument("frontier"), f" of {frontier.model}: the statistics are of another model ({stats.header.model})",
            "; give those of that one",
        )  # fmt: skip
    formats = MIXED.get((tool, runtime, granularity), ())
    curve = frontier.curve(granularity, True) or frontier.curve(granularity)
    loads = [
        point
        for point in (curve.points if curve else [])
        if point.change.rise <= increase and _formats(point) <= {KEPT, *formats}
    ]
    if formats and not loads:
        raise SedetectError(
            Argument("increase"),
            f" {increase:g}: no plan by {granularity} is of {', '.join(formats)} alone, with which {tool}'s "
            f"checkpoints were seen to load in {runtime}; allow more, or run `sedetect budget MODEL --frontier "
            f"{' '.join(f'--format {name}' for name in formats)}`",
        )
    point = min(loads, key=lambda one: one.size, default=None)
    plan = {} if point is None else {BankId.parse(bank): levels for bank, levels in point.plan.items()}
    whole = granularity == "layer"
    kept = [
        as_protected(stats, Place(*bank, e), "plan")
        for bank, levels in plan.items()
        for e, level in enumerate(levels[:1] if whole else levels)
        if level == KEPT
    ]
    document, _ = export(stats, kept, tool, granularity, runtime, model)  # refuses what does not load
    assert point is not None  # what loads has formats
    if isinstance(document, dict):
        document["layer_config"] = {
            name: {"bits": bits_of(level)}
            for bank, levels in plan.items()
            for level, name in _names(stats.header.banks[str(bank)].module, levels, whole).items()
            if level not in (KEPT, "int4")
        }
    return document, [
        f"{point.size:,.0f} bytes of experts, of {frontier.whole:,.0f} at 16 bits; perplexity {point.change} in "
        f"simulated formats with groups of {frontier.group}"
    ]


def _formats(point: Point) -> set[str]:
    return {level for levels in point.plan.values() for level in levels}


def _names(module: str, levels: list[str], whole: bool) -> dict[str, str]:
    """Per level, its experts as auto-round finds them: a part of their names, or a regular expression.

    Its quantizer reads a bare dot as a dot, its loader as any character; [.] is a dot to both.
    """
    if whole:
        return {levels[0]: f"{module}."}
    numbers: dict[str, list[str]] = defaultdict(list)
    for e, level in enumerate(levels):
        numbers[level].append(str(e))
    return {level: f"{module}.({'|'.join(mine)})[.]" for level, mine in numbers.items()}
