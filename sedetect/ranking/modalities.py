"""Experts by modality: those that images and sound use more than text, and those that text alone would prune."""

from collections.abc import Mapping
from dataclasses import dataclass

from sedetect.ranking.rule import rank
from sedetect.ranking.saliencies import ascending, found_places, saliency
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId, Place

RATIO = 0.25  # of each layer's experts, that pruning is taken to leave out
TIMES = 2  # as much as text: what an expert of another modality is used at least


@dataclass(frozen=True)
class Use:
    """An expert's use by the tokens of a modality and by those of text.

    rows    of the modality's tokens
    share   of that modality's rows in its bank; text: of those of text
    own     it has an even share of the modality at least, and TIMES that of text
    lost    by the statistics of text alone it is among the RATIO of its bank with the lowest saliency, by all it is not
    """

    place: Place
    modality: str
    rows: int
    share: float
    text: float
    own: bool
    lost: bool


def uses(stats: ModelStats, modalities: Mapping[str, ModelStats], by: str = "reap") -> list[Use]:
    """For each modality but text, the routed experts that are its own or lost, largest share first.

    stats: of all tokens; modalities: of each alone (Profile.modalities); where there is no text, there is no expert.
    by: the saliency that experts are pruned by; candidates stay whatever theirs.
    """
    if "text" not in modalities:
        return []
    text = modalities["text"]
    lowest, lowest_of_text = _lowest(stats, by), _lowest(text, by)
    found = []
    for modality, part in modalities.items():
        for bank, state in sorted(part.banks.items()):
            total, read = int(state.rows.sum()), text.banks[bank].rows.tolist()
            if modality == "text" or not bank.routed or not total:
                continue
            for expert, rows in enumerate(state.rows.tolist()):
                share, of_text = rows / total, read[expert] / max(sum(read), 1)
                own = share >= max(TIMES * of_text, 1 / state.num_experts)
                lost = rows > 0 and expert in lowest_of_text[bank] - lowest[bank]
                if own or lost:
                    found.append(Use(Place(*bank, expert), modality, rows, share, of_text, own, lost))
    return sorted(found, key=lambda use: -use.share)


def _lowest(stats: ModelStats, by: str) -> dict[BankId, set[int]]:
    """Bank -> the experts that pruning it removes."""
    safe = set(found_places(rank(stats)))
    return {
        bank: set([e for e in ascending(values) if Place(*bank, e) not in safe][: int(RATIO * len(values))])
        for bank, values in saliency(stats, by).items()
    }
