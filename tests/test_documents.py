"""JSON documents: what is written comes back, and what is not theirs is refused in one line."""

import importlib
import json
import math
import pkgutil
import re
from collections import Counter
from dataclasses import replace

import pytest
from support.documents import RESIDUAL, SAMPLES, outcome

from sedetect.documents import Document
from sedetect.errors import SedetectError
from sedetect.experiments.study import Experiment
from sedetect.ranking.result import Ranking
from sedetect.stats.residual import Observation, Residual


def documents():
    """Every class of the package that is a Document."""
    for package in ("analysis", "compression", "experiments", "profiling", "ranking", "stats", "training"):
        face = importlib.import_module(f"sedetect.{package}")
        for module in pkgutil.iter_modules(face.__path__, f"{face.__name__}."):
            importlib.import_module(module.name)
    return sorted(Document.__subclasses__(), key=lambda cls: cls.__name__)


DOCUMENTS = documents()


def refusal(cls, path):
    with pytest.raises(SedetectError) as caught:
        cls.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(f"; {cls.REMEDY}") and "\n" not in message
    return message


@pytest.mark.parametrize("cls", SAMPLES)
def test_what_is_saved_is_loaded(cls, tmp_path):
    path = tmp_path / "document.json"
    SAMPLES[cls].save(path)
    assert cls.load(path) == SAMPLES[cls]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert list(document)[:2] == ["format", "version"]
    assert (document["format"], document["version"]) == (cls.FORMAT, cls.VERSION)
    assert cls.from_dict(document | {"more": 1}) == SAMPLES[cls]


def test_every_document_that_is_read_has_a_sample():
    assert len(DOCUMENTS) == 19 and {cls for cls in DOCUMENTS if "from_dict" in vars(cls)} == set(SAMPLES)
    shared = {form for form, count in Counter(cls.FORMAT for cls in DOCUMENTS).items() if count > 1}
    assert shared == {Residual.FORMAT}  # of which an Observation is the whole document


def test_numbers_that_are_not_finite_come_back(tmp_path):
    broken = outcome("skip", math.inf, residual=math.nan)
    replace(SAMPLES[Experiment], outcomes=[broken]).save(tmp_path / "ablation.json")
    (back,) = Experiment.load(tmp_path / "ablation.json").outcomes
    assert math.isnan(back.residual_max) and back.mean_change == back.change["code"] == math.inf


def test_an_observation_holds_the_residual_of_its_file(tmp_path):
    """residual.json is read as either, from the file or from its folder; without an ablation both write the same."""
    SAMPLES[Observation].save(tmp_path / "residual.json")
    assert Residual.load(tmp_path) == Residual.load(tmp_path / "residual.json") == RESIDUAL
    assert Observation.load(tmp_path) == SAMPLES[Observation]
    assert Observation(RESIDUAL).to_dict() == RESIDUAL.to_dict()
    RESIDUAL.save(tmp_path / "residual.json")
    assert Observation.load(tmp_path) == Observation(RESIDUAL, None, [])


@pytest.mark.parametrize("cls", DOCUMENTS)
def test_other_files_are_refused(cls, tmp_path):
    path = tmp_path / "document.json"
    assert f"{path}: no such file; " in refusal(cls, path)
    head = {"format": cls.FORMAT, "version": cls.VERSION}
    wrong = {
        "is not valid JSON (": json.dumps(head)[:-1],
        "is a document without format, not": "[]",
        f"is another version 1, not {cls.FORMAT} version 1;": json.dumps(head | {"format": "another"}),
        f"is {cls.FORMAT} version 2, not {cls.FORMAT} version 1;": json.dumps(head | {"version": "2"}),
    }
    for said, text in wrong.items():
        path.write_text(text)
        assert f"{path}: {said}" in refusal(cls, path)
    path.write_bytes(b"\xff\xfe")
    assert "is not valid JSON (" in refusal(cls, path)


@pytest.mark.parametrize("cls", SAMPLES)
def test_documents_that_lack_something_are_damaged(cls, tmp_path):
    path = tmp_path / "document.json"
    path.write_text(json.dumps({"format": cls.FORMAT, "version": cls.VERSION}))
    assert re.search(r"damaged \(KeyError: '\w+'\)", refusal(cls, path))


def test_a_document_that_nothing_reads_says_so(tmp_path):
    path = tmp_path / "super_experts.json"
    path.write_text(json.dumps({"format": Ranking.FORMAT, "version": Ranking.VERSION}))
    with pytest.raises(NotImplementedError, match="Ranking is only written"):
        Ranking.load(path)
