"""Tables of ready cells, as the template lays them out."""

from dataclasses import dataclass, field

MOST = 40  # rows of a table; a random model may name dozens of experts
NONE = "–"


class Named(str):
    """The name of an expert or its verdict, colored by the verdict."""

    verdict: str

    def __new__(cls, text: object, verdict: str) -> "Named":
        self = super().__new__(cls, text)
        self.verdict = verdict
        return self


@dataclass
class Table:
    """Head, rows of cells, and which columns hold numbers."""

    columns: list[str]
    numbers: set[int] = field(default_factory=set)
    rows: list[list[str]] = field(default_factory=list)


def make_table(head: str, rows: list[list[str]]) -> Table:
    """head: column names separated by commas, those of numbers with a leading #."""
    names = head.split(",")
    return Table([n.lstrip("#") for n in names], {i for i, n in enumerate(names) if n.startswith("#")}, rows)
