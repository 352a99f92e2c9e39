"""Hostile inputs (support/hostile.py): one line and exit code 2, no traceback, and nothing half written."""

import hashlib

import pytest
from support.checkpoints import put_model
from support.command import run
from support.hostile import CASES, SMALL, Sound
from support.servers import serving
from transformers import AutoModelForCausalLM

from sedetect.checkpoints import web


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    sharded = put_model(folder / "sharded")
    single = put_model(folder / "single")
    model = AutoModelForCausalLM.from_pretrained(single)
    for file in single.glob("model*"):
        file.unlink()
    model.save_pretrained(single)
    assert run("profile", single, "-o", folder / "profile", *SMALL, "--residual", 2).code == 0
    with serving({}) as server:
        yield Sound(single, sharded, folder / "profile", server)


def contents(folder):
    """What every file below a folder holds."""
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    }


def test_there_are_as_many_as_promised():
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_or_served(case, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)  # between tries of an address
    arguments = case.make(tmp_path, sound)
    before = contents(tmp_path)
    result = run(*arguments)
    if case.served:
        assert result.code == 0, result.err
        assert "Traceback" not in result.out + result.err
        assert case.told in result.out, result.out
        return
    assert result.code == 2 and result.out == "", result
    assert result.err.startswith("sedetect: ") and result.err.count("\n") == 1, result.err
    assert len(result.err) > 30
    assert contents(tmp_path) == before
