"""Ablation beside its controls, on the checkpoint whose super expert is known."""

import json
import sys
from dataclasses import replace

import pytest
from support.models import TINY

import sedetect
from sedetect.calibration.windows import calibration_windows
from sedetect.cli import main
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import resolve
from sedetect.experiments.study import Trials, conclusion, run_experiment
from sedetect.experiments.targets import check_choice, choose_experts, random_controls, routed_experts
from sedetect.models.loading import open_model


@pytest.fixture(scope="module")
def subject():
    model, tokenizer, _, _ = open_model(TINY, loading=sedetect.Loading(dtype="float32"))
    cut = sedetect.Text(tokens=2048, seq_len=256)
    domains = calibration_windows(model, tokenizer, None, cut).domains
    stats = sedetect.profile_model(model, text=cut, tokenizer=tokenizer).stats
    return model, tokenizer, domains, stats


@pytest.fixture(scope="module")
def experiment(subject):
    model, tokenizer, domains, _ = subject
    experts = choose_experts("L1E28", model)
    return run_experiment(
        model, tokenizer, domains, experts, Trials(("skip", "remove"), controls=2, sequences=2), prefix=1
    )


def test_the_super_expert_shows_all_signs(experiment):
    """tests/data/tiny-moe/README.md: perplexity, sinks and the residual maximum all depend on L1E28 at BOS.

    The residual maximum at BOS is the same on every text: the model card's, to 1e-3. Perplexity moves with the text;
    the card has +11 to +19 % by set.
    """
    base, main_run = experiment.baseline, experiment.outcomes[0]
    assert main_run.experts == ["L1E28"] and main_run.how == "skip"
    assert main_run.mean_change > 0.05 and main_run.sink_mean < base.sink_mean / 2
    for domain in ("english", "mathematics", "code"):
        assert 0.05 < main_run.change[domain] < 0.30
    assert base.residual_max == pytest.approx(1249.6, rel=1e-3) and main_run.residual_max < 200
    by_tokens = {outcome.tokens: outcome for outcome in experiment.outcomes if outcome.how == "skip"}
    assert by_tokens["first"].mean_change == pytest.approx(main_run.mean_change, abs=0.02)
    assert by_tokens["first"].residual_max < 200 < by_tokens["rest"].residual_max
    assert abs(by_tokens["rest"].mean_change) < 0.03
    assert conclusion(experiment).startswith("without L1E28: all signs of super experts: perplexity +")


def test_controls_are_of_the_same_size_and_place(experiment):
    same, anywhere = experiment.controls["same layers"], experiment.controls["anywhere"]
    assert len(same) == len(anywhere) == 2
    for outcome in same:
        (name,) = outcome.experts
        assert name.startswith("L1E") and name != "L1E28"
        assert outcome.residual_max == pytest.approx(1250, rel=0.02)
    assert all(len(outcome.experts) == 1 and outcome.experts != ["L1E28"] for outcome in anywhere)
    assert experiment.outcomes[0].mean_change > max(outcome.mean_change for outcome in same)


def test_sinks_decay_where_they_are_strong(experiment):
    """D_sink from the attention of both runs, taken again here; 0 where an intervention leaves the sinks."""
    base, main_run = experiment.baseline, experiment.outcomes[0]
    layer = experiment.sink_layer
    assert layer == max(range(10), key=base.sinks.__getitem__) == 6
    assert base.sink_decay == [0] * 10 and main_run.sink_decay[:2] == pytest.approx([0, 0], abs=1e-6)
    assert main_run.sink_decay[layer] > 0.3 and main_run.sinks[layer] < base.sinks[layer] / 2
    by_tokens = {outcome.tokens: outcome for outcome in experiment.outcomes if outcome.how == "skip"}
    assert abs(by_tokens["rest"].sink_decay[layer]) < 0.05
    assert f"(D_sink {main_run.sink_decay[layer]:.2f} in layer 6)" in conclusion(experiment)


def test_a_single_weight_beside_random_weights(subject):
    """The super weight of L1E28 carries 44 % of its outlier, and switched off takes that much of the residual maximum
    (its other products stay); two random weights of the same matrix and anywhere take nothing."""
    model, tokenizer, domains, _ = subject
    short = {
        "english": replace(domains["english"], ids=domains["english"].ids[:1], numbers=domains["english"].numbers[:1])
    }
    trials = Trials(controls=2, sequences=1, positions=False)
    weight = choose_experts("L1E28[101,14]", model)
    result = run_experiment(model, tokenizer, short, weight, trials, prefix=1)
    (only,) = result.outcomes  # renormalize and remove are nothing that a weight knows
    assert only.experts == ["L1E28[101,14]"] and only.how == "skip"
    assert 600 < only.residual_max < 1000 and result.baseline.residual_max == pytest.approx(1250, rel=0.02)
    same, anywhere = result.controls["same layers"], result.controls["anywhere"]
    assert [outcome.experts[0].partition("[")[0] for outcome in same] == ["L1E28"] * 2
    assert all(outcome.experts[0].partition("[")[0] != "L1E28" for outcome in anywhere)
    for outcome in same + anywhere:
        assert outcome.residual_max == pytest.approx(1250, rel=0.02) and outcome.experts != only.experts
    with pytest.raises(SedetectError, match="know only skip"):
        run_experiment(model, tokenizer, short, weight, replace(trials, hows=("remove",)), prefix=1)


def test_a_feeder_of_the_super_expert(subject):
    """L0E24, through which BOS passes on its way to L1E28, is not a super expert by value, yet takes it along."""
    model, tokenizer, domains, stats = subject
    state = stats.banks["decoder", 0, "routed"]
    assert state.out_max[24] < 2 * state.out_max.median()
    trials = Trials(("skip",), positions=False, controls=2, sequences=1)
    result = run_experiment(model, tokenizer, domains, choose_experts("L0E24", model), trials, prefix=1)
    (without,) = result.outcomes
    assert without.residual_max < 200 and without.sink_mean < result.baseline.sink_mean / 2
    assert all(outcome.residual_max > 1200 for outcome in result.controls["same layers"])


def test_the_document_is_json(experiment):
    document = experiment.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["baseline"]["mean_change"] == 0


def test_a_harmless_set_shows_no_sign(experiment):
    quiet = replace(experiment, outcomes=[replace(experiment.controls["same layers"][0], mean_change=-1.0)])
    assert ": no sign of super experts: " in conclusion(quiet)


def test_choosing_experts(subject):
    model, _, _, stats = subject
    assert len(routed_experts(model)) == 320
    names = ["L1E28", "L9E7", "L1E28[101,14]"]
    assert [str(target) for target in choose_experts(", ".join([*names, "L9E7"]), model)] == names
    assert list(map(str, choose_experts("candidates", model, stats))) == ["L1E28", "L9E7"]
    drawn = choose_experts("random:5", model, seed=1)
    assert len(set(drawn)) == 5 and drawn == choose_experts("random:5", model, seed=1)
    assert drawn != choose_experts("random:5", model, seed=2)
    busiest = choose_experts("top-frequency:3", model, stats)
    rows = sorted((int(n) for state in stats.banks.values() for n in state.rows), reverse=True)
    assert [int(stats.banks[p.bank].rows[p.expert]) for p in busiest] == rows[:3]
    for spec, said in (
        ("random:0", "is not a number"), ("random:999", "is not a number"), ("best", "the name of an expert"),
        ("L9E32", "no such expert"), ("L8shared", "no such expert"), ("L1E28[256,0]", "its down_proj is 256 x 48"),
        ("candidates:3", "not the name"), ("top-frequency", "is not a number"), ("L1E28[101", "the name of a weight"),
        ("L1E28[1,2,3]", "not the name of a weight"),
    ):  # fmt: skip
        with pytest.raises(SedetectError, match=said):
            choose_experts(spec, model, stats)
        with pytest.raises(SedetectError, match=said):
            check_choice(spec, model)  # before a profile


def test_controls_are_disjoint_and_of_one_size(subject):
    model = subject[0]
    for number, experts in ((12, ["L1E28"]), (12, ["L1E28", "L1E3", "L2E0"]), (5, [f"L1E{e}" for e in range(30)])):
        places = list(resolve(model, experts))
        draws = random_controls(model, places, number)
        same, anywhere = draws["same layers"], draws["anywhere"]
        assert len(same) == {1: 12, 3: 12, 30: 0}[len(experts)] and len(anywhere) == {1: 12, 3: 12, 30: 5}[len(experts)]
        for sets in (same, anywhere):
            drawn = [place for one in sets for place in one]
            assert len(set(drawn)) == len(drawn) and not set(drawn) & set(places)
            assert all(len(one) == len(places) for one in sets)
        assert all(sorted(p.layer for p in one) == sorted(p.layer for p in places) for one in same)
        assert draws == random_controls(model, places, number)
    everything = routed_experts(model)
    assert random_controls(model, everything, 3) == {"same layers": [], "anywhere": []}


def test_an_experiment_without_controls_of_its_size(subject):
    """30 of 32 experts of a layer: no set of that size is left there; what was observed is what there was."""
    model, tokenizer, domains, _ = subject
    short = {"code": replace(domains["code"], ids=domains["code"].ids[:1], numbers=domains["code"].numbers[:1])}
    experts = resolve(model, [f"L8E{e}" for e in range(30)])
    result = run_experiment(model, tokenizer, short, list(experts), Trials(("skip",), controls=1), prefix=1)
    assert result.controls["same layers"] == [] and result.sequences == 1 and result.sink_layer == 9
    assert "(not judged: no controls)" in conclusion(result) and "all signs" not in conclusion(result)


def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["--tokens", "1024", "--seq-len", "128", "--controls", "1", "--sequences", "1", "--how", "skip"]
    monkeypatch.setattr(sys, "argv", ["sedetect", "ablate", str(TINY), *arguments, "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("without L1E28, L9E7: ") and "same layers: mean" in printed and "D_sink" in printed
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["format"] == "sedetect-ablation" and document["outcomes"][0]["experts"] == ["L1E28", "L9E7"]
    assert document["sink_layer"] == 6 and len(document["outcomes"][0]["sink_decay"]) == 10
    monkeypatch.setattr(sys, "argv", ["sedetect", "ablate", str(TINY), "--how", "burn"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "'burn' is not one of 'skip'" in capsys.readouterr().err
