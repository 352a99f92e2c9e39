"""Order of work: arguments are looked at before weights, what was found is printed before files are written, and inputs
are not written over; and runs of pruned models beside their originals."""

import json
import shutil
from pathlib import Path

import pytest
from support.command import refused, run
from transformers import PreTrainedModel

import sedetect
from sedetect.errors import SedetectError
from sedetect.files import check_space
from sedetect.models import loading
from sedetect.results import Results
from sedetect.stats.model import ModelStats

TINY = Path(__file__).parent / "data" / "tiny-moe"
SMALL = ("--tokens", 1024, "--seq-len", 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert run("profile", TINY, *SMALL, "-o", folder).code == 0
    return folder


@pytest.mark.parametrize(
    "command",
    [("profile",), ("ablate",), ("budget",), ("super-weights",), ("analyze", "residual"), ("analyze", "trace"),
     ("analyze", "outputs"), ("analyze", "routing"), ("prune", "-o", "out")],
    ids=" ".join,
)  # fmt: skip
def test_arguments_are_looked_at_before_weights(monkeypatch, tmp_path, command):
    def opened(*args, **options):
        raise AssertionError("weights are read")

    monkeypatch.chdir(tmp_path)
    for module in ("profiling.pipeline", "models.loading"):
        monkeypatch.setattr(f"sedetect.{module}.prepare_model", opened)
    name, *options = command if command[0] != "analyze" else (command[0], command[1])
    words = (name, *options, TINY) if name == "analyze" else (name, TINY, *options)
    assert "none.txt: no such file" in refused(run(*words, "--data", "none.txt"))
    assert "--tokens 0: must be at least 1" in refused(run(*words, "--tokens", 0))
    (tmp_path / "a.jsonl").write_text('{"body": 1}')
    assert "has no text, only 'body'" in refused(run(*words, "--data", "a.jsonl"))
    assert loading.prepare_model is opened


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("profile", TINY, "--chat-template"), "has no chat template; leave out --chat-template"),
        (("profile", TINY, "--data", "chats.jsonl"), "holds chats (messages); pass --chat-template"),
        (("profile", TINY, "--seq-len", 4096), "--seq-len 4096: the model has 2048 positions"),
        (("profile", TINY, "--stream", "--seq-len", 4096), "--seq-len 4096: the model has 2048 positions"),
        (("profile", TINY, "--data", "short.txt"), "no domain fills a window"),
        (("profile", TINY, "--backend", "fast"), "backend 'fast'"),
        (("profile", "more-tokens"), "the model's embedding has"),
        (("profile", "dense"), "no MoE layer found"),
        (("super-weights", TINY, "--seq-len", 4096), "the model has 2048 positions"),
        (("ablate", TINY, "--seq-len", 4096), "the model has 2048 positions"),
        (("ablate", TINY, "--experts", "L1E99"), "has no such expert"),
        (("ablate", TINY, "--experts", "L99E1,L1E28"), "has no such expert"),
        (("ablate", TINY, "--experts", "random:9999"), "--experts random:9999"),
        (("ablate", TINY, "--experts", "L1E1[5000,1]"), "name a weight inside"),
        (("ablate", TINY, "--stats", "other"), "statistics of another model"),
        (("ablate", TINY, "--stats", "none"), "no such"),
        (("prove", TINY, "--experts", "L1E99"), "has no such expert"),
        (("prove", TINY, "--stats", "other"), "statistics of another model"),
        (("prove", TINY, "--data", "short.txt"), "no domain fills a window"),
        (("budget", TINY, "--experts", "L1E99"), "has no such expert"),
        (("budget", TINY, "--stats", "other"), "statistics of another model"),
        (("budget", TINY, "--tokens", 512), "cannot be both profiled and evaluated"),
        (("analyze", "residual", TINY, "--ablate", "L1E99"), "has no such expert"),
        (("analyze", "residual", TINY, "--chat-template"), "has no chat template"),
        (("analyze", "trace", TINY, "--experts", "L9shared"), "has no such expert"),
        (("analyze", "trace", TINY, "--experts", "L1E28[1,2]"), "L1E28[1,2]: is a single weight"),
        (("analyze", "outputs", TINY, "--layers", "0,77"), "--layers 77: has no routed experts"),
        (("analyze", "outputs", TINY, "--backend", "fast"), "backend 'fast'"),
        (("analyze", "outputs", TINY, "--texts", ""), "gives no token"),
        (("analyze", "routing", TINY, "--layers", "77"), "--layers 77: has no routed experts"),
        (("analyze", "routing", TINY, "--stats", "other"), "statistics of another model"),
    ],
)  # fmt: skip
def test_config_and_tokenizer_refuse_before_weights(base, monkeypatch, tmp_path, command, told):
    def read(*args, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    monkeypatch.chdir(tmp_path)
    write_inputs(base)
    assert told in refused(run(*command))


def write_inputs(base):
    """In the working directory: a chat, a short text, statistics of another model, and checkpoints that do not fit."""
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a word " * 200}]}))
    Path("short.txt").write_text("a few words")
    stats = ModelStats.load(base)
    stats.header.digest = "0123456789abcdef-0"
    stats.save(Results("other").stats_path)
    for name, change in (("more-tokens", {"vocab_size": 50}), ("dense", {"model_type": "qwen3"})):
        folder = Path(name)
        folder.mkdir()
        for file in TINY.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        config = json.loads((TINY / "config.json").read_text()) | change
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))


def test_inputs_are_not_written_over(base, tmp_path):
    shutil.copytree(base, tmp_path / "a")
    file = tmp_path / "a" / "stats.safetensors"
    before = file.read_bytes()
    for words in (("merge", file, file, "-o", file), ("merge", tmp_path / "a", "-o", file), ("rank", file, "-o", file)):
        assert f"-o {file}: is one of the inputs" in refused(run(*words))
    for command in ("compare", "stability"):
        assert f"--json {file}: is one of the inputs" in refused(run(command, file, file, "--json", file))
    assert "is a folder; give the name of a file in it" in refused(run("merge", file, "-o", tmp_path))
    assert file.read_bytes() == before


def test_a_full_disk_loses_nothing_that_was_printed(base, monkeypatch, tmp_path):
    def full(*args, **options):
        raise SedetectError("cannot be written (No space left on device)")

    monkeypatch.setattr(ModelStats, "save", full)
    profiled = run("profile", TINY, *SMALL, "-o", tmp_path / "out")
    merged = run("merge", base, "-o", tmp_path / "merged.safetensors")
    monkeypatch.setattr("sedetect.analysis.common.write_atomic", full)
    monkeypatch.setattr("sedetect.documents.write_json", full)
    marks = ("--stats", base, "-o", tmp_path / "analyzed", "--layers", "1")
    analyzed = [run("analyze", *words, *marks) for words in (
        ("weights", TINY, "--pairs", 0), ("outputs", TINY, *SMALL), ("routing", TINY, *SMALL))]  # fmt: skip
    observed = run("analyze", "residual", TINY, "--sequences", 1, "--ablate", "L1E28", "-o", tmp_path / "observed")
    for code, out, err in (profiled, merged, *analyzed, observed):
        assert code == 2 and "L1E28" in out and "No space left" in err and "written to" not in out
    monkeypatch.undo()
    assert "bytes to write" in refusal(check_space, tmp_path / "new" / "folder", 10**18)


def test_results_are_saved_where_whoever_reads_has_left(base, monkeypatch, tmp_path):
    def left(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", left)
    for kind in ("weights", "routing"):
        with pytest.raises(BrokenPipeError):
            run("analyze", kind, TINY, "--layers", "1", "-o", tmp_path)
    with pytest.raises(BrokenPipeError):
        run("analyze", "trace", TINY, "--experts", "L1E28", *SMALL, "-o", tmp_path)
    assert set(Results(tmp_path).analyses()) == {"weights", "routing"}
    assert [str(one.expert) for one in Results(tmp_path).traces().experts] == ["L1E28"]


def refusal(function, *args) -> str:
    with pytest.raises(SedetectError) as caught:
        function(*args)
    return str(caught.value)


def test_base_beside_pruned(base, tmp_path):
    """Numbers of a pruned model are those of its original, by the pruning.json that the profile keeps."""
    small = tmp_path / "small"
    pruned = run("prune", TINY, "--stats", base, "-o", small)
    kept = json.loads((small / "pruning.json").read_text())["kept"]["decoder.1.routed"]
    assert f"experts are renumbered, as pruning.json says: L1E28 is L1E{kept.index(28)} now" in pruned.out
    assert run("profile", small, *SMALL, "-o", tmp_path / "after").code == 0
    assert Results(tmp_path / "after").pruning().kept == Results(small).pruning().kept
    for runs in ((base, tmp_path / "after"), (base / "stats.safetensors", tmp_path / "after" / "stats.safetensors")):
        compared = run("compare", *runs, "--json", tmp_path / "compared.json")
        assert compared.code == 0 and "the same candidates in all 2 runs: L1E28, L9E7" in compared.out
        assert "unrelated" not in compared.out
    document = json.loads((tmp_path / "compared.json").read_text())
    stats = [Results(folder).stats() for folder in (base, tmp_path / "after")]
    bank = sedetect.BankId("decoder", 1, "routed")
    moved = next(one for one in document["moved"] if one["name"] == "L1E28")
    assert moved["values"] == [
        float(stats[0].banks[bank].out_max[28]),
        float(stats[1].banks[bank].out_max[kept.index(28)]),
    ]
    assert document["steps"][0]["correlation"] > 0.8
    assert document["steps"][0]["experts"] <= sum(len(one) for one in Results(small).pruning().kept.values())
    # a map that is not this model's
    broken = json.loads((small / "pruning.json").read_text())
    broken["kept"]["decoder.1.routed"] = [0, 1]
    (tmp_path / "after" / "pruning.json").write_text(json.dumps(broken))
    assert "keeps 2 experts of decoder.1.routed, its statistics have 24" in refused(run("compare", *runs))
    (tmp_path / "after" / "pruning.json").unlink()
    assert "lacks pruning.json" in refused(run("compare", *runs))


def test_unrelated_models_are_said_to_be(base):
    stats = ModelStats.load(base)
    other = ModelStats.load(base)
    other.header.digest = "another"
    assert not sedetect.compare([stats, other]).notes
    for state in other.banks.values():
        for name in ("counts", "sums", "outliers", "first_outliers", "in_max"):
            setattr(state, name, getattr(state, name).flip(0))
    (note,) = sedetect.compare([stats, other], ["one", "two"]).notes
    assert note.startswith("two and one seem unrelated")


def test_a_budget_with_the_statistics_of_a_default_profile(base):
    """Evaluated is text that the profile did not see, as much as is asked for."""
    words = ("--tokens", 512, "--seq-len", 64, "--format", "int3", "--ratio", 0.25, "--controls", 1)
    code, out, err = run("budget", TINY, "--stats", base, *words)
    assert code == 0 and "on 512 tokens that are not among the calibrated windows" in out and not err
