"""compare: sets, rank correlation, magnitudes, and the exit code that can gate a release."""

import json
import math
import random

import numpy as np
import pytest
import torch
from support.command import run
from support.models import TINY
from support.synthetic import bank, model

import sedetect
from sedetect.errors import SedetectError
from sedetect.ranking.comparison import compare, spearman


def layer(*large, channel=None):
    """100 experts of one layer at 1 to 2, with these in front."""
    state = bank([*large, *torch.linspace(1, 2, 100 - len(large)).tolist()])
    for e, c in enumerate(channel or ()):
        state.outliers[e, 0, 2] = c
    return state


def series(*layers):
    return [model({(0, "routed"): state}, 1) for state in layers]


def names(runs):
    return [str(i) for i in range(len(runs))]


def test_sets_and_what_joined_and_left():
    # 100 experts: P99.5 admits one.
    runs = series(layer(1000), layer(1.5, 900), layer(1.5, 900))
    found = compare(runs, names(runs))
    assert [run.found for run in found.runs] == [("L0E0",), ("L0E1",), ("L0E1",)]
    assert (found.steps[0].joined, found.steps[0].left) == (("L0E1",), ("L0E0",))
    assert (found.steps[1].joined, found.steps[1].left) == ((), ())
    assert not found.equal and found.formed == 1
    assert compare(runs[1:], ["a", "b"]).equal and compare(runs[1:], ["a", "b"]).formed is None


@pytest.mark.parametrize(
    ("found", "formed"), [("aaa", 0), ("abb", 1), ("aba", 2), ("--a", 2), ("a--", 1), ("---", 0), ("-aaab", 4)]
)
def test_when_the_set_formed(found, formed):
    kinds = {"a": layer(1000), "b": layer(1.5, 1000), "-": layer()}
    runs = series(*(kinds[name] for name in found))
    comparison = compare(runs, names(runs))
    assert comparison.formed == formed and comparison.equal == (len(set(found)) == 1)


def test_moved_magnitudes_and_channels():
    runs = series(layer(1000, channel=[7]), layer(1500, channel=[7]), layer(500, channel=[9]))
    (moved,) = [m for m in compare(runs, names(runs)).moved if m.name == "L0E0"]
    assert moved.values == (1000, 1500, 500) and moved.ratio == 0.5
    assert moved.channels == (7, 7, 9) and moved.channel_changed
    (moved,) = [m for m in compare(runs[:2], ["a", "b"]).moved if m.name == "L0E0"]
    assert moved.ratio == 1.5 and not moved.channel_changed and moved.found == (True, True)


def test_an_expert_that_a_run_did_not_see():
    runs = series(bank([None, *[1.0] * 99]), bank([1000.0, *[1.0] * 99]))
    comparison = compare(runs, ["before", "after"])
    (moved,) = [m for m in comparison.moved if m.name == "L0E0"]
    assert math.isnan(moved.values[0]) and moved.values[1] == 1000
    assert moved.ratio is None and moved.channels == (None, 0)
    assert comparison.steps[0].experts == 99 and comparison.steps[0].correlation is None, "all the same"
    broken = series(bank([math.nan, *[1.0] * 99]), bank([1000.0, *[1.0] * 99]))
    json.dumps(compare(broken, ["a", "b"]).to_dict(), allow_nan=False)


def test_spearman_on_known_values():
    # IQ and hours of television, the textbook example: rho = -29/165.
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], float)
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17], float)
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert spearman(iq, np.exp(iq / 50)) == pytest.approx(1)
    assert spearman(iq, -iq) == pytest.approx(-1)
    assert spearman(iq[:1], iq[:1]) is None and spearman(iq, np.ones(10)) is None


def test_spearman_with_ties():
    """Against ranks by definition: the mean of the places equal values occupy."""
    generator = random.Random(0)
    for size in (2, 5, 40):
        a = [generator.randint(0, size // 2) for _ in range(size)]
        b = [generator.randint(0, size // 2) for _ in range(size)]

        def ranks(values):
            return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

        expected = np.corrcoef(ranks(a), ranks(b))[0, 1] if len(set(a)) > 1 and len(set(b)) > 1 else None
        assert spearman(np.array(a, float), np.array(b, float)) == (
            None if expected is None else pytest.approx(expected)
        )


def test_correlation_is_over_routed_and_shared_experts():
    one = model({(0, "routed"): bank([1.0, 2.0, 3.0]), (0, "shared"): bank([9.0]), (1, "dense"): bank([5.0])}, 2)
    two = model({(0, "routed"): bank([1.0, 3.0, 2.0]), (0, "shared"): bank([9.0]), (1, "dense"): bank([0.1])}, 2)
    (step,) = compare([one, two]).steps
    assert step.experts == 4 and step.correlation == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_models_that_do_not_match_are_named():
    runs = [*series(layer(1000)), model({(0, "routed"): layer(1000), (1, "routed"): layer(9)}, 2)]
    with pytest.raises(SedetectError, match="bank decoder.1.routed: small has no such bank, big has 100 experts"):
        compare(runs, ["small", "big"])
    with pytest.raises(SedetectError, match="1 runs and 1 names; give two or more"):
        compare(runs[:1])
    with pytest.raises(SedetectError, match="2 runs and 1 names"):
        compare(runs, ["one"])


def test_precisions_of_tiny_moe():
    """Another digest and dtype are what compare is for; merge refuses them."""
    runs = [
        sedetect.profile_model(TINY, text=sedetect.Text(tokens=2048), loading=sedetect.Loading(dtype=dtype)).stats
        for dtype in ("float32", "bfloat16")
    ]
    comparison = compare(runs, ["float32", "bfloat16"])
    assert comparison.equal and [run.found for run in comparison.runs] == [("L1E28", "L9E7")] * 2
    assert [run.dtype for run in comparison.runs] == ["float32", "bfloat16"]
    (step,) = comparison.steps
    assert step.correlation > 0.99 and step.experts == 320
    assert [(moved.name, moved.channels) for moved in comparison.moved] == [("L1E28", (101, 101)), ("L9E7", (159, 159))]
    assert all(moved.ratio == pytest.approx(1, abs=0.01) for moved in comparison.moved)


# command line


@pytest.fixture
def files(tmp_path):
    """Three profiles: one and two agree, three differs."""
    for name, state in (("one", layer(1000)), ("two", layer(900)), ("three", layer(1.5, 900))):
        model({(0, "routed"): state}, 1).save(tmp_path / name / "stats.safetensors")
    return [tmp_path / name for name in ("one", "two", "three")]


def test_exit_codes(files, tmp_path):
    code, out, err = run("compare", files[0], files[1], "--json", tmp_path / "c.json")
    assert code == 0 and err == "" and out.startswith("the same candidates in all 2 runs: L0E0\n")
    assert json.loads((tmp_path / "c.json").read_text())["equal"] is True
    code, out, err = run("compare", *files, "--json", tmp_path / "c.json")
    assert code == 1 and err == ""
    assert out.startswith("the candidates differ; those of the last run (L0E1) stand from three (run 3 of 3) on\n")
    assert "+L0E1, -L0E0" in out and max(map(len, out.splitlines()[1:])) <= 80
    document = json.loads((tmp_path / "c.json").read_text())
    assert not document["equal"] and document["formed"] == 2 and document["moved"][0]["name"] == "L0E0"
    code, out, err = run("compare", files[0])
    assert code == 2 and out == "" and "nothing to compare a single run with" in err
    assert run("compare", files[0], tmp_path / "missing").code == 2
    model({(0, "routed"): bank([1.0] * 5)}, 1).save(tmp_path / "small.safetensors")
    code, out, err = run("compare", files[0], tmp_path / "small.safetensors")
    assert code == 2 and out == ""
    assert "bank decoder.0.routed: one has 100 experts, small has 5 experts; unrelated models, or one pruned" in err


def test_runs_of_one_name_are_told_apart(files):
    code, out, _ = run("compare", files[0], files[0] / "stats.safetensors", files[0])
    assert code == 0 and "the same candidates in all 3 runs: L0E0\n" in out


def test_no_candidate_in_any_run(tmp_path):
    for name in "ab":
        model({(0, "routed"): layer()}, 1).save(tmp_path / f"{name}.safetensors")
    code, out, _ = run("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 0 and out.startswith("no candidate in any of 2 runs\n")
