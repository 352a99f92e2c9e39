"""What the page says of compression: budget and frontier, and a quantized checkpoint beside its base."""

from typing import Any

from sedetect.experiments.study import badness
from sedetect.report.data import FORMATS_OF
from sedetect.report.evidence import Evidence
from sedetect.report.table import MOST, NONE, make_table
from sedetect.report.text import interval, number, percent, share, whole


def budget_section(evidence: Evidence) -> dict[str, Any]:
    budget = evidence.budget
    if budget is None:
        return {"budget": None}
    from sedetect.compression.budget import conclusion  # which imports transformers

    rows = []
    for row in budget.rows:
        changes = sorted((cost.mean_change for cost in row.random), key=badness)
        ends = [percent(changes[0], 2), percent(changes[-1], 2)] if changes else [NONE, NONE]
        kept = [share(row.kept.size), percent(row.kept.mean_change, 2)] if row.kept else [NONE, NONE]
        rows.append([row.name, share(row.bare.size), percent(row.bare.mean_change, 2), *kept, *ends])
    head = "experts,#size,#nothing kept,#size with them,#they are kept,#random kept: best,#random kept: worst"
    base = ", ".join(f"{domain} {value:.2f}" for domain, value in budget.baseline.perplexity.items())
    text = (
        f"Kept: {', '.join(budget.kept) or 'none'}. Size: of the routed experts' weights. Change of perplexity, mean "
        f"of the domains, on {whole(sum(budget.tokens.values()))} tokens; unchanged ({budget.dtype}): {base}. Pruning "
        f"is by {budget.by}; scales are of {budget.group} inputs."
    )
    said = [f"{line[0].upper()}{line[1:]}." for line in conclusion(budget)]
    return {"budget": make_table(head, rows), "budget_lines": said, "budget_text": text, "budget_notes": budget.notes}


def frontier_section(evidence: Evidence) -> dict[str, Any]:
    found = evidence.frontier
    if found is None:
        return {"frontier": None}
    # Here, since it imports transformers.
    from sedetect.compression.frontier import INCREASES, KEPT_BITS, conclusion, is_bound, size_at

    sizes, points = [], []
    for curve in found.curves:
        dealt = "" if curve.seed is None else f", at random ({curve.seed})"
        name = FORMATS_OF[curve.by] + ", protected" * curve.protected + dealt
        cells = [name]
        for increase in INCREASES:
            size = size_at(found, curve, increase)
            cells.append(NONE if size is None else f"{'at most ' * is_bound(curve, size)}{size / 1e6:.3g}")
        sizes.append(cells)
        for point in curve.points:
            bits = f"{KEPT_BITS * point.size / found.whole:.2f}"
            change = [percent(point.change.rise, 2), interval(point.change)]
            points.append([name, f"{point.size / 1e6:.3g}", bits, *change])
    base = ", ".join(f"{domain} {value:.2f}" for domain, value in found.baseline.items())
    text = (
        f"Protected: {', '.join(found.protected) or 'none'}. The routed experts take {found.whole / 1e6:.3g} MB at "
        f"{KEPT_BITS} bits. Change of perplexity on {whole(sum(found.tokens.values()))} tokens; unchanged "
        f"({found.dtype}): {base}. Sensitivity: on {whole(found.sensitivity_tokens)} other tokens. Scales are "
        f"of {found.group} inputs."
    )
    head = ",".join(["formats", *(f"#MB at {increase:+.0%}" for increase in INCREASES)])
    return {
        "frontier": make_table(head, sizes),
        "frontier_points": make_table("formats,#MB,#bits,#change,#interval", points),
        "frontier_lines": [f"{line[0].upper()}{line[1:]}." for line in conclusion(found)[len(INCREASES) :]],
        "frontier_text": text,
        "frontier_notes": found.notes,
    }


def verification_section(evidence: Evidence) -> dict[str, Any]:
    found = evidence.verification
    if found is None:
        return {"verification": None}
    rows = [
        [domain, f"{one.perplexity:.2f}", f"{one.other:.2f}", percent(one.change.rise, 2), interval(one.change),
         number(one.kl), share(one.agreement)]
        for domain, one in [*found.domains.items(), *([("all", found.overall)] if found.overall else [])]
    ]  # fmt: skip
    experts = [
        [one.expert, one.stored or NONE, "yes" if one.protected else "no", number(one.value), number(one.other)]
        for one in found.experts[:MOST]
    ]
    head = (
        "text,#perplexity: base,#perplexity: quantized,#change,#interval,#KL (nats per token),#same most likely token"
    )
    return {
        "verification": found,
        "verified_text": make_table(head, rows),
        "verified_experts": make_table("expert,stored,to be protected,#max|y|: base,#max|y|: quantized", experts),
    }
