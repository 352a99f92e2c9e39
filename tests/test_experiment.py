"""Ablation beside its controls, on the checkpoint whose super expert is known."""

import json
import sys
from dataclasses import replace

import pytest
from models import TINY

import sedetect
from sedetect.cli import main
from sedetect.errors import SedetectError
from sedetect.experiment import choose_experts, conclusion, routed_experts, run_experiment
from sedetect.pipeline import calibration_windows, open_model


@pytest.fixture(scope="module")
def subject():
    model, tokenizer, _ = open_model(TINY, dtype="float32")
    cut = {"tokens": 2048, "seq_len": 256, "seed": None, "chat_template": False}
    domains = calibration_windows(model, tokenizer, None, **cut).domains
    stats = sedetect.profile_model(model, tokens=2048, seq_len=256, tokenizer=tokenizer).stats
    return model, tokenizer, domains, stats


@pytest.fixture(scope="module")
def experiment(subject):
    model, tokenizer, domains, stats = subject
    experts = choose_experts("super", stats)
    return run_experiment(
        model, tokenizer, domains, experts, stats, prefix=1, hows=("skip", "remove"), controls=2, sequences=2
    )


def test_the_super_expert_shows_all_signs(experiment):
    """tests/data/tiny-moe/README.md: perplexity, sinks and the residual maximum all depend on L1E28 at BOS."""
    base, main_run = experiment.baseline, experiment.outcomes[0]
    assert main_run.experts == ["L1E28"] and main_run.how == "skip"
    assert main_run.mean_change > 0.05 and main_run.sink_mean < base.sink_mean / 2
    assert base.residual_max == pytest.approx(1250, rel=0.02) and main_run.residual_max < 200
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


def test_the_document_is_json(experiment):
    document = experiment.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["baseline"]["mean_change"] == 0


def test_a_harmless_set_shows_no_sign(experiment):
    quiet = replace(experiment, outcomes=[experiment.controls["same layers"][0]])
    quiet.outcomes[0].mean_change = -1.0
    assert ": no sign of super experts: " in conclusion(quiet)


def test_choosing_experts(subject):
    *_, stats = subject
    assert len(routed_experts(stats)) == 320
    assert [str(place) for place in choose_experts("L1E28, L9E7", stats)] == ["L1E28", "L9E7"]
    drawn = choose_experts("random:5", stats, seed=1)
    assert len(set(drawn)) == 5 and drawn == choose_experts("random:5", stats, seed=1)
    assert drawn != choose_experts("random:5", stats, seed=2)
    busiest = choose_experts("top-frequency:3", stats)
    rows = sorted((int(n) for state in stats.banks.values() for n in state.rows), reverse=True)
    assert [int(stats.banks[p.stack, p.layer, p.kind].rows[p.expert]) for p in busiest] == rows[:3]
    for spec, said in (("random:0", "is no number"), ("random:999", "is no number"), ("best", "not the name")):
        with pytest.raises(SedetectError, match=said):
            choose_experts(spec, stats)


def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["--tokens", "1024", "--seq-len", "128", "--controls", "1", "--sequences", "1", "--how", "skip"]
    monkeypatch.setattr(sys, "argv", ["sedetect", "ablate", str(TINY), *arguments, "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("without L1E28: ") and "same layers: worst" in printed and "residual" in printed
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["format"] == "sedetect-ablation" and document["outcomes"][0]["experts"] == ["L1E28"]
    monkeypatch.setattr(sys, "argv", ["sedetect", "ablate", str(TINY), "--how", "burn"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "--how burn" in capsys.readouterr().err
