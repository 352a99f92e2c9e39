"""The report: the sections of what other commands wrote, and documents that are damaged or of another model."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from support.command import refused, run
from support.documents import SAMPLES
from support.page import Page, payload

from sedetect import ModelStats
from sedetect.compression.budget import Budget
from sedetect.compression.frontier import Curve, Frontier, size_at
from sedetect.compression.verification import Limits, Verification
from sedetect.experiments.study import Experiment
from sedetect.report.data import datasets
from sedetect.report.evidence import load_evidence
from sedetect.report.experiments import ablation_section
from sedetect.report.sections import sections
from sedetect.results import Results
from sedetect.stats.proof import Effect, Proof


@pytest.fixture
def decided(tiny_profile, tmp_path):
    """A profile with what was found of its candidates, and of compression."""
    folder = tmp_path / "decided"
    shutil.copytree(tiny_profile, folder)
    digest = ModelStats.load(folder).header.digest
    replace(SAMPLES[Proof], digest=digest).save(folder / "proof.json")
    replace(SAMPLES[Budget], model="tiny-moe").save(folder / "budget.json")
    replace(SAMPLES[Frontier], digest=digest).save(folder / "frontier.json")
    replace(SAMPLES[Verification], digest=digest).save(folder / "verification.json")
    return folder


def test_proof_compression_and_verification_have_sections(decided):
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    order = ["todo", "experts", "proof", "budget", "frontier", "verification", "evidence", "details", "run"]
    assert [i for i in page.ids if i in order] == order
    for shown in (
        "1,536 tokens in 3 windows",
        "L0E24 (10% left)",
        "control 1",
        "Within 5% of the unchanged perplexity, L1E28 kept: none",
        "int3",
        "+inf%",
        "By expert, protecting L1E0 buys nothing at equal perplexity",
        "m-int4 fails 1 check against m",
        "a failure",
        "50.0%",
    ):
        assert shown in page.text, shown
    assert "–" in page.text[page.text.index("L9E7") :]  # it did not fire in the proof


def measured(sample, *curves):
    """sample with a curve for each (by, protected, seed, changes), of 40 bytes, 30, ..."""
    point = sample.curves[0].points[0]
    made = []
    for by, protected, seed, changes in curves:
        points = [
            replace(point, size=40.0 - 10 * i, change=Effect(change, change - 0.01, change + 0.01, 8))
            for i, change in enumerate(changes)
        ]
        made.append(Curve(by, protected, seed, points))
    return replace(sample, curves=made)


def test_what_the_frontier_draws(decided, opened):
    """A point for each allocation, at its size and change; the table has the sizes at equal perplexity."""
    frontier = measured(
        Results(decided).frontier(),
        ("model", False, None, [0.005, 0.02, 4.0]),
        ("layer", True, None, [-0.01, 0.0]),
        ("expert", False, None, [0.0, 0.01, math.inf]),
        *(("expert", False, seed, [0.1, 0.3]) for seed in (0, 1)),
    )
    frontier.save(decided / "frontier.json")
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    drawn = payload(page)["data"]["frontier"]
    found = [dict(zip(drawn["columns"], row)) for row in drawn["rows"]]
    assert [(r["formats"], r["allocation"], r["seed"], round(1e6 * r["size"]), r["change"]) for r in found] == [
        ("one for all", "chosen", None, 40, 0.005), ("one for all", "chosen", None, 30, 0.02),
        ("one for all", "chosen", None, 20, 4.0), ("by layer", "protected", None, 40, -0.01),
        ("by layer", "protected", None, 30, 0.0), ("by expert", "chosen", None, 40, 0.0),
        ("by expert", "chosen", None, 30, 0.01), ("by expert", "at random", 0, 40, 0.1),
        ("by expert", "at random", 0, 30, 0.3), ("by expert", "at random", 1, 40, 0.1),
        ("by expert", "at random", 1, 30, 0.3),
    ]  # fmt: skip
    made = sections(load_evidence(decided), datasets(load_evidence(decided)))
    assert [row[0] for row in made["frontier"].rows] == [
        "one for all", "by layer, protected", "by expert", "by expert, at random (0)", "by expert, at random (1)"
    ]  # fmt: skip
    sizes = [size_at(frontier, frontier.curve("model"), increase) for increase in (0.01, 0.05)]
    assert made["frontier"].rows[0][1:] == [f"{size / 1e6:.3g}" for size in sizes]
    assert made["frontier"].rows[1][1:] == ["at most 3e-05", "at most 3e-05"]
    points = made["frontier_points"].rows
    assert points[1] == ["one for all", "3e-05", "10.00", "+2.00%", "+1.00% to +3.00%"] and points[7][3] == "+inf%"
    shown, events = opened(decided / "report.html")
    assert shown.locator("#chart-frontier g.mark-symbol.role-mark path").count() == len(found) and events == []


def test_a_verification_that_could_not_open_its_checkpoint(decided):
    lost = Verification("tiny-moe", "broken", Limits(), failures=["weights are missing"])
    lost.save(decided / "verification.json")
    assert run("report", decided).code == 0
    page = Page((decided / "report.html").read_text())
    assert "broken fails 1 check against tiny-moe" in page.text and "weights are missing" in page.text


def test_documents_come_back_as_they_were(tiny_report):
    evidence = load_evidence(tiny_report[0])
    for name, of in (("ablation", evidence.ablation), ("traces", evidence.traces), ("run", evidence.run)):
        assert json.loads(json.dumps(of.to_dict())) == json.loads((tiny_report[0] / f"{name}.json").read_text())
    assert [e.carried for e in evidence.ranking.super_experts] == [True]  # the residual stream is part of the verdict


def test_an_ablation_that_breaks_the_model(tiny_report):
    """Infinite perplexity and NaN come back as they were, and the page is drawn without those points."""
    evidence = load_evidence(tiny_report[0])
    broken = replace(evidence.ablation.outcomes[0], mean_change=math.inf, residual_max=math.nan)
    broken.perplexity = dict.fromkeys(broken.perplexity, math.inf)
    broken.change = dict.fromkeys(broken.change, math.inf)
    experiment = replace(evidence.ablation, outcomes=[broken, *evidence.ablation.outcomes[1:]])
    document = json.loads(json.dumps(experiment.to_dict(), allow_nan=False))
    back = Experiment.from_dict(document)
    assert back.outcomes[0].mean_change == math.inf and math.isnan(back.outcomes[0].residual_max)
    points = datasets(replace(evidence, ablation=back))["ablation"]
    assert len(points) == len(datasets(evidence)["ablation"]) - 1
    assert "+inf%" in str(ablation_section(back))


@pytest.mark.parametrize("name", ["proof", "budget", "frontier", "verification"])
def test_documents_of_another_model_are_refused(decided, name):
    file = decided / f"{name}.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"model" if name == "budget" else "digest": "another"}))
    assert f"{file}: is of model another" in refused(run("report", decided))


@pytest.mark.parametrize("name", ["run", "residual", "ablation", "traces", "budget", "frontier", "verification"])
def test_damaged_documents_are_refused_by_name(tiny_report, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_report[0], folder, ignore=shutil.ignore_patterns("figures", "report.html"))
    file = folder / f"{name}.json"
    for cls in (Budget, Frontier, Verification):
        if name == cls.__name__.lower():
            SAMPLES[cls].save(file)
    document = json.loads(file.read_text())
    cases = {
        "is not valid JSON": "{",
        "version": json.dumps(document | {"version": "2"}),
        "damaged": json.dumps({"format": document["format"], "version": "1"}),
        "not": "[]",
    }
    for said, content in cases.items():
        file.write_text(content)
        message = refused(run("report", folder))
        assert str(file) in message and said in message
    file.write_text(json.dumps(document | {"model" if name in ("traces", "budget") else "digest": "another"}))
    assert f"{file}: is of model another" in refused(run("report", folder))
    assert not (folder / "report.html").exists()
