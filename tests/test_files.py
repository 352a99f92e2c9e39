"""Files take the permissions that the umask leaves, and nobody sets the umask to learn it."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from sedetect.files import new_folder, write_atomic, write_json


@pytest.fixture(params=[0o022, 0o077, 0o002])
def mask(request, monkeypatch):
    before = os.umask(request.param)

    def fail(mask):
        raise AssertionError("the umask is the whole process's: another thread would make its files under it")

    with monkeypatch.context() as patched:
        patched.setattr(os, "umask", fail)
        yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files(mask, tmp_path):
    (tmp_path / "old.json").touch()
    os.chmod(tmp_path / "old.json", 0o600)
    write_json(tmp_path / "old.json", {})
    write_json(tmp_path / "new" / "a.json", {})
    write_atomic(tmp_path / "b.safetensors", lambda temporary: save_file({"x": torch.zeros(1)}, temporary))
    for name in ("old.json", "new/a.json", "b.safetensors"):
        assert mode(tmp_path / name) == 0o666 & ~mask, name


def test_a_folder(mask, tmp_path):
    with new_folder(tmp_path / "model") as folder:
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "copied").touch()
        os.chmod(folder / "copied", 0o755)
        write_json(folder / "config.json", {})
    assert mode(tmp_path / "model") == 0o777 & ~mask
    assert {file.name: mode(file) for file in (tmp_path / "model").iterdir()} == dict.fromkeys(
        ("model.safetensors", "copied", "config.json"), 0o666 & ~mask
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
