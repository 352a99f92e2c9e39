"""What a person reads of a profile: lines that need no model to be checked."""

import torch

from sedetect.analysis.common import Analysis, LayerArrays
from sedetect.analysis.outputs import OutputSums
from sedetect.analysis.tables import layers_table, standings_tables
from sedetect.ranking.coverage import folded
from sedetect.stats.note import Note
from sedetect.stats.place import BankId


def test_what_several_banks_note_is_said_once():
    banks = [BankId("decoder", 0, "routed"), BankId("decoder", 1, "shared"), BankId("decoder", 2, "routed")]
    notes = [Note("fallback", "why", banks[0]), Note("text", "another"), Note("fallback", "why", banks[1])]
    notes.append(Note("fallback", "other", banks[2]))
    assert folded(notes) == ["decoder.0.routed and 1 more: why", "another", "decoder.2.routed: other"]


def test_analyses_of_nothing():
    """A layer that no token reached has no busiest expert, and an expert without a value no place."""
    bank, names = BankId("decoder", 1, "routed"), [f"L1E{e}" for e in range(4)]
    nothing = {"load": torch.zeros(1, 4, dtype=torch.int64)}
    nothing |= {"tokens": torch.zeros(1, dtype=torch.int64), "coactivation": torch.zeros(4, 4, dtype=torch.int64)}
    nothing |= {"weight": torch.full((4,), torch.nan), "entropy": torch.full((1,), torch.nan)}
    made = Analysis("routing", "m", "d", "float32", {"domains": {"code": 0}, "texts": []})
    made.layers[bank] = LayerArrays(4, names, nothing)
    table = layers_table(made)
    assert table.rows == [["L1", *["-"] * 7]] and len(table.columns) == 8
    made = Analysis("outputs", "m", "d", "float32", {"domains": {"code": 0}, "texts": [], "against": None})
    made.layers[bank] = LayerArrays(4, names, OutputSums(4, 4, torch.device("cpu")).arrays())
    (cells,) = standings_tables(made, {"L1E0": "super"}).values()
    assert ["mean norm", "-", "-", "-"] in cells.rows and "nan" not in str(cells)
