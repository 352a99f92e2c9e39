"""What a person reads of a profile: lines that need no model to be checked."""

from sedetect.ranking.coverage import folded
from sedetect.stats.note import Note
from sedetect.stats.place import BankId


def test_what_several_banks_note_is_said_once():
    banks = [BankId("decoder", 0, "routed"), BankId("decoder", 1, "shared"), BankId("decoder", 2, "routed")]
    notes = [Note("fallback", "why", banks[0]), Note("text", "another"), Note("fallback", "why", banks[1])]
    notes.append(Note("fallback", "other", banks[2]))
    assert folded(notes) == ["decoder.0.routed and 1 more: why", "another", "decoder.2.routed: other"]
