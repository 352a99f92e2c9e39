"""Verdicts from the losses of a proof's runs; proof.py defines the levels and their conditions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sedetect.experiments.effects import effect
from sedetect.stats.place import Place
from sedetect.stats.proof import Effect, Verdict
from sedetect.stats.residual import Residual

ALL = "all"  # the run in which all that fired are off
EVERYWHERE = "all, at every token"  # said, and decides nothing


def alone(place: Place) -> str:
    return f"{place} alone"


def all_but(place: Place, fired: Sequence[Place]) -> str:
    """The label of the run with all fired experts off but one; with two, that of the other one alone."""
    others = [other for other in fired if other != place]
    return alone(others[0]) if len(others) == 1 else f"all but {place}"


@dataclass(frozen=True)
class Evidence:
    """The results of the runs, by label (ALL, alone(), all_but()).

    changes     (N,) of each run, loss per window against the unchanged model, in nats per token; controls: of each draw
    plain       residual stream of the unchanged model; observed: of each run
    """

    changes: Mapping[str, np.ndarray]
    controls: Sequence[np.ndarray]
    plain: Residual
    observed: Mapping[str, Residual]

    def beyond_controls(self, change: np.ndarray, level: float) -> bool:
        """Whether the whole interval of a change lies above that of the worst control."""
        worst = max(self.controls, key=lambda control: float(control.mean()), default=np.zeros_like(change))
        return effect(change - worst, level).low > 0

    def falls(self, label: str) -> bool:
        """Whether a run removes half of the sinks, or of the largest activation."""
        old, new = self.plain, self.observed[label]
        fell = new.inner_max <= old.inner_max / 2
        if old.sink_mean is None or new.sink_mean is None:
            return fell
        return fell or new.sink_mean <= old.sink_mean / 2


def judge(
    place: Place,
    fired: Sequence[Place],
    evidence: Evidence,
    *,
    smallest: float,
    level: float,
    triggers: int,
    firsts: int,
) -> Verdict:
    """The verdict of one candidate; fired: all that fired, level: of one interval."""
    if place not in fired:
        reason = "it did not fire on the text of the proof; give text on which it does"
        return Verdict(str(place), "undecided", reason, None, None, 0, 0)
    own = evidence.changes[alone(place)]
    others = [other for other in fired if other != place]
    added = evidence.changes[ALL] - evidence.changes[all_but(place, fired)] if others else None
    by_itself, within = effect(own, level), None if added is None else effect(added, level)

    def verdict(word: str, reason: str, partners: Sequence[Place] = ()) -> Verdict:
        return Verdict(
            str(place), word, reason, by_itself, within, triggers, firsts, [str(other) for other in partners]
        )

    if (
        _matters(own, by_itself, evidence, smallest, level)
        and evidence.falls(alone(place))
        and evidence.plain.has_sinks
    ):
        return verdict("proved", f"the model depends on it: {by_itself} without it")
    as_set = added is not None and within is not None and _matters(added, within, evidence, smallest, level)
    as_set = as_set and effect(evidence.changes[ALL], level).low > 0
    if as_set and evidence.falls(ALL) and evidence.plain.has_sinks:
        # The other experts needed for that: those that add as much.
        left = {other: evidence.changes[ALL] - evidence.changes[all_but(other, fired)] for other in others}
        partners = [other for other, change in left.items() if effect(change, level).rise >= smallest]
        partners = partners or [max(left, key=lambda other: float(left[other].mean()))]
        names = " and ".join(map(str, partners))
        verb = "stand" if len(partners) > 1 else "stands"
        together = effect(evidence.changes[ALL], level)
        reason = f"as a set: {names} {verb} in for it; {together} without the set, {by_itself} without it alone"
        return verdict("proved", reason, partners)
    highest = max((one for one in (by_itself, within) if one is not None), key=lambda one: one.high)
    if highest.high < smallest:
        beside = "" if highest is by_itself else f", {within} more where the other candidates are off too"
        return verdict("refuted", f"the model does not depend on it: {by_itself} without it{beside}")
    return verdict(
        "undecided", _undecided(own if added is None else max(own, added, key=np.mean), evidence, smallest, level)
    )


def _matters(change: np.ndarray, measured: Effect, evidence: Evidence, smallest: float, level: float) -> bool:
    return measured.rise >= smallest and evidence.beyond_controls(change, level)


def _undecided(change: np.ndarray, evidence: Evidence, smallest: float, level: float) -> str:
    """The reason, and the means to decide."""
    measured = effect(change, level)
    if measured.rise >= smallest and evidence.beyond_controls(change, level):
        if evidence.plain.has_sinks is False:
            return f"{measured} without it, but not as a super expert: the model has no attention sinks"
        if evidence.plain.has_sinks is None:
            return f"{measured} without it, but the model gives no attention weights, so its sinks are unknown"
        return f"{measured} without it, but not as a super expert: sinks and largest activation stay"
    if not math.isfinite(measured.high):
        needed = math.ceil(math.log2(2 / level))
        return f"{len(change)} documents are too few for any interval; at least {needed} are needed"
    if measured.rise >= smallest:
        return f"{measured} without it, which other experts at the same tokens may cost as well"
    # The half width shrinks with the root of the number of documents.
    width, room = measured.high - measured.rise, smallest - measured.rise
    needed = math.ceil(len(change) * (width / room) ** 2 * 1.1)
    return f"{measured}, which neither reaches {smallest:.0%} nor stays below it; about {needed} documents would decide"
