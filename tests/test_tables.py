"""What a person reads of a profile: lines that need no model to be checked."""

from sedetect.ranking.coverage import folded


def test_what_several_banks_note_is_said_once():
    notes = ["decoder.0.routed: why", "another", "decoder.1.shared: why", "decoder.2.routed: other"]
    assert folded(notes) == ["decoder.0.routed and 1 more: why", "another", "decoder.2.routed: other"]
