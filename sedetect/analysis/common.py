"""Shared by the analyses of `sedetect analyze weights, outputs, routing`: their file, and the groups of experts
compared.

The analyses are those of "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219).
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sedetect.calibration.windows import Windows, prefix_ids
from sedetect.documents import Tabular, short_repr
from sedetect.errors import Argument, SedetectError
from sedetect.files import write_atomic
from sedetect.models.banks import Bank
from sedetect.models.identity import model_digest, model_name
from sedetect.stats.place import BankId, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "1"
KINDS = ("weights", "outputs", "routing")
# The arrays with a value for each expert.
_OF_EXPERTS = {
    "weights": (*(f"{name}.{what}" for name in ("gate", "up", "down") for what in ("norm", "peak")), "router.norm"),
    "outputs": ("norm_mean", "norm_max"),
    "routing": ("weight",),
}


@dataclass
class LayerArrays:
    """One bank of routed experts.

    experts   how many there are, E; members: names of the N experts that the arrays are of, these E first
    """

    experts: int
    members: list[str]
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)

    __repr__ = short_repr


@dataclass
class Analysis(Tabular):
    """The result of one analysis, by the bank of routed experts.

    kind      one of KINDS
    model, digest, dtype    as in the header of statistics
    settings  the arguments; texts, domains: the text read, see the function that made it
    notes     facts that the reader must know
    """

    kind: str
    model: str
    digest: str
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: dict[BankId, LayerArrays] = field(default_factory=dict)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per routed expert: the arrays with a value for each, and the tokens of each domain that chose it."""
        rows = []
        for layer in self.layers.values():
            columns = {name: layer.arrays[name] for name in _OF_EXPERTS[self.kind] if name in layer.arrays}
            if "load" in layer.arrays:
                columns |= {f"load, {of}": load for of, load in zip(self.settings["domains"], layer.arrays["load"])}
            for expert, name in enumerate(layer.members[: layer.experts]):
                rows.append({"name": name} | {what: values[expert].item() for what, values in columns.items()})
        return rows

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write folder/<kind>-analysis.safetensors, tensors named "<stack>.<layer>.<kind>/<array>", atomically."""
        path = file_of(folder, self.kind)
        tensors = {
            f"{bank}/{name}": t.contiguous() for bank, of in self.layers.items() for name, t in of.arrays.items()
        }
        header = {name: getattr(self, name) for name in ("model", "digest", "dtype", "settings", "notes")}
        header["layers"] = {
            str(bank): {"experts": of.experts, "members": of.members} for bank, of in self.layers.items()
        }
        metadata = {"format": f"sedetect-{self.kind}", "version": VERSION, "header": json.dumps(header)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], kind: str) -> "Analysis":
        """Read what save wrote. Raises SedetectError for a missing or damaged file, another format, or another
        version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = (metadata.get("format"), metadata.get("version"))
                if found != (f"sedetect-{kind}", VERSION):
                    raise SedetectError(
                        f"{path}: is {found[0]} version {found[1]}, not sedetect-{kind} version {VERSION}; "
                        f"run `sedetect analyze {kind}` again"
                    )
                header = json.loads(metadata["header"])
                layers = {BankId.parse(bank): LayerArrays(**of) for bank, of in header.pop("layers").items()}
                for key in file.keys():  # noqa: SIM118  no mapping
                    bank, name = key.split("/")
                    layers[BankId.parse(bank)].arrays[name] = file.get_tensor(key)
            return cls(kind, **header, layers=layers)
        except (SafetensorError, KeyError, OSError, TypeError, ValueError) as error:
            raise SedetectError(f"{path}: cannot be read ({error}); run `sedetect analyze {kind}` again") from None


def new_analysis(kind: str, model: nn.Module, digest: str | None = None) -> Analysis:
    """An empty analysis of a live model. digest: used instead of the digest of its weights."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Analysis(kind, model_name(model), model_digest(model) if digest is None else digest, dtype)


def text_settings(domains: dict[str, Windows], texts: Sequence["Text"]) -> dict[str, Any]:
    """An analysis's record of its text: tokens by domain, and the short texts whole."""
    return {
        "domains": {domain: windows.ids.numel() for domain, windows in domains.items()},
        "texts": [text.to_dict() for text in texts],
    }


def file_of(folder: str | os.PathLike[str], kind: str) -> Path:
    """The path of an analysis in a folder of results."""
    return Path(folder) / f"{kind}-analysis.safetensors"


@dataclass
class Text:
    """A short text to show token by token: ids (L,) int64, with the tokenizer's prefix."""

    text: str
    ids: torch.Tensor
    tokens: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "ids": self.ids.tolist(), "tokens": self.tokens}


def read_texts(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> list[Text]:
    """Texts as the tokenizer reads them. Raises SedetectError for one without a token of its own."""
    read = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= len(prefix_ids(tokenizer)):
            raise SedetectError(Argument("texts"), f" {text!r}: gives no token; give a text")
        read.append(Text(text, torch.tensor(ids), [str(tokenizer.decode([one])) for one in ids]))
    return read


@dataclass
class Group:
    """Experts compared with each other: the routed experts of one bank, and the shared experts of its layer."""

    routed: Bank
    shared: list[Bank] = field(default_factory=list)

    @property
    def members(self) -> list[str]:
        """Names of the experts: the routed ones, then the shared."""
        return [str(place_of(b.id, e, b.experts)) for b in (self.routed, *self.shared) for e in range(b.experts)]


def groups_of(banks: Sequence[Bank], layers: Sequence[int] | None = None) -> list[Group]:
    """The groups of a model's banks, in layer order; of these layers alone, where they are given.

    Raises SedetectError for a layer that has no routed experts.
    """
    routed = [bank for bank in banks if bank.id.routed]
    known = sorted({bank.id.layer for bank in routed})
    for layer in layers or ():
        if layer not in known:
            raise SedetectError(
                Argument("layers"), f" {layer}: has no routed experts; choose of {', '.join(map(str, known))}"
            )
    return [
        Group(one, [b for b in banks if b.id[:2] == one.id[:2] and b.id.base == "shared"])
        for one in routed
        if layers is None or one.id.layer in layers
    ]


def parse_layers(text: str | None) -> list[int] | None:
    """ "0,5,10-12" as numbers; None for None, which is all layers. Raises SedetectError for anything else."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise SedetectError(
                Argument("layers"), f" {text}: {part.strip() or 'nothing'} is not a layer; give numbers, as 0,5,10-12"
            )
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


class Standing(NamedTuple):
    """One expert's value among those of the E routed experts that are known, their median, and its place from above (1
    to E); NaN where it is not known."""

    value: float
    median: float
    place: int


def standing(values: torch.Tensor, expert: int) -> Standing:
    """The Standing of one expert in values (E,), NaN for unknown ones."""
    known = values[~values.isnan()].double()
    median = float(known.quantile(0.5)) if len(known) else math.nan
    return Standing(float(values[expert]), median, 1 + int((values > values[expert]).sum()))


def to_others(matrix: torch.Tensor, experts: int) -> torch.Tensor:
    """(E,): the mean of what is not NaN in each row of the first E of (N, N), the diagonal left out; NaN of nothing."""
    part = matrix[:experts, :experts].double().clone().fill_diagonal_(torch.nan)
    return part.nanmean(1)


def without(matrix: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A table of pairs (N, N) with NaN beside the members that are zeros (N,) bool: they have no similarity to any."""
    return matrix.masked_fill(zeros[:, None] | zeros, torch.nan)


def off_diagonal(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The values below the diagonal of the first count rows and columns of (N, N), those that are not NaN: (n,)."""
    part = matrix[:count, :count]
    rows, columns = torch.tril_indices(count, count, offset=-1)
    values = part[rows, columns]
    return values[~values.isnan()]
