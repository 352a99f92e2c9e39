"""The folder of results: its files by name, and what is read where only some of them are there."""

import os
import subprocess
import sys

import pytest
import torch
from support.documents import RESIDUAL, SAMPLES
from support.synthetic import synthetic_stats

from sedetect.analysis.common import KINDS, Analysis
from sedetect.errors import SedetectError
from sedetect.experiments.study import Experiment
from sedetect.experiments.traces import Traces
from sedetect.profiling.record import Run
from sedetect.results import Results
from sedetect.stats.residual import Observation

READERS = {"run": Run, "observation": Observation, "ablation": Experiment, "traces": Traces}


@pytest.fixture
def full(tmp_path):
    results = Results(tmp_path / "new")
    synthetic_stats(2, 4).save(results.stats_path)
    results.domains.save({"code": synthetic_stats(2, 4, domain="code")})
    results.rounds.save({"000": synthetic_stats(2, 4), "001": synthetic_stats(2, 4, seed=1)})
    for name, cls in READERS.items():
        path = results.residual_path if name == "observation" else getattr(results, f"{name}_path")
        SAMPLES[cls].save(path)
    for kind in KINDS:
        Analysis(kind, "m", "d", "float32").save(results.path)
    return results


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_folder_with_everything(full):
    names = {"stats.safetensors", "domains/code.safetensors", "rounds/000.safetensors", "rounds/001.safetensors"}
    names |= {"run.json", "residual.json", "ablation.json", "traces.json"}
    assert files_of(full.path) == names | {f"{kind}-analysis.safetensors" for kind in KINDS}
    assert full.stats().header.model == "synthetic"
    assert {name: getattr(full, name)() for name in READERS} == {name: SAMPLES[cls] for name, cls in READERS.items()}
    assert full.residual() == RESIDUAL
    assert list(full.domains.load()) == ["code"] and list(full.rounds.load()) == ["000", "001"]
    assert list(full.analyses()) == list(KINDS) and full.analyses()["outputs"].kind == "outputs"
    paths = {full.ranking_path, full.budget_path, full.frontier_path, full.report_path, full.figures_path}
    paths.add(full.resume_path)
    expected = {"super_experts.json", "budget.json", "frontier.json", "report.html", "figures", "resume"}
    assert {path.name for path in paths} == expected and {path.parent for path in paths} == {full.path}


def test_a_folder_with_some(full):
    for path in (full.run_path, full.ablation_path, full.analysis_path("outputs")):
        path.unlink()
    assert full.run() is None and full.ablation() is None and list(full.analyses()) == ["weights", "routing"]
    assert full.traces() == SAMPLES[Traces] and full.observation() == SAMPLES[Observation]
    full.traces_path.write_text("{}")
    with pytest.raises(SedetectError, match="traces.json: is a document without format"):
        full.traces()


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_with_nothing(tmp_path, there):
    results = Results(tmp_path if there else tmp_path / "nowhere")
    assert [getattr(results, name)() for name in (*READERS, "residual")] == [None] * 5
    assert results.domains.load() == results.rounds.load() == results.analyses() == {}
    with pytest.raises(SedetectError, match="no such statistics file"):
        results.stats()
    assert list(tmp_path.iterdir()) == []


def test_a_statistics_file_stands_alone(full):
    """Whatever lies beside it in its folder."""
    alone = Results(full.stats_path)
    assert torch.equal(*(next(iter(one.stats().banks.values())).out_max for one in (alone, full)))
    assert alone.residual() is None and alone.run() is None and alone.domains.load() == {} and alone.analyses() == {}


def test_parts_that_are_no_more_go(full):
    full.domains.save({"text": synthetic_stats(2, 4)})
    assert list(full.domains.load()) == ["text"]
    full.domains.save({})
    assert full.domains.load() == {}


def test_paths_take_nothing_heavy():
    code = (
        "import sys, types; package = types.ModuleType('sedetect'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['sedetect'] = package; from sedetect.results import Results; Results('a').stats_path; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    package = os.path.dirname(sys.modules["sedetect"].__file__)
    assert subprocess.run([sys.executable, "-c", code, package]).returncode == 0
