"""The history of a series: when its final candidates formed, beside sinks, residual stream and loss."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import SedetectError
from sedetect.files import TIMELINE
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats
from sedetect.stats.place import Place, parse_place
from sedetect.stats.residual import SINK_MASS
from sedetect.training.series import Series, State

_PASSING = 8  # number of the largest former candidates to keep


@dataclass(frozen=True)
class History:
    """One expert over the states of a series.

    values          its largest |y| in each state; None where it saw no row
    medians         of the finite experts of its bank that saw rows; None where there are none
    places          1 where it is the largest of its bank; None where it saw no row
    candidate       whether rank finds it
    leads_from      the first step from which on it is the largest of its bank to the end; None: it is not in the end
    candidate_from  likewise of candidate
    """

    expert: Place
    values: list[float | None]
    medians: list[float | None]
    places: list[int | None]
    candidate: list[bool]
    leads_from: int | None
    candidate_from: int | None


@dataclass(frozen=True)
class Timeline(Tabular, Document):
    """What timeline found.

    states       of the series, by step
    experts      the candidates of the last state, by |y|, descending
    passing      candidates of earlier states that are not candidates in the last, by their largest |y|, at most 8
    sinks_from   the first step from which on there are attention sinks (SINK_MASS above uniform attention) to the end;
                 None: there are none in the end, or they were not observed
    notes        one line each
    """

    FORMAT = "sedetect-timeline"
    FILE = TIMELINE
    REMEDY = "run `sedetect timeline DIR` to make one"

    model: str
    states: list[State]
    experts: list[History]
    passing: list[History]
    sinks_from: int | None
    notes: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per state, with the largest |y| of every expert that was a candidate."""
        return [
            {"step": state.step, "loss": state.loss, "sink_mean": state.sink_mean, "residual_max": state.residual_max}
            | {str(one.expert): one.values[at] for one in [*self.experts, *self.passing]}
            for at, state in enumerate(self.states)
        ]

    @property
    def headline(self) -> str:
        """One sentence: the final candidates, and since when."""
        last = self.states[-1].step
        if not self.experts:
            return f"no candidate at step {last}"
        named = ", ".join(f"{one.expert} (since step {one.candidate_from})" for one in self.experts)
        return f"{len(self.experts)} candidate{'s' * (len(self.experts) > 1)} at step {last}: {named}"

    @property
    def findings(self) -> list[str]:
        """A sentence on each expert, and one on the sinks: when what is there in the end began."""
        lines = [_sentence(one) for one in self.experts]
        for one in self.passing:
            largest = max(value for value in one.values if value is not None)
            lines.append(f"{one.expert}: a candidate for a while, not at the end; largest |y| {largest:.4g}")
        last = self.states[-1]
        if last.sink_mean is not None:
            since = "no attention sinks" if self.sinks_from is None else f"attention sinks since step {self.sinks_from}"
            mass = f"{last.sink_mean:.1%} of the attention on the first token at the end"
            lines.append(f"{since}: {mass}, uniform attention has {last.uniform:.1%}")
        return lines

    def chosen(self, most: int = 24) -> list[int]:
        """Indices of states for a table: all, or as many, evenly spaced, and those at which something begins."""
        count = len(self.states)
        if count <= most:
            return list(range(count))
        begins = {self.sinks_from, *(step for one in self.experts for step in (one.leads_from, one.candidate_from))}
        even = {round(place * (count - 1) / (most - 1)) for place in range(most)}
        return sorted(even | {number for number, state in enumerate(self.states) if state.step in begins})

    def to_dict(self) -> dict[str, Any]:
        """The document timeline.json: every field, experts by name."""
        document = super().to_dict() | asdict(self)
        for name in ("experts", "passing"):
            for written, one in zip(document[name], getattr(self, name), strict=True):
                written["expert"] = str(one.expert)
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Timeline":
        """The inverse of to_dict."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}
        fields["states"] = [State(**state) for state in document["states"]]
        for name in ("experts", "passing"):
            fields[name] = [History(**one | {"expert": parse_place(one["expert"])}) for one in document[name]]
        return cls(**fields)


def _sentence(one: History) -> str:
    value, median = one.values[-1], one.medians[-1]
    ratio = f", {value / median:.0f} times its layer's median" if value and median else ""
    size = "saw no row at the end" if value is None else f"|y| {value:.4g} at the end{ratio}"
    leads = "does not lead its layer" if one.leads_from is None else f"leads its layer since step {one.leads_from}"
    return f"{one.expert}: {leads}, a candidate since step {one.candidate_from}; {size}"


def timeline(folder: str | os.PathLike[str]) -> Timeline:
    """Read the series in a folder, as ExpertMonitor and follow write it.

    Raises SedetectError for a folder without states, and for damaged files.
    """
    series = Series(folder)
    states = series.states()
    if not states:
        raise SedetectError(f"{series.path}: holds no states of a series; let ExpertMonitor make one")
    known = [series.stats(state) for state in states]
    found = [{str(expert): expert for expert in rank(stats).found} for stats in known]
    steps = [state.step for state in states]
    last = found[-1]
    passing = {name: expert for some in found for name, expert in some.items() if name not in last}
    histories = {name: _history(expert, name, known, found, steps) for name, expert in (last | passing).items()}

    def largest(name: str) -> float:
        return -max(value or 0.0 for value in histories[name].values)

    sinks = [state.sink_mean is not None and state.sink_mean >= state.uniform + SINK_MASS for state in states]
    return Timeline(
        model=known[-1].header.model,
        states=states,
        experts=[histories[name] for name in sorted(last, key=lambda name: -last[name].value)],
        passing=[histories[name] for name in sorted(passing, key=largest)[:_PASSING]],
        sinks_from=_since(sinks, steps),
        notes=_notes(known[-1], states, len(passing)),
    )


def _history(
    expert: Place, name: str, known: list[ModelStats], found: list[dict[str, Any]], steps: list[int]
) -> History:
    values: list[float | None] = []
    medians: list[float | None] = []
    places: list[int | None] = []
    for stats in known:
        bank = stats.banks[expert.bank]
        here = bank.out_max.double().numpy()
        visited = bank.rows.numpy() > 0
        seen = here[visited & np.isfinite(here)]
        value = float(here[expert.number]) if visited[expert.number] else None
        values.append(value)
        medians.append(float(np.median(seen)) if seen.size else None)
        places.append(None if value is None else 1 + int((seen > value).sum()))
    candidate = [name in some for some in found]
    leads = _since([place == 1 for place in places], steps)
    return History(expert.place, values, medians, places, candidate, leads, _since(candidate, steps))


def _since(true: list[bool], steps: list[int]) -> int | None:
    """The step from which on it is true to the end."""
    if not true[-1]:
        return None
    return steps[max((n + 1 for n, one in enumerate(true) if not one), default=0)]


def _notes(last: ModelStats, states: list[State], passing: int) -> list[str]:
    notes = []
    if len(states) == 1:
        notes.append("one state is not a series; the time of any formation is unknown")
    if all(state.sink_mean is None for state in states):
        notes.append("attention sinks not observed: the model gives no attention weights")
    if passing > _PASSING:
        notes.append(f"{passing} experts were candidates for a while; the {_PASSING} largest are kept")
    return notes
