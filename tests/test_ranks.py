"""Data parallel profiles: two processes as torchrun starts them, their merged statistics, and what ends a run early."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.checkpoints import TEXTS, save_random
from support.command import files_of
from support.models import COMMON
from transformers import Qwen3MoeConfig

import sedetect
from sedetect import ModelStats, SedetectError

RESULTS = {
    "run.json",
    "stats.safetensors",
    "super_experts.json",
    *(f"domains/{domain}.safetensors" for domain in TEXTS),
}
ENDS = ("--no-stream", "--stream", "killed", "terminated", "refused")
ARGS = ("--tokens", 400, "--seq-len", 16, "--batch-size", 3)

# Runs one command after another, each on ranks with the variables that torchrun sets: forks of one process, which has
# imported but not computed. [folder, port, ending, arguments] of each comes as JSON.
RANKS = """
import json, os, signal, sys
from sedetect import cli
from sedetect.profiling import pipeline, processes, record  # before the forks
from sedetect.ranking import rule, saliencies

def rank_of(rank, folder, port, ending, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{rank}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    original = pipeline.profile_model

    def measure(*args, **kwargs):
        if rank and ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if not rank and ending == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if rank and ending == "refused":
            raise pipeline.SedetectError("no weights here; look for them")
        return original(*args, **kwargs)

    pipeline.profile_model = measure
    sys.argv = ["sedetect", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code or 0)

codes = []
for run in json.loads(sys.argv[1]):
    pids = []
    for rank in (0, 1):
        pids.append(os.fork())
        if not pids[-1]:
            rank_of(rank, *run)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
print(json.dumps(codes))
"""


class Ran(NamedTuple):
    codes: list[int]
    printed: list[str]  # stdout and stderr of the first rank, then of the second
    out: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: matrix products of several threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    sizes = {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8}
    return save_random(Qwen3MoeConfig(**COMMON | sizes), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain, (text,) in TEXTS.items():
        (folder / f"{domain}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint, data) -> sedetect.ModelProfile:
    return sedetect.profile_model(checkpoint, data, text=sedetect.Text(tokens=400, seq_len=16, batch_size=3))


@pytest.fixture(scope="module")
def ran(checkpoint, data, tmp_path_factory) -> dict[str, Ran]:
    """What became of two ranks, by how they were started or ended."""
    folders = {how: tmp_path_factory.mktemp(how.strip("-")) for how in ENDS}
    runs = []
    for how, folder in folders.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = ["profile", checkpoint, "--data", data, "-o", folder / "out", *ARGS]
        arguments += [how] if how.startswith("--") else []
        runs.append([str(folder), port, how, [str(word) for word in arguments]])
    command = [sys.executable, "-c", RANKS, json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    ended = {}
    for (how, folder), codes in zip(folders.items(), json.loads(done.stdout), strict=True):
        printed = [(folder / f"{rank}.{stream}").read_text() for rank in (0, 1) for stream in (1, 2)]
        ended[how] = Ran(codes, printed, folder / "out")
    return ended


def assert_merged(stats: ModelStats, expected: ModelStats) -> None:
    """Counts, maxima, kept rows and header to the bit, sums to 1e-12."""
    assert stats.header.to_json() == expected.header.to_json()
    assert stats.banks.keys() == expected.banks.keys()
    for bank, state in stats.banks.items():
        assert state.equal(expected.banks[bank], sums_rtol=1e-12), bank


@pytest.mark.slow  # ran is
@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_two_ranks_are_one(ran, expected, how):
    codes, printed, out = ran[how]
    assert codes == [0, 0], printed
    assert f"written to {out}" in printed[0] and printed[2] == printed[3] == ""
    assert ("streamed 3 layers: " in printed[0]) == (how == "--stream")
    assert files_of(out) == RESULTS
    assert_merged(ModelStats.load(out), expected.stats)
    for domain, stats in expected.domains.items():
        assert_merged(ModelStats.load(out / "domains" / f"{domain}.safetensors"), stats)


def test_parts_have_every_batch_once(checkpoint, data, expected):
    settings = {"text": sedetect.Text(tokens=400, seq_len=16, batch_size=3)}
    for count in (3, 5):
        parts = [sedetect.profile_model(checkpoint, data, **settings, part=(i, count)) for i in range(count)]
        tokens = [part.stats.header.tokens for part in parts]
        assert sum(tokens) == expected.stats.header.tokens and max(tokens) - min(tokens) <= 2 * 3 * 16
        assert_merged(sedetect.merge_all(part.stats for part in parts), expected.stats)
    with pytest.raises(SedetectError, match="9 batches do not make 10 parts; give more tokens or a smaller"):
        sedetect.profile_model(checkpoint, data, **settings, part=(0, 10))
    for option in ("until_stable", "residual"):
        with pytest.raises(SedetectError, match=f"{option}: needs the whole text, and every rank has a part"):
            sedetect.profile_model(checkpoint, data, **settings, part=(0, 2), **{option: 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "codes", "message"),
    [
        ("killed", [2, -9], "a rank exited early, so nothing was written; see its error"),
        ("terminated", [2, 2], "a rank exited early, so nothing was written; see its error"),
        ("refused", [2, 2], "no weights here; look for them"),
    ],
)
def test_a_rank_that_ends_early_ends_the_run(ran, ending, codes, message):
    """One line from the first rank, and nothing written."""
    ended, printed, out = ran[ending]
    assert ended == codes, printed
    assert printed[0] == "" and printed[2] == printed[3] == ""
    assert printed[1].startswith(f"sedetect: {message}") and printed[1].count("\n") == 1
    assert not out.exists()
