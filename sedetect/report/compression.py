"""What the page says of compression: the budget, and a quantized checkpoint beside its base."""

from typing import Any

from sedetect.experiments.study import badness
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
    head = "experts,#size,#nothing kept,#size with them,#they are kept,#random kept: best,#worst"
    base = ", ".join(f"{domain} {value:.2f}" for domain, value in budget.baseline.perplexity.items())
    text = (
        f"Kept: {', '.join(budget.kept) or 'none'}. Size: of the routed experts' weights. Change of perplexity, mean "
        f"of the domains, on {whole(sum(budget.tokens.values()))} tokens; unchanged ({budget.dtype}): {base}. Formats "
        f"are simulated: round to nearest, one scale per output channel and {budget.group} inputs. Pruning is by "
        f"{budget.by}."
    )
    said = [f"{line[0].upper()}{line[1:]}." for line in conclusion(budget)]
    return {"budget": make_table(head, rows), "budget_lines": said, "budget_text": text, "budget_notes": budget.notes}


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
    head = "text,#perplexity: base,#quantized,#change,#interval,#KL (nats per token),#same most likely token"
    return {
        "verification": found,
        "verified_text": make_table(head, rows),
        "verified_experts": make_table("expert,stored,to be protected,#max|y|: base,#quantized", experts),
    }
