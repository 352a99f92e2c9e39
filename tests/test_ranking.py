"""The paper's rule, the verdicts beside it, and what a reader is told."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from support.synthetic import bank, model, one_layer, write

from sedetect.errors import SedetectError
from sedetect.kernels.records import COUNTS
from sedetect.ranking.evidence import BankView
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats
from sedetect.stats.place import Place, parse_place


def names(experts) -> list[str]:
    return [str(expert) for expert in experts]


# Published tables: (super experts, values of a in descending order, (layers, first MoE layer, experts, shared?,
# population), outlier experts of the last layers). Ours: which super expert has which value, the values between the
# fifth and the tenth, those of the late outliers, and everything below the tenth. The paper prints the rest.
PUBLISHED = {
    "Qwen3-30B-A3B": (
        ["L1E68", "L2E92", "L3E82"],
        [744, 540, 430, 63.5, 19.1, 18, 17, 16, 14, 12.1],
        (48, 0, 128, False, 4608),
        ["L47E8", "L47E48", "L47E100"],
    ),
    "DeepSeek-V2-Lite": (
        ["L3E54", "L4E38"],
        [1424, 462, 112.5, 89.5, 37.5, 36, 33, 30, 27, 24],
        (27, 1, 64, True, 1235),
        ["L25E11", "L25E39"],
    ),
    "Mixtral-8x7B": (["L1E3"], [5600, 302, 286, 258, 253, 230, 200, 180, 150, 139], (32, 0, 8, False, 192), []),
    "DeepSeek-R1": (
        [
            "L8E24",
            "L8shared",
            "L12E190",
            "L13E64",
            "L14E202",
            "L14shared",
            "L22shared",
            "L33E64",
            "L33shared",
            "L35shared",
        ],
        [616, 536, 171, 143, 143, 120, 100, 90, 80, 67],
        (61, 3, 256, True, 11051),
        [],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_give_the_published_set(name):
    expected, top, (layers, first_moe, experts, shared, population), late = PUBLISHED[name]
    rng = np.random.default_rng(0)
    # Well below the tenth value, and a median that leaves R1's weakest super expert (67) its ratio.
    table = {(l, "routed"): rng.uniform(0.02, 0.09, experts) * top[9] for l in range(first_moe, layers)}
    if shared:
        table |= {(l, "shared"): rng.uniform(0.02, 0.09, 1) * top[9] for l in range(first_moe, layers)}
    table |= {(l, "dense"): np.array([50.0 * top[0]]) for l in range(first_moe)}

    def put(place: str, value: float) -> None:
        layer, expert = place.removeprefix("L").split("E") if "E" in place else (place[1:].removesuffix("shared"), "0")
        table[int(layer), "shared" if place.endswith("shared") else "routed"][int(expert)] = value

    others = [f"L{layers // 2}E{e}" for e in range(8)]
    for place, value in zip([*expected, *others], top):
        put(place, value)
    for place in late:
        put(place, 3.0 * top[0])
    ranking = rank(model({key: bank(values) for key, values in table.items()}, layers))
    assert names(ranking.super_experts) == expected
    assert {e.verdict for e in ranking.super_experts} == {"candidate"}
    assert ranking.population == population
    assert ranking.maximum == top[0] and ranking.threshold == top[0] / 10
    if late:
        assert {*late} == {str(e) for e in ranking.others if e.late}


def test_layer_condition_comes_before_percentile_and_maximum():
    quiet = [1.0] * 300
    banks = {(l, "routed"): bank([900.0, *quiet] if l == 2 else quiet) for l in range(7)}
    banks[7, "routed"] = bank([1e6] * 3 + quiet)
    ranking = rank(model(banks, 8))
    assert names(ranking.super_experts) == ["L2E0"] and ranking.maximum == 900
    assert ranking.layer_limits == {"decoder": 6} and ranking.population == 6 * 300 + 1
    assert names(ranking.others) == ["L7E0", "L7E1", "L7E2"]
    assert names(rank(model(banks, 8), layers=1.0).super_experts) == ["L7E0", "L7E1", "L7E2"]
    assert names(rank(model(banks, 8), layers=0.25).super_experts) == []  # L = {0, 1}: all equal


@pytest.mark.parametrize("n_layers, limit", [(1, 1), (2, 2), (6, 4), (27, 20), (61, 46)])
def test_layer_limit_rounds_as_the_published_tool_does(n_layers, limit):
    ranking = rank(model({(0, "routed"): bank([1.0])}, n_layers))
    assert ranking.layer_limits == {"decoder": limit}


def test_value_tests_are_strict():
    quiet = [1.0] * 1000
    assert names(one_layer([640.0, 64.0, *quiet]).super_experts) == ["L0E0"]
    above = float(np.nextafter(np.float32(64), np.float32(65)))
    assert names(one_layer([640.0, above, *quiet]).super_experts) == ["L0E0", "L0E1"]
    # The paper divides: 0.1 * 3 is another float64 than 3 / 10.
    assert one_layer([3.0, *[0.01] * 1000]).threshold == 3 / 10


@pytest.mark.parametrize("population, expected", [(201, ["L0E0"]), (202, ["L0E0", "L0E1"])])
def test_small_populations_admit_one(population, expected):
    ranking = one_layer([1000.0, 900.0] + [1.0] * (population - 2))
    assert names(ranking.super_experts) == expected
    small = [note for note in ranking.notes if "small population" in note]
    barred = [note for note in ranking.notes if "percentile alone" in note]
    assert len(small) == len(barred) == (population == 201)
    if small:
        assert "201 experts admits 1 at most" in small[0] and "L0E1 (|y| 900" in barred[0]


def test_small_population_note_follows_the_percentile():
    values = [1000.0] + [1.0] * 149
    assert any("admits 1 at most" in note for note in one_layer(values).notes)
    assert not any("small population" in note for note in one_layer(values, percentile=95).notes)


def test_tied_maxima_in_a_small_population_are_candidates_outside_the_set():
    ranking = one_layer([1000.0, 1000.0] + [1.0] * 100)
    assert ranking.super_experts == []
    assert (
        ranking.headline
        == "2 candidates: L0E0 (|y| 1000, 1000x its layer's median), L0E1 (|y| 1000, 1000x its layer's median)"
    )
    assert any("percentile alone: L0E0 (|y| 1000, 1000x its layer's median), L0E1" in note for note in ranking.notes)


def test_one_expert_is_never_above_its_own_percentile():
    ranking = one_layer([1000.0])
    assert ranking.super_experts == [] and ranking.population == 1
    assert any("admits 0 at most" in note for note in ranking.notes)


def test_unseen_experts_count_as_zero_in_the_population_but_not_in_the_median():
    ranking = one_layer([1000.0, 900.0] + [2.0] * 148 + [None] * 160)
    assert ranking.population == 310 and ranking.unseen == 160
    assert names(ranking.super_experts) == ["L0E0", "L0E1"]  # 150 alone would admit one
    assert ranking.super_experts[0].ratio == 500
    assert "160 of 310 experts saw no row" in " ".join(ranking.notes)


def test_nothing_seen():
    ranking = one_layer([None] * 8)
    assert (ranking.population, ranking.maximum, ranking.unseen, ranking.super_experts) == (8, 0.0, 8, [])
    assert ranking.headline.startswith("no candidate: none of the 8 experts saw a row")


def test_empty_statistics():
    ranking = rank(ModelStats.empty())
    assert (ranking.population, ranking.super_experts, ranking.others, ranking.notes) == (0, [], [], [])
    assert ranking.headline == "no candidate: the statistics hold no routed or shared experts"
    assert math.isnan(ranking.maximum) and ranking.to_dict()["maximum"] is None


def test_no_layer_in_l():
    ranking = rank(model({(9, "routed"): bank([1000.0] + [1.0] * 300)}, 10))
    assert ranking.population == 0 and names(ranking.others) == ["L9E0"] and ranking.others[0].late
    quiet = rank(model({(9, "routed"): bank([1.0] * 300)}, 10))
    assert "in the layers below the limit (decoder 8)" in quiet.headline


def test_nonfinite_experts_are_left_out_and_the_first_is_named():
    quiet = [1.0] * 300
    banks = {
        (1, "routed"): bank([900.0, *quiet]),
        (2, "routed"): bank([*quiet, math.inf], first={7: math.nan}),
        (2, "shared"): bank([math.nan]),
        (3, "routed"): bank([math.nan, *quiet]),
        (7, "routed"): bank([math.inf, *quiet]),
    }
    ranking = rank(model(dict(reversed(banks.items())), 8))
    assert names(ranking.nonfinite) == ["L2E7", "L2E300", "L2shared", "L3E0", "L7E0"]
    assert ranking.population == 301 + 299 + 300
    assert names(ranking.super_experts) == ["L1E0"] and ranking.maximum == 900 and ranking.others == []
    assert ranking.headline.endswith("; non-finite values from L2E7 on")
    assert any("left out, first L2E7" in note for note in ranking.notes)
    json.dumps(ranking.to_dict(), allow_nan=False)


def test_nonfinite_experts_are_left_out_of_the_median():
    (found,) = one_layer([900.0, math.nan, math.inf, math.inf, 1.0, 3.0, *[2.0] * 300]).super_experts
    assert found.ratio == 450


def test_nonfinite_values_of_an_encoder_come_before_the_decoder():
    broken = bank([1.0, math.nan])
    stats = model({("decoder", 0, "routed"): broken, ("encoder", 3, "routed"): broken}, {"decoder": 4, "encoder": 4})
    assert names(rank(stats).nonfinite) == ["encoder.L3E1", "L0E1"]


def test_nonfinite_values_born_in_a_dense_layer():
    banks = {(0, "dense"): bank([math.inf]), (1, "routed"): bank([math.nan] * 4)}
    ranking = rank(model(banks, 8))
    assert names(ranking.nonfinite) == ["L0dense", "L1E0", "L1E1", "L1E2", "L1E3"]
    assert ranking.headline.startswith("no candidate: no finite routed or shared expert")


def test_published_tool_floors_the_threshold():
    values = [645.0, 64.25] + [1.0] * 1000
    assert names(one_layer(values).super_experts) == ["L0E0"]
    floored = one_layer(values, compat="published-tool")
    assert names(floored.super_experts) == ["L0E0", "L0E1"] and floored.threshold == 64


TINY_TOP = {  # layer: {expert: largest |y|}, from the tables in models/RESULTS.md
    0: {30: 39.04, 19: 34.24, 27: 33.77},
    1: {28: 1262.11, 1: 18.5, 25: 18.4},
    2: {29: 24.87, 26: 21.68, 5: 21.38},
    3: {6: 21.66, 23: 21.18, 29: 21.15},
    4: {25: 24.94, 10: 24.90, 18: 22.05},
    5: {11: 37.13, 0: 35.80, 1: 29.11},
    6: {3: 39.87, 22: 33.96, 26: 33.95},
    7: {4: 61.49, 17: 41.63, 19: 38.17},
    8: {25: 114.40, 9: 91.04, 30: 78.74},
    9: {7: 1087.5, 3: 171.30, 31: 140.73, 29: 124.60, 24: 119.86, 12: 113.0},
}
TINY_MEDIAN = [26.31, 1262.11 / 69.2, 14.86, 12.29, 14.78, 14.21, 21.15, 23.04, 44.0, 1087.5 / 18.8]


def tiny_moe(first=True) -> ModelStats:
    """tiny-moe as measured: 10 layers of 32 experts. Those below the top of a layer are put at its median (ours)."""
    banks = {}
    for layer, top in TINY_TOP.items():
        values = [top.get(e, TINY_MEDIAN[layer]) for e in range(32)]
        bos, gates = {0: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}, {}
        if layer == 1:
            values[28], bos = 41.47, {28: 1262.11, 26: 1.0, 29: 1.0, 1: 1.0}
            gates = {28: 0.961, 26: 0.013, 29: 0.013, 1: 0.013}
        if layer == 9:
            values[7], bos = 99.46, {7: 1087.5, 5: 1.0, 4: 1.0, 8: 1.0}
            gates = {7: 0.950, 5: 0.018, 4: 0.017, 8: 0.016}
        if not first:
            values, bos = [max(v, bos.get(e, 0)) for e, v in enumerate(values)], {}
        banks[layer, "routed"] = bank(values, bos, gates)
    return model(banks, 10)


def test_tiny_moe():
    ranking = rank(tiny_moe())
    (found,) = ranking.super_experts
    assert str(found) == "L1E28" and found.verdict == "candidate" and found.signature is True
    assert found.ratio == pytest.approx(69.2, rel=1e-3) and found.next_ratio == pytest.approx(1262.11 / 61.49)
    assert found.first_gate == pytest.approx(0.961) and found.first_ratio == pytest.approx(1262.11)
    assert found.rest_gate == pytest.approx(20 / (32 * 100 / 4))
    assert (found.first_max, found.rest_max) == pytest.approx((1262.11, 41.47))
    (late,) = ranking.others
    assert str(late) == "L9E7" and late.verdict == "candidate" and late.signature is True and late.late
    assert late.ratio == pytest.approx(18.8, rel=1e-3) and late.next_ratio == pytest.approx(1087.5 / 171.3)
    assert ranking.headline == (
        "2 candidates: L1E28 (|y| 1262, 69.2x its layer's median), L9E7 (|y| 1088, 18.8x its layer's median)"
    )
    assert ranking.population == 256 and not any("small" in note for note in ranking.notes)


def test_signature_not_observed_is_not_absent():
    ranking = rank(tiny_moe(first=False))
    (found,) = ranking.super_experts
    assert (str(found), found.signature, found.verdict, found.first_gate) == ("L1E28", None, "candidate", None)
    assert found.rest_gate is not None
    assert any("not observed for 1 of 1" in note for note in ranking.notes)


@pytest.mark.parametrize(
    "rest, first, gates, signature",
    [
        (5.0, {0: 900.0, 1: 1.0}, {0: 0.9}, True),
        (900.0, {0: 5.0, 1: 0.1}, {0: 0.9}, False),  # large, but not on first tokens
        (900.0, {1: 1.0}, {}, False),  # saw none of the first tokens
        (5.0, {0: 900.0, 1: 90.1}, {}, False),  # beside it, the others are as large there
        (900.0, {0: 900.0}, {}, None),  # nobody beside it
        (900.0, {}, {}, None),
    ],
)
def test_signature(rest, first, gates, signature):
    state = bank([rest] + [1.0] * 300, first, gates)
    (found,) = [e for e in rank(model({(0, "routed"): state}, 1)).super_experts if str(e) == "L0E0"]
    assert (found.signature, found.verdict) == (signature, "candidate")  # which it is by its value, too


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_a_candidate_by_first_tokens_does_not_depend_on_the_amount_of_text(scale):
    """What other experts reach elsewhere grows with text, until the value is no multiple of the median to speak of."""
    state = bank([5.0] + [4.0 * scale] * 300, {0: 129.0, 1: 1.0})
    ranking = rank(model({(0, "routed"): state, (2, "routed"): bank([440.0] + [10.0 * scale] * 300)}, 4))
    found = {str(e): e for e in ranking.judged}["L0E0"]
    assert (found.signature, found.verdict) == (True, "candidate")
    assert (found.ratio >= 10) == (scale == 1)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 8])
def test_first_ratio_is_to_the_median_of_the_others(experts):
    """Of those that saw first tokens, and no NaN; there are equal values among them."""
    for values in np.random.default_rng(experts).integers(1, 4, (40, experts)) / 3:
        seen = {e: math.nan if e == 2 else float(value) for e, value in enumerate(values) if e != 1}
        stats = model({(0, "routed"): bank([9.0] * experts, seen)}, 1)
        ((identity, state),) = stats.banks.items()
        view = BankView(identity, state, stats.header, "all")
        for e, value in seen.items():
            others = [x for other, x in seen.items() if other != e and not math.isnan(x)]
            expected = value / float(np.median(np.float32(others))) if others else None
            assert view.signature(e, view, 50.0)[0] == pytest.approx(expected, nan_ok=True), (values, e)


def test_signature_needs_no_other_tokens():
    first = {e: 900.0 if e == 0 else 1.0 for e in range(300)}
    (found,) = rank(model({(0, "routed"): bank([None] * 300, first)}, 1)).super_experts
    assert found.signature is True and found.rest_gate is None and found.first_gate == pytest.approx(4 * 0.25 / 300)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_featureless_population_yields_no_candidate(scale):
    values = np.abs(np.random.default_rng(0).normal(size=(36, 128))) * scale
    ranking = rank(model({(l, "routed"): bank(row) for l, row in enumerate(values)}, 48))
    assert len(ranking.super_experts) == 24
    assert {e.verdict for e in ranking.super_experts} == {None} and ranking.found == []
    assert ranking.headline.startswith(
        "no candidate: the rule names 24 of 4608 because it always names at least one expert"
    )


def test_absolute_and_ratio_thresholds_each_decide():
    values = [900.0] + [10.0] * 300
    assert one_layer(values).super_experts[0].verdict == "candidate"
    assert one_layer(values, min_value=900.1).super_experts[0].verdict is None
    assert one_layer(values, min_ratio=90.1).super_experts[0].verdict is None
    assert one_layer(values, min_value=900, min_ratio=90).super_experts[0].verdict == "candidate"


def test_late_expert_that_does_not_stand_out_is_not_shown():
    banks = {(0, "routed"): bank([1.0] * 300), (3, "routed"): bank([40.0] + [1.0] * 300)}
    assert rank(model(banks, 4)).others == []
    (late,) = rank(model(banks, 4), min_value=40).others
    assert (str(late), late.verdict, late.late) == ("L3E0", "candidate", True)


def test_shared_experts_are_in_the_population_and_dense_mlps_are_not():
    quiet = [2.0] * 300
    banks = {
        (0, "dense"): bank([1e6], first={0: 1e6}),
        (1, "routed"): bank(quiet, {0: 1.0}),
        (1, "shared"): bank([3.0], first={0: 500.0}),
        (2, "routed"): bank(quiet, {0: 1.0}),
        (2, "shared"): bank([3.0], first={0: 1.0}),
        (2, "shared_1"): bank([400.0], first={0: 1.0}),
    }
    ranking = rank(model(banks, 4))
    shared, parallel = ranking.super_experts
    assert ranking.population == 603 and ranking.maximum == 500
    assert (str(shared), shared.expert, shared.ratio) == ("L1shared", "shared", 250)
    assert (shared.signature, shared.verdict, shared.first_gate, shared.rest_gate) == (True, "candidate", None, None)
    assert (str(parallel), parallel.expert, parallel.ratio) == ("L2shared_1", "shared", 200)
    assert (parallel.signature, parallel.verdict) == (False, "candidate")


def test_shared_expert_without_routed_peers_has_no_verdict():
    banks = {(0, "routed"): bank([1.0] * 300), (1, "shared"): bank([900.0])}
    (found,) = rank(model(banks, 4)).super_experts
    assert (str(found), found.ratio, found.verdict) == ("L1shared", None, None)


def test_names_of_suffixed_kinds_and_stacks():
    banks = {
        ("decoder", 1, "routed"): bank([1.0] * 300),
        ("decoder", 1, "routed_vision"): bank([900.0] + [1.0] * 300),
        ("decoder", 2, "routed"): bank([1.0] * 300),
        ("decoder", 2, "shared"): bank([1.0, 1.0, 800.0]),
        ("encoder", 5, "routed"): bank([700.0] + [1.0] * 300),
        ("encoder", 6, "routed"): bank([600.0] + [1.0] * 300),
    }
    ranking = rank(model(banks, {"decoder": 4, "encoder": 8}))
    assert names(ranking.super_experts) == ["L1E0_vision", "L2sharedE2", "encoder.L5E0"]
    assert [e.expert for e in ranking.super_experts] == [0, 2, 0]
    assert ranking.layer_limits == {"decoder": 3, "encoder": 6}
    assert names(ranking.others) == ["encoder.L6E0"]
    assert any("one population of all stacks" in note for note in ranking.notes)


def test_others_are_judged_within_their_stack():
    banks = {
        ("decoder", 3, "routed"): bank([100.0] + [1.0] * 300),
        ("encoder", 3, "routed"): bank([5000.0] + [1.0] * 300),
    }
    others = rank(model(banks, {"decoder": 4, "encoder": 4})).others
    assert [(str(e), e.value, e.next_ratio, e.verdict) for e in others] == [
        ("encoder.L3E0", 5000, 5000, "candidate"),
        ("L3E0", 100, 100, "candidate"),
    ]


def test_evidence_is_of_the_record_behind_the_maximum():
    state = bank([1.0] * 300, {0: 5.0})
    where = {"source": 1, "sequence": 12, "position": 77, "token_id": 4095}
    write(state.outliers, 3, value=700.0, sign=1, channel=940, gate=0.75, **where)
    stats = model({(0, "routed"): state}, 1)
    stats.header.sources = {"a": None, "b": None}
    (found,) = rank(stats).super_experts
    assert (found.value, found.sign, found.channel, found.gate) == (700.0, -1, 940, 0.75)
    assert (found.source, found.sequence_id, found.position, found.token_id) == ("b", 12, 77, 4095)
    write(state.first_outliers, 3, value=701.0, channel=2, sequence=-1, position=-1, token_id=-1)
    (found,) = rank(model({(0, "routed"): state}, 1)).super_experts
    assert (found.value, found.sign, found.channel) == (701.0, 1, 2)
    assert (found.source, found.sequence_id, found.position, found.token_id) == (None, -1, -1, -1)


def test_places_of_a_ranking():
    banks = {(0, "routed"): bank([1.0] * 250), (0, "shared"): bank([900.0]), (1, "routed"): bank([1.0] * 250)}
    banks[1, "routed"].outliers[7] = banks[0, "shared"].outliers[0]
    ranking = rank(model(banks, 4), percentile=99)
    found = {str(expert): expert for expert in ranking.super_experts}
    assert found.keys() == {"L0shared", "L1E7"}
    for name, expert in found.items():
        assert expert.place == parse_place(name) != expert and type(expert.place) is Place
        assert (expert.bank, expert.number) == (expert.place.bank, expert.place.number)


def test_what_is_found_and_judged():
    banks = {(layer, "routed"): bank([1.0] * 300) for layer in range(8)}
    for layer, value in ((0, 900.0), (1, 800.0), (7, 850.0)):
        banks[layer, "routed"] = bank([value] + [1.0] * 299)
    ranking = rank(model(banks, 8))
    assert names(ranking.super_experts) == ["L0E0", "L1E0"] and names(ranking.found) == ["L0E0", "L7E0", "L1E0"]
    assert names(ranking.judged) == ["L0E0", "L1E0", "L7E0"] and ranking.others == ranking.judged[2:]
    first, second = ranking.super_experts
    refuted = replace(ranking, super_experts=[replace(first, verdict="refuted"), second], others=[])
    assert refuted.found == [second] and refuted.proved == []
    proved = replace(ranking, super_experts=[replace(first, verdict="proved"), second])
    assert names(proved.proved) == ["L0E0"] and len(proved.found) == 3
    nothing = one_layer([1.0] * 300)
    assert nothing.found == [] and all(expert.verdict is None for expert in nothing.super_experts)


def test_order_of_banks_does_not_matter():
    stats = tiny_moe()
    backwards = ModelStats(dict(reversed(stats.banks.items())), stats.header)
    assert rank(stats) == rank(backwards)


def test_set_is_sorted_by_value_and_ties_by_place():
    banks = {(l, "routed"): bank([value] + [1.0] * 300) for l, value in enumerate((500.0, 900.0, 500.0))}
    assert names(rank(model(banks, 4)).super_experts) == ["L1E0", "L0E0", "L2E0"]
    assert [e.next_ratio for e in rank(model(banks, 4)).super_experts] == [1.8, 1.0, 1.0]


def test_to_dict_is_json_and_keeps_everything():
    stats = model({(0, "routed"): bank([900.0] + [0.0] * 300)}, 1)
    ranking = rank(stats, min_ratio=5)
    document = json.loads(json.dumps(ranking.to_dict(), allow_nan=False))
    assert (document["format"], document["version"]) == ("sedetect-ranking", "1")
    assert document["criteria"]["min_ratio"] == 5 and document["population"] == 301
    (found,) = document["super_experts"]
    assert ranking.super_experts[0].ratio == math.inf and found["ratio"] == "inf"
    assert (found["name"], found["layer"], found["expert"], found["value"]) == ("L0E0", 0, 0, 900.0)
    assert found["signature"] is None and found["verdict"] == "candidate"


@pytest.mark.parametrize(
    "argument, value",
    [
        ("criterion", "reap"),
        ("compat", "published"),
        ("percentile", 100),
        ("percentile", -1),
        ("percentile", "99.5"),
        ("fraction", 0),
        ("fraction", 1.5),
        ("fraction", math.nan),
        ("layers", 0),
        ("layers", 1.01),
        ("layers", True),
        ("min_value", -1.0),
        ("min_ratio", math.inf),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(argument, value):
    with pytest.raises(SedetectError) as error:
        rank(tiny_moe(), **{argument: value})
    message = str(error.value)
    assert message.startswith(f"{argument} {value!r} ") and "\n" not in message and ";" in message


def test_compat_asks_for_the_papers_fraction():
    with pytest.raises(SedetectError, match="fraction 0.07 does not go with compat 'published-tool'"):
        rank(tiny_moe(), compat="published-tool", fraction=0.07)


def test_incomplete_headers_are_refused():
    with pytest.raises(SedetectError, match="stack 'decoder': .* number of layers"):
        rank(model({(0, "routed"): bank([1.0])}, {}))
    stats = tiny_moe()
    del stats.header.banks["decoder.1.routed"]
    with pytest.raises(SedetectError, match="decoder.1.routed: .* top_k"):
        rank(stats)


def test_medians_of_few_rows_are_noted():
    stats = model({(0, "routed"): bank([900.0] + [10.0] * 300)}, 1)
    assert not any("saw fewer than" in note for note in rank(stats).notes)
    stats.banks[min(stats.banks)].counts[:, COUNTS.index("rows")] = 5
    assert any("beside L0E0 saw fewer than 32 rows" in note for note in rank(stats).notes)
    assert rank(stats).super_experts[0].ratio == 90  # the number itself stays


def test_numbers_of_notes_agree_with_their_verbs():
    stats = model({(0, "routed"): bank([900.0] + [10.0] * 300 + [None])}, 1)
    assert any("1 of 302 experts saw no row and counts as 0" in note for note in rank(stats).notes)
    stats = model({(0, "routed"): bank([900.0, math.nan] + [10.0] * 300)}, 1)
    assert any(note == "L0E1 gave NaN or Inf and is left out" for note in rank(stats).notes)
