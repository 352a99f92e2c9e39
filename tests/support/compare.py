"""When two results are the same."""

import sedetect
from sedetect import ModelStats


def assert_same(a: ModelStats, b: ModelStats) -> None:
    """Bit for bit, sums and header included."""
    assert a.header.to_json() == b.header.to_json()
    assert a.banks.keys() == b.banks.keys()
    for bank, state in a.banks.items():
        assert state.equal(b.banks[bank], sums_rtol=0), bank


def assert_same_profile(one: sedetect.ModelProfile, other: sedetect.ModelProfile) -> None:
    """Every domain, and the whole."""
    assert_same(one.stats, other.stats)
    assert one.domains.keys() == other.domains.keys()
    for domain, stats in one.domains.items():
        assert_same(stats, other.domains[domain])


def assert_equal(one: ModelStats, other: ModelStats) -> None:
    """Sums within their rounding, everything else bit for bit, in one order of the banks."""
    assert list(one.banks) == list(other.banks)
    for bank, state in one.banks.items():
        assert state.equal(other.banks[bank]), bank
    assert one.header.to_json() == other.header.to_json()


def assert_logits_close(logits, reference, rtol):
    scale = reference.double().square().mean().sqrt()
    error = (logits.double() - reference.double()).abs().max() / scale
    assert error <= rtol, f"worst logit off by {error:.2e} of their RMS"
