"""Checkpoints read from a folder, from a file server and from the hub's addresses, whatever the network does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from support.models import TINY
from support.servers import COMMIT, Faults, serving

from sedetect import SedetectError
from sedetect.checkpoints import web
from sedetect.checkpoints.files import shards_of
from sedetect.checkpoints.source import open_source
from sedetect.checkpoints.staging import stored_tensors

NAME = "owner/tiny"
STORED = {name: tensor for file in sorted(TINY.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def hub(monkeypatch):
    """Point huggingface_hub at a server, with a token, and let it ask."""

    def point(server):
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")

    return point


def read(name, chosen=STORED, **options) -> int:
    """Read tensors of tiny-moe, check them, and return the bytes that took."""
    with open_source(name, **options) as source:
        stored = stored_tensors(shards_of(source.folder))
        assert stored.keys() == STORED.keys()
        for name, tensor in source.tensors({name: stored[name] for name in chosen}).items():
            assert torch.equal(tensor, STORED[name]), name
        return source.meter.total


def test_a_folder():
    assert read(TINY) == sum(tensor.nbytes for tensor in STORED.values())


@pytest.mark.parametrize(
    "faults",
    [{}, {"drop": 5}, {"truncate": 3}, {"busy": 4}, {"drop": 7, "truncate": 5, "busy": 6}],
    ids=lambda faults: "+".join(faults) or "none",
)
def test_bytes_are_those_that_the_server_sent(monkeypatch, faults):
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    whole = sum(file.stat().st_size for file in TINY.iterdir() if file.suffix != ".md")
    with serving({NAME: TINY}, Faults(**faults)) as server:
        total = read(server.files(NAME))
        assert total == server.sent
        assert total == whole or faults  # what arrived of a truncated answer is not asked for again
        assert total <= whole + 10**6


def test_part_of_a_checkpoint_is_part_of_the_bytes():
    name = "model.layers.3.mlp.experts.5.down_proj.weight"
    with serving({NAME: TINY}) as server:
        assert read(server.files(NAME), [name]) == server.sent < 600_000


def test_rows_of_a_tensor():
    with serving({NAME: TINY}) as server, open_source(server.files(NAME)) as source:
        stored = stored_tensors(shards_of(source.folder))["model.embed_tokens.weight"]
        assert torch.equal(source.tensors({"r": stored.rows(7, 2)})["r"], STORED["model.embed_tokens.weight"][7:9])


def test_the_hub(hub):
    """Signed addresses are taken, and are not given the token; the mirror has the name that the hub's cache gives."""
    with serving({NAME: TINY}) as server:
        hub(server)
        assert read(NAME) == server.sent
        with open_source(NAME) as source:
            assert source.folder.parts[-3:] == ("models--owner--tiny", "snapshots", COMMIT)
        tokens = {path.split("/")[1]: token for _, path, _, token in server.seen}
        assert tokens["api"] == tokens["owner"] == "Bearer hf_of_a_test"
        seen = len(server.seen)
        assert read(f"{server.address}/{NAME}/tree/main") and len(server.seen) > seen  # the address of its page
        for name, options, why in [
            ("owner/other", {}, "no such folder, and the hub has no such model .revision main.; check the name"),
            (NAME, {"revision": "v9"}, "the hub has no such model .revision v9."),
        ]:
            with pytest.raises(SedetectError, match=why):
                read(name, **options)
    with serving({NAME: TINY}, Faults(gated=True)) as server:
        hub(server)
        with pytest.raises(SedetectError, match="access is denied .status 403.; accept the model's terms"):
            read(NAME)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SedetectError, match="^owner/tiny: the hub cannot be reached .OfflineModeIsEnabled.*give a folder"
    ):
        read(NAME)


def test_a_second_run_reads_the_cache(tmp_path, hub):
    chosen = [*[name for name in STORED if ".3." in name][:20], "model.norm.weight"]

    def cached(name):
        return read(name, chosen, cache=tmp_path / "c")

    with serving({NAME: TINY}) as server:
        first = cached(server.files(NAME))
        assert first == server.sent
        assert cached(server.files(NAME)) == 0 and server.sent == first
        hub(server)
        listing = cached(NAME) - first
        assert cached(NAME) == listing < 2000  # what the hub has of the name is asked again
    copy = shutil.copytree(TINY, tmp_path / "m")
    with serving({NAME: copy}) as server:  # another port, another address
        again = cached(server.files(NAME))
        assert again == server.sent == first
        os.utime(copy / "model-00003-of-00003.safetensors")
        assert 0 < cached(server.files(NAME)) < again  # the file that is another one by its ETag


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({"ranges": False}, r"model-00001-of-00003.safetensors: the server does not serve parts of a file"),
        ({"missing": ["model-00002-of-00003.safetensors"]}, r"model-00002-of-00003.safetensors: missing .status 404."),
        ({"missing": ["model.safetensors.index.json"]}, r"no model.safetensors or model.safetensors.index.json in it"),
        ({"missing": ["config.json"]}, r"config.json: missing"),
        ({"size": 7}, r"model-00001-of-00003.safetensors: \d+ bytes where its header says \d+"),
        ({"busy": 1, "retry_after": "900"}, r"the server asks to wait 900 s .status 429.; try again later"),
        ({"busy": 1}, r"cannot be read after 6 tries .status 429.; try again later"),
        ({"drop": 1}, r"cannot be read after 6 tries .\w+: .*; try again later"),
    ],
)  # fmt: skip
def test_faults_that_stay_name_the_file(monkeypatch, faults, why):
    """And the address, not the mirror."""
    waited = []
    monkeypatch.setattr(web.time, "sleep", waited.append)
    with serving({NAME: TINY}, Faults(**faults)) as server:
        with pytest.raises(SedetectError, match=f"^{server.files(NAME)}.*{why}"):
            read(server.files(NAME))
        if "ranges" in faults:
            assert server.sent < 15_000_000  # of 31 MB
    assert all(seconds == 0 for seconds in waited) or ("drop" in faults and waited == sorted(waited))


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("soon", None), (None, None)]
)
def test_retry_after(value, seconds):
    assert web._retry_after(value) == seconds


def test_a_file_that_changes_meanwhile():
    with serving({NAME: TINY}) as server, open_source(server.files(NAME)) as source:
        stored = stored_tensors(shards_of(source.folder))
        server.faults.size = 9
        with pytest.raises(SedetectError, match=r"safetensors: has [\d,]+ bytes, expected [\d,]+; upload it again"):
            source.tensors({"a": stored["model.norm.weight"]})


def test_shards_elsewhere_are_not_followed(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "m")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["x"] = "../../secret.safetensors"
    file.write_text(json.dumps(index))
    with serving({NAME: folder}) as server, pytest.raises(SedetectError, match="which is not a file beside it"):
        read(server.files(NAME))


def test_redirects_to_plain_http_are_not_followed(monkeypatch):
    with serving({NAME: TINY}) as server:
        other = web.Web("https://example.org", {}, hub=False)
        monkeypatch.setattr(other, "_client", _Redirecting(server.address))
        with pytest.raises(SedetectError, match="redirects to http://127.* which is not https"):
            other.get("https://example.org/config.json", 100)


class _Redirecting:
    def __init__(self, target):
        self.target = target

    def stream(self, *args, **kwargs):
        return self

    def __enter__(self):
        self.status_code, self.headers = 302, {"location": f"{self.target}/config.json"}
        return self

    def __exit__(self, *error):
        pass


def test_nothing_is_left(tmp_path):
    """No mirror after a run, also after one that fails."""
    code = "import sys; from sedetect.checkpoints.source import open_source\nwith open_source(sys.argv[1]): sys.exit(3)"
    with serving({NAME: TINY}) as server:
        command = [sys.executable, "-c", code, server.files(NAME)]
        done = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=120)
    assert done.returncode == 3 and not list(tmp_path.iterdir())
