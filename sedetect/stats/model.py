"""The statistics of a whole model: the states of its banks, and the header that says what was run; and their file.

ModelStats merges as its banks do (sedetect.stats.bank).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sedetect.documents import data_frame, html_table, short_repr
from sedetect.errors import SedetectError
from sedetect.files import STATS, check_readable, file_in, write_atomic
from sedetect.kernels.records import (
    COLUMN,
    EMPTY,
)
from sedetect.stats.bank import RECORDS, BankStats
from sedetect.stats.note import Note, sorted_notes
from sedetect.stats.place import BankId, place_of

FORMAT = "sedetect-stats"
VERSION = "2"
_READ = ("1", VERSION)  # digests of version 1 identified a model by the path of its files
UNCHECKED = "unchecked"  # instead of a checksum in a digest


@dataclass
class Source:
    """The source of sequences: ids are unique within a source.

    ranges are half-open [start, end) ranges of the sequence ids seen, sorted; info describes them (corpus, domain,
    window length, ...), for people.
    """

    ranges: list[list[int]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class BankInfo:
    """Metadata of a bank."""

    module: str
    top_k: int
    backends: list[str] = field(default_factory=list)


@dataclass
class Header:
    """The model and text of a run. Two states merge if their digests and dtypes are equal; model is for people.

    digest: "<id>-<checksum>" of the model (sedetect.models.identity); the checksum is "unchecked" where it is unknown.
    layers: decoder layers per stack, dense ones counted. tokens: counted tokens; sequences: sequences they belong to.
    notes: what the reader must know (unmapped rows, missing prefix, ...), sorted by text, without duplicates.
    """

    model: str = ""
    digest: str = ""
    dtype: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    banks: dict[str, BankInfo] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    window: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    __repr__ = short_repr

    def to_json(self) -> str:
        return json.dumps(self, default=_plain, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Header":
        written = json.loads(text)
        banks = {name: BankInfo(**bank) for name, bank in written.pop("banks", {}).items()}
        sources = {name: Source(**source) for name, source in written.pop("sources", {}).items()}
        notes = [Note.read(note) for note in written.pop("notes", [])]
        return cls(banks=banks, sources=sources, notes=notes, **written)

    def merge(self, other: "Header") -> "Header":
        """The merged header. Raises SedetectError for different models or precisions, or overlapping sequences."""
        compared = {
            "digest": (self.digest.partition("-")[0], other.digest.partition("-")[0]),
            "dtype": (self.dtype, other.dtype),
            "the digest of their weights": (self.digest, other.digest),
        }
        for what, (one, two) in compared.items():
            if one != two:
                raise SedetectError(
                    f"statistics of different models do not merge: {self.model!r} and {other.model!r} differ in "
                    f"{what} ({one} and {two}); merge runs of one model, or compare them"
                )
        apart = {str(s.info.get("modality", "all")) for one in (self, other) for s in one.sources.values()}
        if len(apart) > 1:
            raise SedetectError(
                f"statistics of {' and of '.join(sorted(apart))} tokens do not merge: one may be in the other; merge "
                "those of one modality"
            )
        sources = dict(self.sources)
        for name, source in other.sources.items():
            if name in sources:
                label = f"{name} ({source.info['domain']})" if "domain" in source.info else name
                ranges = _union_ranges(sources[name].ranges, source.ranges, label)
                source = Source(ranges, sources[name].info)
            sources[name] = source
        banks = dict(self.banks)
        for name, bank in other.banks.items():
            mine = banks.get(name, bank)
            served = sorted({*mine.backends, *bank.backends})
            banks[name] = replace(mine, top_k=max(mine.top_k, bank.top_k), backends=served)
        versions = {
            name: " + ".join(
                sorted({v for h in (self, other) if name in h.versions for v in h.versions[name].split(" + ")})
            )
            for name in {*self.versions, *other.versions}
        }
        return Header(
            model=min(self.model, other.model),
            digest=self.digest,
            dtype=self.dtype,
            layers=self.layers | other.layers,
            banks=banks,
            sources=dict(sorted(sources.items())),
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            window=self.window if self.window == other.window else None,
            versions=versions,
            notes=sorted_notes([*self.notes, *other.notes]),
        )


@dataclass
class ModelStats:
    """The states of all banks of a model, and the header that describes the run."""

    banks: dict[BankId, BankStats] = field(default_factory=dict)
    header: Header = field(default_factory=Header)

    def __repr__(self) -> str:
        header, experts = self.header, sum(state.num_experts for bank, state in self.banks.items() if bank.routed)
        return (
            f"ModelStats({header.model or 'empty'} {header.dtype}: {experts:,} routed experts in {len(self.banks)} "
            f"banks; {header.tokens:,} tokens in {header.sequences:,} sequences)"
        )

    def _repr_html_(self) -> str:
        rows = []
        for bank, state in sorted(self.banks.items()):
            known = torch.where(state.out_max.isnan(), -1, state.out_max)
            best = int(known.argmax())
            largest = (float(known[best]), str(place_of(bank, best, state.num_experts)))
            seen = [*(largest if largest[0] > 0 else (None, None)), float(state.out_max.nanmedian())]
            rows.append([str(bank), state.num_experts, *seen, int(state.rows.min()), int(state.rows.max())])
        columns = ("bank", "experts", "largest |y|", "of", "median of the experts", "fewest rows", "most rows")
        return html_table(repr(self), columns, rows)

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame: a row per expert, with its name, place, counted rows, and largest |y|: of all rows, of
        first tokens, of the others."""
        records = []
        for bank, state in sorted(self.banks.items()):
            columns = (values.tolist() for values in (state.rows, state.out_max, state.first_max, state.rest_max))
            for e, values in enumerate(zip(*columns)):
                place = place_of(bank, e, state.num_experts)
                measured = dict(zip(("rows", "out_max", "first_max", "rest_max"), values))
                records.append({"name": str(place)} | vars(place) | measured)
        return data_frame(records)

    @classmethod
    def empty(cls) -> "ModelStats":
        """The identity of merge."""
        return cls()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as in a file; the header is small beside them."""
        return sum(tensor.nbytes for state in self.banks.values() for tensor in state.tensors().values())

    def merge(self, other: "ModelStats") -> "ModelStats":
        """The state of both runs.

        Raises SedetectError for different models or precisions, and where a source's sequence ids overlap (the same
        file twice).
        """
        if not self.banks:
            return other
        if not other.banks:
            return self
        header = self.header.merge(other.header)
        order = {name: number for number, name in enumerate(sorted(header.sources))}
        mine, theirs = self._renumbered(order), other._renumbered(order)
        banks = {}
        for bank in sorted({*mine, *theirs}):
            if bank in mine and bank in theirs:
                banks[bank] = mine[bank].merge(theirs[bank])
            else:
                banks[bank] = mine.get(bank) or theirs[bank]
        return ModelStats(banks, header)

    def _renumbered(self, order: dict[str, int]) -> dict[BankId, BankStats]:
        """The banks with source numbers counted in order (source name -> number)."""
        numbers = [order[name] for name in sorted(self.header.sources)]
        if numbers == list(range(len(numbers))):
            return self.banks
        lookup = torch.tensor(numbers)
        banks = {}
        for bank, state in self.banks.items():
            renumbered = {}
            for name in RECORDS:
                records = getattr(state, name).clone()
                kept = records[..., COLUMN["value"]] != EMPTY
                source = records[..., COLUMN["source"]]
                records[..., COLUMN["source"]] = torch.where(kept, lookup[source], source)
                renumbered[name] = records
            banks[bank] = replace(state, **renumbered)
        return banks

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, tensors named "<stack>.<layer>.<kind>/<field>", atomically.

        Raises SedetectError where the folder cannot be written.
        """
        arrays = {
            f"{bank}/{name}": tensor.cpu().numpy()  # which safetensors takes in a third of the time of tensors
            for bank, state in self.banks.items()
            for name, tensor in state.tensors().items()
        }
        metadata = {"format": FORMAT, "version": VERSION, "header": self.header.to_json()}
        write_atomic(path, lambda temporary: save_file(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelStats":
        """Read a file written by save, or the stats.safetensors of a folder.

        Raises SedetectError for a missing or damaged file, another format, or another version.
        """
        path = file_in(path, STATS)
        if not path.is_file():
            raise SedetectError(f"{path}: no such statistics file; run `sedetect profile MODEL -o DIR` to make one")
        try:
            check_readable(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise SedetectError(f"{path}: not a sedetect statistics file; give the {STATS} of a profile")
                if metadata.get("version") not in _READ:
                    raise SedetectError(
                        f"{path}: statistics version {metadata.get('version')!r}, this sedetect reads "
                        f"{' and '.join(_READ)}; profile again or use the sedetect that wrote it"
                    )
                by_bank: dict[BankId, dict[str, torch.Tensor]] = {}
                for key in file.keys():  # noqa: SIM118  # no dictionary: it is not iterated itself
                    bank, name = key.split("/")
                    by_bank.setdefault(BankId.parse(bank), {})[name] = file.get_tensor(key)
            banks = {bank: BankStats.from_tensors(tensors) for bank, tensors in sorted(by_bank.items())}
            header = Header.from_json(metadata["header"])
            if {str(bank) for bank in banks} != header.banks.keys():
                raise ValueError(f"{len(banks)} banks where its header names {len(header.banks)}")
            return cls(banks, header)
        except (SafetensorError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise SedetectError(f"{path}: damaged statistics file ({error}); profile again") from None


def merge_all(states: Iterable[ModelStats | str | os.PathLike[str]]) -> ModelStats:
    """Merge any number of runs (statistics or paths, as for opened); without runs, the empty state."""
    return reduce(ModelStats.merge, map(opened, several(states)), ModelStats.empty())


def join_domains(domains: Iterable[ModelStats]) -> ModelStats:
    """The domains of one run merged, without notes on banks that only some of them reach (experts of images)."""
    whole = merge_all(domains)
    ran = {name for name, bank in whole.header.banks.items() if bank.backends}
    whole.header.notes = [note for note in whole.header.notes if note.code != "never_ran" or str(note.bank) not in ran]
    return whole


def several(runs: Any) -> Iterable[Any]:
    """Several runs. Raises SedetectError for a single run, and for any other type."""
    if isinstance(runs, (str, os.PathLike, ModelStats)) or not isinstance(runs, Iterable):
        raise SedetectError(f"stats: is one {type(runs).__name__}; give several ModelStats or their paths, as a list")
    return runs


def opened(stats: ModelStats | str | os.PathLike[str]) -> ModelStats:
    """Statistics, loaded if they are given as a file or a folder of results. Raises SedetectError for anything else."""
    if isinstance(stats, (str, os.PathLike)):
        return ModelStats.load(stats)
    if not isinstance(stats, ModelStats):
        inside = ", such as its .stats" if isinstance(getattr(stats, "stats", None), ModelStats) else ""
        raise SedetectError(
            f"stats: is a {type(stats).__name__}; give a ModelStats{inside}, or the path of a statistics file or of a "
            "folder of results"
        )
    return stats


def join_banks(parts: list[ModelStats]) -> ModelStats:
    """Join parts of one run that hold different banks over the same sequences."""
    headers = [part.header for part in parts]
    header = replace(
        headers[0],
        layers={stack: count for one in headers for stack, count in one.layers.items()},
        banks={name: bank for one in headers for name, bank in one.banks.items()},
        notes=sorted_notes(note for one in headers for note in one.notes),
    )
    return ModelStats({bank: state for part in parts for bank, state in part.banks.items()}, header)


def ranges_of(ids: torch.Tensor) -> list[list[int]]:
    """Half-open ranges that cover the ids (N,) int64, sorted: [3, 1, 2, 7] -> [[1, 4], [7, 8]]."""
    ids = torch.unique(ids)
    if not len(ids):
        return []
    breaks = (ids.diff() > 1).nonzero().flatten()
    starts = ids[torch.cat((torch.tensor([0]), breaks + 1))]
    ends = ids[torch.cat((breaks, torch.tensor([len(ids) - 1])))] + 1
    return torch.stack((starts, ends), dim=1).tolist()


def same_model(one: str, other: str) -> bool:
    """Whether two digests identify one model: equal ids, and equal checksums where both have one."""
    (one_id, _, mine), (other_id, _, theirs) = one.partition("-"), other.partition("-")
    return one_id == other_id and (mine == theirs or UNCHECKED in (mine, theirs))


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(part: Note | BankInfo | Source | Header) -> dict[str, Any]:
    """A part of a header, for JSON."""
    return part.to_dict() if isinstance(part, Note) else vars(part)


def _union_ranges(a: list[list[int]], b: list[list[int]], source: str) -> list[list[int]]:
    """Disjoint union of half-open ranges, adjacent ones joined; SedetectError where they overlap."""
    union: list[list[int]] = []
    for start, end in sorted([*a, *b]):
        if union and start < union[-1][1]:
            raise SedetectError(
                f"source {source}: sequences {start} to {min(end, union[-1][1]) - 1} are in both runs; "
                "the same file or the same text was given twice, leave one out"
            )
        if union and start == union[-1][1]:
            union[-1][1] = end
        else:
            union.append([start, end])
    return union
