"""Streamed profiles that end early: whatever kills them, the same command goes on, and another one is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TEXTS, save_random
from support.command import files_of, refused, run
from support.compare import assert_same, assert_same_profile
from support.models import COMMON
from transformers import Qwen3MoeConfig

import sedetect
from sedetect import ModelStats, SedetectError
from sedetect.checkpoints import memory
from sedetect.profiling import resume, streaming
from sedetect.profiling.resume import Progress

SHORT = sedetect.Text(tokens=400, seq_len=16, batch_size=3)
ARGS = ("--tokens", 400, "--seq-len", 16, "--batch-size", 3, "--stream")
RESULTS = {
    "run.json",
    "stats.safetensors",
    "super_experts.json",
    *(f"domains/{domain}.safetensors" for domain in TEXTS),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    sizes = {"num_hidden_layers": 6, "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8}
    config = Qwen3MoeConfig(**COMMON | sizes)
    return save_random(config, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain, (text,) in TEXTS.items():
        (folder / f"{domain}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint, data, tmp_path_factory) -> Path:
    """The results of the resident model."""
    out = tmp_path_factory.mktemp("expected")
    assert run("profile", checkpoint, "--data", data, "-o", out, *ARGS[:-1], "--no-stream").code == 0
    return out


def assert_results(out: Path, expected: Path) -> None:
    """The same results, and nothing but them."""
    assert files_of(out) == RESULTS
    for name in RESULTS - {"run.json", "super_experts.json"}:
        assert_same(ModelStats.load(out / name), ModelStats.load(expected / name))
    assert json.loads((out / "super_experts.json").read_text()) == json.loads(
        (expected / "super_experts.json").read_text()
    )


# Forks a run of the command line at a time, each of which kills itself at a random one of its function calls (C ones,
# such as fsync and rename, too) after it has opened the folder to resume from, before which it writes nothing. Nothing
# is computed before the forks, so that no thread is lost in them.
KILLER = """
import json, os, random, shutil, signal, sys

from sedetect import cli
from sedetect.profiling import pipeline, record, resume  # before the forks
from sedetect.ranking import rule, saliencies

out, kills = sys.argv.pop(1), int(sys.argv.pop(1))
chosen, killed, resumed, calls, number = random.Random(7), 0, [], 0, 0

def count(frame, event, argument):
    global number
    number += event in ("call", "c_call")
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)

def begin(self, *args):
    sys.setprofile(count)
    opened(self, *args)

opened, resume.Progress.__init__ = resume.Progress.__init__, begin

def attempt():
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            cli.main()
        except SystemExit as ended:
            sys.setprofile(None)
            os.write(writing, str(number).encode())
            os._exit(ended.code)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code, int(os.read(reading, 20) or 0)

last = -1
calls = attempt()[1]
shutil.rmtree(out)
while killed < kills:
    progress = os.path.join(out, "resume", "progress.json")
    layers = json.load(open(progress))["layers"] if os.path.exists(progress) else 0
    last = chosen.randrange(calls * (7 - layers) // 7)
    code, _ = attempt()
    killed += code != 0
    resumed.append(layers)
    if killed < kills and (code == 0 or layers == 6):  # begin anew, so that not every kill is near the end
        shutil.rmtree(out)
last = -1
assert attempt()[0] == 0
print(json.dumps(resumed))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(checkpoint, data, expected, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLER, out, 10, "profile", checkpoint, "--data", data, "-o", out, *ARGS]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert len(resumed) >= 10 and max(resumed) >= 3 and len(set(resumed)) > 2
    assert_results(out, expected)


def stopping(batches: int):
    """A stop() that lets so many batches run."""
    asked = iter(range(batches))
    return lambda: next(asked, None) is None


def test_stopped_and_continued(checkpoint, tmp_path):
    """Nine batches a layer; two stops within layers, then to the end, then once more from what is finished."""
    settings = {"text": SHORT, "measuring": sedetect.Measuring(channels=True), "stream": True}
    expected = sedetect.profile_model(checkpoint, TEXTS, **settings)
    settings["resume"] = tmp_path / "r"
    for batches, resumed, finished in ((20, 0, 2), (25, 2, 4)):
        cut = sedetect.profile_model(checkpoint, TEXTS, **settings, stop=stopping(batches))
        assert cut.interrupted and not cut.domains and not cut.stats.banks
        assert (cut.streamed.resumed, cut.streamed.resumed + cut.streamed.layers) == (resumed, finished)
    done = sedetect.profile_model(checkpoint, TEXTS, **settings)
    assert (done.streamed.resumed, done.streamed.layers) == (4, 2)
    assert done.seconds > done.streamed.compute / 2 > 0
    again = sedetect.profile_model(checkpoint, TEXTS, **settings, stop=lambda: pytest.fail("a batch was run"))
    assert (again.streamed.resumed, again.streamed.layers) == (6, 0)
    for result in (done, again):
        assert not result.interrupted
        assert_same_profile(result, expected)
    assert not list((tmp_path / "r").glob("hidden*"))


@pytest.fixture(scope="module")
def begun(checkpoint, tmp_path_factory) -> Path:
    """The folder of a profile that was stopped in its second layer."""
    folder = tmp_path_factory.mktemp("begun") / "r"
    settings = {"text": SHORT, "stream": True, "resume": folder}
    assert sedetect.profile_model(checkpoint, TEXTS, **settings, stop=stopping(12)).streamed.layers == 1
    return folder


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"text": replace(SHORT, tokens=300)}, "windows"),
        ({"text": replace(SHORT, seq_len=20, tokens=500)}, "window"),
        ({"text": replace(SHORT, seed=3)}, "text"),
        ({"text": replace(SHORT, batch_size=2)}, "batch size"),
        ({"measuring": sedetect.Measuring(channels=True)}, "channels"),
        ({"loading": sedetect.Loading(dtype="float64")}, "dtype"),
        ({"loading": sedetect.Loading(attn="eager")}, "attention"),
        ({"measuring": sedetect.Measuring("torch")}, "backend"),
        ({"texts": {**TEXTS, "greek": ["omega " * 400]}}, "text"),
        ({"texts": {name: TEXTS[name] for name in reversed(TEXTS)}}, "domains"),
    ],
)
def test_another_run_is_refused(checkpoint, begun, changes, name):
    settings = {"texts": TEXTS, "text": SHORT, "stream": True, "resume": begun}
    before = (begun / "progress.json").read_text()
    with pytest.raises(SedetectError) as caught:
        sedetect.profile_model(checkpoint, **settings | changes)
    assert str(caught.value).startswith(f"{begun}: an unfinished profile is there with {name} ")
    assert "repeat the first command, or delete that folder to begin anew" in str(caught.value)
    assert (begun / "progress.json").read_text() == before


def test_another_model_and_damaged_files_are_refused(checkpoint, begun, tmp_path):
    settings = {"texts": TEXTS, "text": SHORT, "stream": True}
    folder = shutil.copytree(begun, tmp_path / "r")
    other = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    weights = load_file(other / "model.safetensors")
    for weight in weights.values():
        weight.neg_()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SedetectError, match=r"is there with weights \"\w+\", now it is \"\w+\"; repeat"):
        sedetect.profile_model(other, **settings, resume=folder)

    hidden = folder / "hidden-1" / "00004.safetensors"
    hidden.write_bytes(hidden.read_bytes()[:-1])
    with pytest.raises(SedetectError, match=r"00004.safetensors: cannot be read .* to begin anew"):
        sedetect.profile_model(checkpoint, **settings, resume=folder)
    (folder / "statistics" / "000.1.safetensors").unlink()
    with pytest.raises(SedetectError, match=r"000.1.safetensors: no such statistics file"):
        sedetect.profile_model(checkpoint, **settings, resume=folder)
    (folder / "progress.json").write_text("{}")
    with pytest.raises(
        SedetectError, match="progress.json: is a document without format.* delete its folder to start over"
    ):
        sedetect.profile_model(checkpoint, **settings, resume=folder)
    with pytest.raises(SedetectError, match="holds something else than an unfinished profile"):
        sedetect.profile_model(checkpoint, **settings, resume=checkpoint)
    (folder / "progress.json").unlink()  # as a finished run does first that is killed while it cleans up
    shutil.rmtree(folder / "statistics")
    assert sedetect.profile_model(checkpoint, **settings, resume=folder).streamed.resumed == 0


def test_command_line(checkpoint, data, expected, tmp_path, monkeypatch):
    """Ctrl-C, the message, the same command again, and another one in between."""
    command = ("profile", checkpoint, "--data", data, "-o", tmp_path, *ARGS)
    original, calls = streaming.run_tokens, []

    def interrupting(model, ids):
        calls.append(None)
        if len(calls) == 21:  # in the third layer; one call is the trial
            os.kill(os.getpid(), signal.SIGINT)
        original(model, ids)

    monkeypatch.setattr(streaming, "run_tokens", interrupting)
    cut = run(*command)
    assert cut.code == 130 and cut.out == ""
    assert "; 2 layers are finished; the same command resumes from there" in cut.err
    assert "unfinished profile is there with batch size 3, now it is 2;" in refused(run(*command, "--batch-size", 2))
    done = run(*command)
    assert done.code == 0 and "streamed 4 layers, 2 were finished before: read " in done.out
    assert_results(tmp_path, expected)
    again = run(*command, "--no-resume")
    assert again.code == 0 and "kept for a restart 0.00 s" in again.out
    assert_results(tmp_path, expected)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    chosen = run(*(word for word in command if word != "--stream"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert chosen.code == 0 and f"of weights do not fit the 100 kB free on {device}" in chosen.err
    assert "streamed 6 layers: " in chosen.out
    assert_results(tmp_path, expected)


def test_hidden_states_are_written_beside_the_computation(tmp_path, monkeypatch):
    """By a thread, at most two batches behind; finish() waits for them, and what failed there is said here."""
    held, begun, written = threading.Semaphore(0), [], []

    def slow(tensors, file, metadata):
        begun.append(file)
        assert held.acquire(timeout=20)
        save_file(tensors, file, metadata)
        written.append(file)

    monkeypatch.setattr(resume, "save_file", slow)
    progress = Progress(tmp_path / "r", {})
    batches = [torch.full((2, 3), float(i)) for i in range(4)]
    for number in (0, 1):
        progress.write_hidden(1, number, batches[number])
    assert written == []
    threading.Timer(0.05, held.release).start()
    progress.write_hidden(1, 2, batches[2])  # waits for the first
    assert len(written) == 1 and progress.waited > 0.03
    for _ in range(2):
        held.release()
    progress.finish(0, [], 1.0, last=False)
    assert len(written) == 3 and progress.seconds > 0
    for number in (0, 1, 2):
        assert torch.equal(progress.read_hidden(1, number), batches[number])

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(resume, "save_file", full)
    progress.write_hidden(2, 0, batches[0])
    with pytest.raises(SedetectError, match=r"00000.safetensors: cannot be written \(no space\); free space"):
        progress.finish(1, [], 1.0, last=False)
    progress.close()
    assert Progress(tmp_path / "r", {}).layers == 1
