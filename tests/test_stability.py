"""Rounds, the grid of thresholds, and agreement over parts of the text."""

import json
import math
import shutil

import pytest
import torch
from support.command import run
from support.models import TINY
from support.synthetic import bank, model, one_layer

import sedetect
from sedetect.calibration.texts import load_texts
from sedetect.errors import SedetectError
from sedetect.profiling.pipeline import ROUND_WINDOWS, _stable_after
from sedetect.ranking.stability import agreement, peak_of, sensitivity
from sedetect.stats.model import ModelStats, merge_all
from sedetect.stats.note import Note
from sedetect.stats.place import Place

DOMAINS = ["english", "chinese", "mathematics", "code"]


@pytest.fixture(scope="module")
def in_rounds():
    return sedetect.profile_model(
        TINY,
        text=sedetect.Text(tokens=2048, seq_len=64),
        keep_rounds=True,
        measuring=sedetect.Measuring(channels=True, first_rows=True),
    )


def test_rounds_are_the_plain_run_bit_for_bit(in_rounds):
    plain = sedetect.profile_model(
        TINY,
        text=sedetect.Text(tokens=2048, seq_len=64, batch_size=ROUND_WINDOWS),
        measuring=sedetect.Measuring(channels=True, first_rows=True),
    )
    assert in_rounds.stats.header.to_json() == plain.stats.header.to_json()
    for result, other in ((in_rounds.stats, plain.stats), *zip(in_rounds.domains.values(), plain.domains.values())):
        assert result.banks.keys() == other.banks.keys()
        for bank_id, state in result.banks.items():
            assert state.equal(other.banks[bank_id]), bank_id
    assert not plain.rounds and plain.stable_after is None and not plain.shards


def test_shards_are_disjoint_and_merge_to_the_whole(in_rounds):
    per_round = ROUND_WINDOWS * 64 * 4
    assert [shard.header.tokens for shard in in_rounds.shards] == [per_round] * 4
    assert [tokens for tokens, _ in in_rounds.rounds] == [per_round * i for i in range(1, 5)]
    merged = merge_all(reversed(in_rounds.shards))
    assert all(state.equal(in_rounds.stats.banks[bank_id]) for bank_id, state in merged.banks.items())
    agreed = agreement({str(i): shard for i, shard in enumerate(in_rounds.shards)})
    assert agreed.same and agreed.found == (("L1E28", "L9E7"),) * 4 and agreed.mean_jaccard == 1
    assert agreed.experts[0].name == "L1E28" and agreed.experts[0].found == 4
    assert agreed.experts[0].highest == pytest.approx(1256, rel=0.01)


def test_until_stable_stops_early():
    seen = []
    result = sedetect.profile_model(
        TINY,
        text=sedetect.Text(tokens=10**6, seq_len=64),
        until_stable=2,
        progress=lambda domain, done, total: seen.append(domain),
    )
    assert seen == DOMAINS * 3, "batches of one domain each, round by round"
    per_round = ROUND_WINDOWS * 64 * 4
    assert result.rounds == [(per_round * i, ("L1E28", "L9E7")) for i in (1, 2, 3)]
    assert result.stable_after == per_round and result.stats.header.tokens == 3 * per_round
    assert not result.interrupted and not result.shards
    assert result.stats.header.notes == [
        Note("stopped_early", "stopped early: the candidates stayed the same for 2 rounds", count=2)
    ]
    assert [source.ranges for source in result.stats.header.sources.values()] == [[[0, 3 * ROUND_WINDOWS]]] * 4


def test_a_budget_that_ends_first_is_not_stable():
    result = sedetect.profile_model(TINY, text=sedetect.Text(tokens=1024, seq_len=64, batch_size=1), until_stable=9)
    assert [tokens for tokens, _ in result.rounds] == [256, 512, 768, 1024]
    assert result.stable_after is None and not result.stats.header.notes
    with pytest.raises(SedetectError, match="until_stable 0: must be at least 1"):
        sedetect.profile_model(TINY, until_stable=0)
    with pytest.raises(SedetectError, match="batch_size 0: must be at least 1"):
        sedetect.profile_model(TINY, until_stable=1, text=sedetect.Text(batch_size=0))


def test_domains_of_different_length_and_stopping():
    texts = load_texts(None)
    texts = {"long": [texts["english"][0][:4000]], "short": [texts["code"][0][:600]]}
    result = sedetect.profile_model(TINY, texts, text=sedetect.Text(tokens=10**5, seq_len=64), keep_rounds=True)
    tokens = [shard.header.tokens for shard in result.shards]
    assert tokens[0] == 2 * ROUND_WINDOWS * 64 and len(result.shards[-1].header.sources) == 1
    assert sum(tokens) == result.stats.header.tokens == result.rounds[-1][0]
    asked = iter([False] * 3 + [True])
    result = sedetect.profile_model(
        TINY, texts, text=sedetect.Text(seq_len=64), until_stable=5, stop=lambda: next(asked)
    )
    assert result.interrupted and len(result.rounds) == 1 and result.stats.header.tokens == 3 * ROUND_WINDOWS * 64
    assert result.stable_after is None


@pytest.mark.parametrize(
    ("sets", "unchanged", "expected"),
    [
        ("a", 1, None),
        ("aa", 1, 1),
        ("aa", 2, None),
        ("abb", 1, 2),
        ("aba", 1, None),
        ("abaaa", 2, 3),
        ("-aa", 1, 2),
        ("--", 1, 1),  # that there is none can be stable, too
    ],
)
def test_stable_after(sets, unchanged, expected):
    rounds = [(i, () if name == "-" else (name,)) for i, name in enumerate(sets, start=1)]
    assert _stable_after(rounds, unchanged) == expected


def test_the_order_of_equal_sets_does_not_matter():
    assert _stable_after([(1, ("a", "b")), (2, ("b", "a"))], 1) == 1


def layer(*large):
    """1000 experts of one layer at 1 to 2, with these in front."""
    return bank([*large, *torch.linspace(1, 2, 1000 - len(large)).tolist()])


def test_sensitivity_is_rank_at_each_pair():
    # At 0.1 of 1000, 95 is out; P99.5 admits 5 of 1000, P99.9 one.
    stats = model({(0, "routed"): layer(1000, 500, 95, 75)}, 1)
    grid = sensitivity(stats)
    assert [cell.percentile for cell in grid.cells[::4]] == [95, 99, 99.5, 99.9]
    for percentile, named in ((99.5, [4, 3, 3, 2]), (99.9, [1] * 4)):
        assert [len(cell.named) for cell in grid.row(percentile)] == named
        # who stands out is a candidate beside the set as well
        assert {cell.fraction: len(cell.found) for cell in grid.row(percentile)} == {0.07: 4, 0.08: 3, 0.09: 3, 0.1: 2}
    for cell in grid.cells:
        ranking = sedetect.rank(stats, percentile=cell.percentile, fraction=cell.fraction)
        assert cell.named == tuple(str(e) for e in ranking.super_experts)
    assert not grid.constant and not grid.rule_constant
    document = json.loads(json.dumps(grid.to_dict(), allow_nan=False))
    assert not document["constant"] and len(document["cells"]) == 16
    alone = sensitivity(stats, percentiles=[99.9], fractions=[0.1, 0.2])
    assert alone.constant and len(alone.cells) == 2
    with pytest.raises(SedetectError, match="percentile 100 is out of range"):
        sensitivity(stats, percentiles=[100])


def test_the_grid_separates_the_rule_from_the_verdict():
    """An expert without any sign that loose thresholds let in changes the rule's set, not the candidates."""
    grid = sensitivity(model({(0, "routed"): bank([500.0, 40.0, *[20.0] * 998])}, 1))
    assert grid.constant and not grid.rule_constant
    assert grid.row(99)[0].named == ("L0E0", "L0E1") and grid.row(99)[0].found == ("L0E0",)
    none = sensitivity(model({(0, "routed"): bank([1.0] * 10)}, 1))
    assert none.constant and none.cells[0].found == ()


def test_agreement_of_parts_that_differ():
    parts = {
        "a": model({(0, "routed"): layer(1000, 500)}, 1),
        "b": model({(0, "routed"): layer(800, 1.5)}, 1),
        "c": model({(0, "routed"): layer(1.5, 600)}, 1),
    }
    agreed = agreement(parts)
    assert agreed.found == (("L0E0", "L0E1"), ("L0E0",), ("L0E1",)) and not agreed.same
    assert agreed.jaccard == {("a", "b"): 0.5, ("a", "c"): 0.5, ("b", "c"): 0.0}
    assert agreed.mean_jaccard == pytest.approx(1 / 3)
    first, second = agreed.experts
    assert (first.name, first.named, first.found, first.values) == ("L0E0", 2, 2, (1000, 800, 1.5))
    assert (second.name, second.lowest, second.highest) == ("L0E1", 1.5, 600)
    document = json.loads(json.dumps(agreed.to_dict(), allow_nan=False))
    assert document["parts"][1] == {"name": "b", "tokens": 0, "found": ["L0E0"]}
    assert document["jaccard"][2] == {"parts": ["b", "c"], "jaccard": 0.0}


def test_agreement_with_nan_and_nothing():
    none = {name: model({(0, "routed"): bank([1.0] * 10)}, 1) for name in "ab"}
    agreed = agreement(none)
    assert agreed.same and agreed.mean_jaccard == 1 and not any(agreed.found)
    broken = model({(0, "routed"): layer(math.nan, 900)}, 1)
    agreed = agreement({"a": model({(0, "routed"): layer(1000, 1.5)}, 1), "b": broken})
    assert {e.name: (e.lowest, e.highest) for e in agreed.experts}["L0E0"] == (1000, 1000)
    json.dumps(agreed.to_dict(), allow_nan=False)
    with pytest.raises(SedetectError, match="no statistics to compare"):
        agreement({})
    other = model({(0, "routed"): bank([1.0] * 11)}, 1)
    with pytest.raises(SedetectError, match="bank decoder.0.routed: a has 10 experts, x has 11 experts"):
        agreement(none | {"x": other})


def test_peak_of():
    stats = model({(0, "routed"): bank([3.0, None], first={0: 7.0}), (0, "shared"): bank([5.0])}, 1)
    assert peak_of(stats, Place("decoder", 0, "routed", 0)) == (7.0, 0)
    unseen = peak_of(stats, Place("decoder", 0, "routed", 1))
    assert math.isnan(unseen.value) and unseen.channel is None
    assert peak_of(stats, Place("decoder", 0, "shared", "shared")).value == 5.0
    assert one_layer([3.0]).super_experts == []


# command line


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("stability") / "tiny"
    return run("profile", TINY, "-o", out, "--tokens", 8192, "--seq-len", 64, "--until-stable", 2), out


def test_profile_says_how_many_tokens_were_needed(profiled):
    code, out, err = profiled[0]
    assert code == 0 and err == ""
    assert "stable: L1E28, L9E7 from 512 tokens on, 1,536 in all (3 rounds)\n" in out
    assert "note: stopped early: the candidates stayed the same for 2 rounds\n" in out
    code, out, _ = run("profile", TINY, "--tokens", 256, "--seq-len", 64, "--until-stable", 2)
    assert code == 0 and "not stable: L1E28, L9E7 after 256 tokens (1 round); give more --tokens\n" in out
    assert run("profile", TINY, "--until-stable", 0).code == 2


def test_stability_of_a_folder(profiled, tmp_path):
    folder = profiled[1]
    code, out, err = run("stability", folder, "--json", tmp_path / "s.json")
    assert code == 0 and err == ""
    assert out.startswith("tiny: the candidates are the same under all 16 pairs of thresholds: L1E28, L9E7\n")
    assert "the same candidates in each of 4 domains alone: L1E28, L9E7\n" in out
    assert "the same candidates in each of 3 rounds alone: L1E28, L9E7\n" in out
    assert max(map(len, out.splitlines())) <= 80
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["grids"]["tiny"]["constant"] and document["agreement"]["domains"]["same"]
    assert sorted(part["name"] for part in document["agreement"]["domains"]["parts"]) == sorted(DOMAINS)
    rounds = [ModelStats.load(folder / "rounds" / f"{n:03}.safetensors") for n in range(3)]
    assert [part["tokens"] for part in document["agreement"]["rounds"]["parts"]] == [512] * 3
    whole, merged = ModelStats.load(folder), merge_all(rounds)
    assert all(state.equal(whole.banks[bank]) for bank, state in merged.banks.items())
    again = shutil.copytree(folder, tmp_path / "again")
    run("profile", TINY, "-o", again, "--tokens", 256, "--seq-len", 64)
    assert list((again / "rounds").iterdir()) == []  # of a run that is gone


def test_stability_of_files(profiled, tmp_path):
    folder = profiled[1]
    code, out, _ = run("stability", folder / "stats.safetensors")
    assert code == 0 and "agreement: needs at least two parts" in out
    code, out, _ = run("stability", *(folder / "domains" / f"{domain}.safetensors" for domain in ("english", "code")))
    assert code == 0 and out.count("pairs of thresholds") == 2
    assert "the same candidates in each of 2 runs alone: L1E28, L9E7\n" in out
    model({(0, "routed"): layer(1000, 500, 95)}, 1).save(tmp_path / "a.safetensors")
    model({(0, "routed"): layer(1000, 1.5, 95)}, 1).save(tmp_path / "b.safetensors")
    code, out, _ = run("stability", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 0 and "a: the candidates depend on the thresholds" in out
    assert "the candidates differ over 2 runs, mean Jaccard 0.50\n  a: L0E0, L0E1\n  b: L0E0\n" in out
    assert run("stability", tmp_path / "missing").code == 2
