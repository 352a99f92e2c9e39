"""How the page opens: the answer in plain words, and what to do: the next command, module names, sizes and costs."""

import shlex
from typing import Any

from sedetect.calibration.windows import Text
from sedetect.compression.protect import GRANULARITIES, TOOLS, Protected, extra_sizes, protect_list, protected_names
from sedetect.compression.runtimes import LOADS
from sedetect.errors import SedetectError
from sedetect.experiments.study import badness
from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.result import SuperExpert
from sedetect.report.evidence import Evidence
from sedetect.report.numbers import thin_experts
from sedetect.report.table import MOST, NONE, make_table
from sedetect.report.text import percent, whole

FOUR_BITS = "int4"
_EXPERTS = "experts (the small networks of a layer, of which each token takes a few)"
_LISTED = 10


def answer_section(evidence: Evidence) -> dict[str, Any]:
    """The variables answer (three sentences by their question), reasons and todo (None where nothing is to be done)."""
    ranking = evidence.ranking
    reasons = [f"{e}: {e.verdict}: {e.reason}" for e in ranking.judged if e.reason is not None][:MOST]
    found, sure, advice, command = _answer(evidence)
    answer = {"What was found": found, "How sure": sure, "What to do now": advice}
    return {"answer": answer, "reasons": reasons, "todo": None if command is None else _todo(evidence, command)}


def _answer(evidence: Evidence) -> tuple[str, str, str, str | None]:
    """What was found, how sure that is, what to do now, and the command for it."""
    ranking, tokens = evidence.ranking, whole(evidence.stats.header.tokens)
    total = sum(state.num_experts for bank, state in evidence.stats.banks.items() if bank.base != "dense")
    by = {word: [e for e in ranking.judged if e.verdict == word] for word in ("proved", "undecided", "refuted")}
    several = len(ranking.found) > 1
    them, prove = "them" if several else "it", _command("prove", evidence)
    tested = "Tested by switching each of them off at the tokens where it fires"
    tested += "." if evidence.proof is None else f", on {whole(evidence.proof.tokens)} tokens of other text."
    shown = f"This is what {tokens} tokens of text show; nothing was switched off to see what the model does without "
    if by["proved"]:
        return (
            f"The model depends on {_listed(by['proved'])}, of {whole(total)} {_EXPERTS}: without "
            f"{'them' if len(by['proved']) > 1 else 'it'} its predictions get worse.",
            f"{tested}{_open(ranking.found)}",
            f"Keep {them} when you prune, and in 16 bits when you quantize the others: export the names for your tool.",
            f"sedetect export {shlex.quote(evidence.folder)} --to TOOL --model MODEL -o FILE",
        )
    if ranking.found and len(by["undecided"]) == len(ranking.found):
        more = "" if evidence.proof is None else f" --tokens {4 * evidence.proof.tokens}"
        return (
            f"The model may depend on {_listed(ranking.found)}, of {whole(total)} {_EXPERTS}.",
            f"{tested} The answer is not clear.",
            f"Prove it on more text, and protect {them} until then.",
            prove + more,
        )
    if ranking.found:
        return (
            f"The model may depend on {_listed(ranking.found)}: among its {whole(total)} {_EXPERTS}, "
            f"{'these write' if several else 'this one writes'} values that stand out.",
            f"Not proved. {shown}{them}.{_unjudged(evidence)}",
            f"Prove it: find out whether the model gets worse without {them}, and protect {them} until then.",
            prove,
        )
    if by["refuted"]:
        verb = "were" if len(by["refuted"]) > 1 else "was"
        looked = f"The model does not depend on {_listed(by['refuted'])}, which {verb} suspected."
        return looked, tested, "Nothing: no expert needs protection when you prune or quantize.", None
    return (
        f"None of the {whole(total)} experts stands out as one that the model depends on.",
        f"{shown}any.{_unjudged(evidence)}",
        "Nothing: no expert needs protection when you prune or quantize.",
        None,
    )


def _open(found: list[SuperExpert]) -> str:
    others = [expert for expert in found if expert.verdict != "proved"]
    verb = "are" if len(others) > 1 else "is"
    return f" {_listed(others)} {verb} neither proved nor refuted, and protected too." if others else ""


def _unjudged(evidence: Evidence) -> str:
    thin = len(thin_experts(evidence.stats))
    return f" {whole(thin)} routed experts saw fewer than {FEW_ROWS} tokens, too few to judge them." if thin else ""


def _listed(experts: list[SuperExpert]) -> str:
    names = [str(expert) for expert in experts]
    *first, last = names if len(names) <= _LISTED else [*names[:_LISTED], f"{len(names) - _LISTED} more"]
    return f"{', '.join(first)} and {last}" if first else last


def _command(name: str, evidence: Evidence) -> str:
    """A command that takes the statistics and writes beside them, on windows of their length."""
    folder, window = shlex.quote(evidence.folder), evidence.stats.header.window
    length = "" if window in (None, Text.seq_len) else f" --seq-len {window}"
    return f"sedetect {name} MODEL --stats {folder} -o {folder}{length}"


def _todo(evidence: Evidence, command: str) -> dict[str, Any]:
    """The box: command; modules, sizes and the table by tool where a list can name the experts, else why not."""
    todo: dict[str, Any] = {"command": command, "cost": _cost(evidence)}
    try:
        experts = protect_list(evidence.stats, ranking=evidence.ranking)
    except SedetectError as error:
        return todo | {"unnamed": str(error)}
    sizes = [
        f"by {one.granularity}, {whole(one.kept)} of {whole(one.experts)} routed experts: "
        + (f"{percent(one.share, 2)}" if one.nbytes is None else f"{one.nbytes:,.0f} bytes, {percent(one.share, 2)}")
        for one in extra_sizes(evidence.stats, experts, evidence.model)
    ]
    rows = []
    for tool in TOOLS:
        loads = [f"{runtime}, by {' or '.join(by)}" for (other, runtime), by in LOADS.items() if other == tool]
        rows.append([tool, *(_names(experts, tool, by) for by in GRANULARITIES), "\n".join(loads) or NONE])
    return todo | {
        "unnamed": None,
        "modules": protected_names(experts, "json", "expert")[:MOST],
        "more": max(len(experts) - MOST, 0),
        "sizes": sizes,
        "shapes": evidence.model is not None,
        "tools": make_table("tool,by expert,by layer,seen to load in", rows),
    }


def _names(experts: list[Protected], tool: str, granularity: str) -> str:
    if (tool, granularity) == ("llama.cpp", "expert"):
        return NONE  # GGUF has one tensor per layer
    try:
        names = protected_names(experts, tool, granularity)
    except SedetectError as error:
        return str(error)
    more = [f"and {len(names) - MOST} more"] if len(names) > MOST else []
    return "\n".join([*names[:MOST], *more])


def _cost(evidence: Evidence) -> dict[str, str | None]:
    """What 4 bits cost with and without: text, and the command that measures it where it is not known."""
    budget = evidence.budget
    row = None if budget is None else next((row for row in budget.rows if row.name == FOUR_BITS), None)
    if budget is None or row is None or row.kept is None:
        command = f"{_command('budget', evidence)} --format {FOUR_BITS}"
        return {"text": "What 4 bits cost with and without protection was not measured.", "command": command}
    text = f"Measured with all routed experts in 4 bits (simulated): perplexity {percent(row.bare.mean_change, 2)}; "
    text += f"with {', '.join(budget.kept)} in full precision {percent(row.kept.mean_change, 2)}"
    changes = sorted((cost.mean_change for cost in row.random), key=badness)
    if changes:
        text += f", with random experts of the same layers instead {percent(changes[0], 2)}"
        text += f" to {percent(changes[-1], 2)}" if len(changes) > 1 else ""
    return {"text": f"{text}.", "command": None}
