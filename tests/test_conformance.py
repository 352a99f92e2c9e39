"""Every MoE architecture of the installed transformers, by the checks of conformance.py."""

import pytest
from conformance import available, check
from families import FAMILIES, discover, tiny_model


@pytest.mark.parametrize("name", available())
def test_family(name):
    check(name)


def test_every_class_behind_the_interface_is_in_a_model_that_is_checked():
    """A class that a release adds fails here until its family has an entry, if only one that says why it is refused."""
    for name, classes in discover().items():
        families = [(key, family) for key, family in FAMILIES.items() if key.partition(":")[0] == name]
        inside = {type(module).__name__ for key, family in families for module in tiny_model(key, family).modules()}
        assert set(classes) <= inside, f"{name}: add {sorted(set(classes) - inside)} to FAMILIES"
