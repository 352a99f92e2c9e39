"""The names of experts, banks and weights, as values and as text."""

import pytest

from sedetect import BankId, SedetectError
from sedetect.stats.place import Place, Weight, parse_place, parse_target, place_of

# name, bank, expert, number
FORMS = [
    ("L1E28", BankId("decoder", 1, "routed"), 28, 28),
    ("L3E4_vision", BankId("decoder", 3, "routed_vision"), 4, 4),
    ("encoder.L2E0", BankId("encoder", 2, "routed"), 0, 0),
    ("L8shared", BankId("decoder", 8, "shared"), "shared", 0),
    ("L8shared_1", BankId("decoder", 8, "shared_1"), "shared", 0),
    ("L8sharedE2", BankId("decoder", 8, "shared"), 2, 2),
    ("encoder.L8shared_1E2", BankId("encoder", 8, "shared_1"), 2, 2),
    ("L0dense", BankId("decoder", 0, "dense"), "dense", 0),
]


@pytest.mark.parametrize("name, bank, expert, number", FORMS, ids=[form[0] for form in FORMS])
def test_names_are_read_as_they_are_printed(name, bank, expert, number):
    place = parse_place(name)
    assert place == Place(*bank, expert) and str(place) == name
    assert (place.bank, place.number) == (bank, number) and type(place.bank) is BankId
    assert place_of(bank, number, 1 if isinstance(expert, str) else 64) == place
    assert parse_target(name) == place and BankId.parse(str(bank)) == bank
    weight = Weight(place, 101, 14)
    assert str(weight) == f"{name}[101,14]" and parse_target(str(weight)) == weight


@pytest.mark.parametrize("name", ["", "1E28", "L1", "L1E", "L1E28,", "LxE1", "L1 E2", "L1sharedE2x"])
def test_other_names_are_refused(name):
    with pytest.raises(SedetectError, match="not the name of an expert"):
        parse_place(name)


@pytest.mark.parametrize(
    "kind, base", [("routed", "routed"), ("routed_vision", "routed"), ("shared_1", "shared"), ("dense", "dense")]
)
def test_what_a_bank_is(kind, base):
    one = BankId("decoder", 1, kind)
    assert (one.base, one.routed) == (base, base == "routed")
