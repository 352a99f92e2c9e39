"""Names of banks, experts and single weights of experts, as values and as text."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from sedetect.errors import SedetectError

_NAME = re.compile(r"(?:(\w+)\.)?L(\d+)(?:E(\d+)(_\w+)?|((?:shared|dense)(?:_\d+)?)(?:E(\d+))?)")

PREDICTORS = "mtp"  # the stack of a multi-token prediction head


class BankId(NamedTuple):
    """Identity of a bank: stack ("decoder", "encoder", "mtp", ...), layer index, kind ("routed", "shared", "dense")."""

    stack: str
    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.stack}.{self.layer}.{self.kind}"

    @property
    def base(self) -> str:
        """kind without its suffix: "routed" for "routed_vision", "shared" for "shared_1"."""
        return self.kind.split("_")[0]

    @property
    def routed(self) -> bool:
        """Whether a router chooses among its experts."""
        return self.base == "routed"

    @classmethod
    def parse(cls, text: str) -> "BankId":
        stack, layer, kind = text.split(".")
        return cls(stack, int(layer), kind)


@dataclass(frozen=True)
class Place:
    """Where an expert is: expert is its index, or "shared" or "dense" for a bank of that kind with one expert.

    str: "L1E28", "L8shared", "L8shared_1"; "L1E28_vision" in the bank "routed_vision", "L8sharedE2" in a shared bank of
    several, "encoder.L1E28" in a stack that is not the decoder.
    """

    stack: str
    layer: int
    kind: str
    expert: int | str

    def __str__(self) -> str:
        if self.bank.routed:
            name = f"E{self.expert}{self.kind.removeprefix('routed')}"
        else:
            name = self.kind if isinstance(self.expert, str) else f"{self.kind}E{self.expert}"
        return f"{'' if self.stack == 'decoder' else self.stack + '.'}L{self.layer}{name}"

    @property
    def bank(self) -> BankId:
        return BankId(self.stack, self.layer, self.kind)

    @property
    def place(self) -> "Place":
        """The bare Place, without the fields of a subclass."""
        return Place(self.stack, self.layer, self.kind, self.expert)

    @property
    def number(self) -> int:
        """Index of the expert in its bank; 0 in a shared or dense bank of one."""
        return 0 if isinstance(self.expert, str) else self.expert


def place_of(bank: BankId, e: int, experts: int) -> Place:
    """The Place of expert e of a bank with that many experts."""
    return Place(*bank, e if bank.routed or experts > 1 else bank.base)


def parse_place(name: str) -> Place:
    """The Place whose str is name: "L1E28", "L8shared", "encoder.L1E28". Raises SedetectError for anything else."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise SedetectError(f"{name!r}: not the name of an expert; write L1E28, or L8shared for a shared expert")
    stack, layer, expert, suffix, kind, one = match.groups()
    bank = BankId(stack or "decoder", int(layer), kind or f"routed{suffix or ''}")
    number = expert or one
    return Place(*bank, bank.base if number is None else int(number))


@dataclass(frozen=True)
class Weight:
    """One element of an expert's down_proj: output channel (row) and intermediate channel (column)."""

    expert: Place
    channel: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.expert}[{self.channel},{self.intermediate}]"


def parse_target(name: str) -> Place | Weight:
    """parse_place, and the Weight whose str is name: "L1E28[101,14]"."""
    expert, bracket, rest = name.partition("[")
    if not bracket:
        return parse_place(name)
    match = re.fullmatch(r"(\d+),\s*(\d+)\]", rest)
    if match is None:
        raise SedetectError(f"{name!r}: not the name of a weight; write L1E28[channel,intermediate]")
    return Weight(parse_place(expert), int(match[1]), int(match[2]))
