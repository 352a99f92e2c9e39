"""The command line as a user meets it: what is printed, which files are written, what is refused and how.

Most runs are in this process, because importing transformers takes seconds; what depends on the process (streams,
Ctrl-C) runs in one of its own.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import INDEX, put_model, put_tokenizer
from support.command import SMALL, Result, files_of, ranked, refused, row, run, spawn
from support.compare import assert_same
from support.models import TINY

import sedetect
from sedetect import ModelStats, SedetectError, SuperExpert
from sedetect.cli.shared import flag
from sedetect.errors import Argument
from sedetect.models.loading import load_tokenizer
from sedetect.ops.choose import choose_backend
from sedetect.profiling import pipeline
from sedetect.stats.place import BankId

# Serves tiny-moe in its own precision on the device that is chosen where none is named.
BACKEND = choose_backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)[0].name
DOMAINS = ["english", "chinese", "mathematics", "code"]
LAYERS, EXPERTS, TOP_K = 10, 32, 4  # of tiny-moe


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_coverage(out: str, stats: ModelStats) -> None:
    """The coverage line, against the row counts of the file."""
    rows = torch.cat([state.rows for state in stats.banks.values()])
    unseen, few = int((rows == 0).sum()), int(((rows > 0) & (rows < 32)).sum())
    none, others = f"{unseen} saw none" if unseen else "", f"{few} {'others' if unseen else 'of them'} fewer than 32"
    parts = ", ".join(part for part in (none, others if few else "") if part)
    end = f"; {parts}: " if parts else ", none fewer than 32\n"
    assert f"coverage: {len(rows)} routed experts saw {rows.min():,} to {rows.max():,} rows{end}" in out


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[Result, Path]:
    """tiny-moe profiled on the embedded corpus, in the checkpoint's own precision."""
    out = tmp_path_factory.mktemp("profiled") / "new" / "folder"
    return run("profile", TINY, "-o", out, "--tokens", 4096), out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random checkpoint; copy it to damage it."""
    return put_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_stats(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small-stats")
    assert run("profile", small, "-o", out, *SMALL).code == 0
    return out / "stats.safetensors"


@pytest.fixture
def copy(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


# profile


def test_finds_the_super_expert(profiled):
    code, out, err = profiled[0]
    assert code == 0 and err == ""
    assert out.startswith("2 candidates: L1E28 (|y| 12")
    value, _, channel, position, *rest = row(out, "L1E28")[1:]
    assert float(value) == pytest.approx(1262, rel=0.01)
    assert (channel, position, rest) == ("101", "0", ["'<|bos|>'", "yes", "yes", "candidate"])
    value, _, channel, position, *rest = row(out, "L9E7")[1:]
    assert float(value) == pytest.approx(1088, rel=0.01)
    assert (channel, position, rest) == ("159", "0", ["'<|bos|>'", "late", "yes", "candidate"])
    assert f"each domain alone ({', '.join(DOMAINS)}): L1E28, L9E7\n" in out


def test_says_what_was_run(profiled):
    (_, out, _), folder = profiled
    speed = r"in (\d+\.\d) s \(([\d,]+) tokens/s\)"
    line = re.search(rf"tiny-moe \(bfloat16\): 4,096 tokens in 8 sequences {speed}, backend {BACKEND}\n", out)
    seconds, rate = float(line[1]), float(line[2].replace(",", ""))
    assert 4096 / (seconds + 0.06) - 1 < rate < 4096 / max(seconds - 0.06, 1e-9) + 1  # seconds are rounded to 0.1
    assert_coverage(out, ModelStats.load(folder / "stats.safetensors"))
    assert out.endswith(f"written to {folder}\n")


def test_files_written(profiled):
    folder = profiled[1]
    domains = {f"domains/{domain}.safetensors" for domain in DOMAINS}
    assert files_of(folder) == {"stats.safetensors", "super_experts.json", "run.json"} | domains
    stats = ModelStats.load(folder / "stats.safetensors")
    assert sorted(stats.banks) == [BankId("decoder", layer, "routed") for layer in range(LAYERS)]
    for bank, state in stats.banks.items():
        assert state.num_experts == EXPERTS and state.rows.sum() == 4096 * TOP_K, bank
        assert state.first_rows.sum() == 8 * TOP_K, bank


def test_ranking_document(profiled):
    document = ranked(profiled[1] / "super_experts.json")
    assert list(document) == [
        "format", "version", "model", "headline", "super_experts", "others", "population", "maximum",
        "percentile_value", "threshold", "layer_limits", "unseen", "nonfinite", "criteria", "notes",
    ]  # fmt: skip
    assert (document["format"], document["version"]) == ("sedetect-ranking", "1")
    assert document["headline"] == profiled[0].out.splitlines()[0]
    assert document["population"] == 256 and document["layer_limits"] == {"decoder": 8} and document["nonfinite"] == []
    assert document["maximum"] == pytest.approx(1262, rel=0.01) and document["threshold"] == document["maximum"] / 10
    assert document["criteria"]["percentile"] == 99.5 and document["criteria"]["compat"] is None
    (found,), (late,) = document["super_experts"], document["others"]
    for expert in (found, late):
        assert set(expert) == {"name", "token"} | {field.name for field in fields(SuperExpert)}
    wanted = {
        "name": "L1E28", "stack": "decoder", "layer": 1, "kind": "routed", "expert": 28, "value": document["maximum"],
        "channel": 101, "position": 0, "token_id": 0, "token": "<|bos|>", "signature": True, "late": False,
        "verdict": "candidate", "reason": None,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert (late["name"], late["late"], late["verdict"], late["token"]) == ("L9E7", True, "candidate", "<|bos|>")


def test_domains_merge_to_the_whole(profiled, tmp_path):
    folder = profiled[1]
    parts = [folder / "domains" / f"{domain}.safetensors" for domain in DOMAINS]
    whole = ModelStats.load(folder / "stats.safetensors")
    for domain, part in zip(DOMAINS, parts):
        header = ModelStats.load(part).header
        assert header.tokens == 1024 and [source.info["domain"] for source in header.sources.values()] == [domain]
    for order in (parts, parts[::-1]):
        code, out, err = run("merge", *order, "-o", tmp_path / "merged.safetensors")
        assert code == 0 and err == "" and f"4,096 tokens in 8 sequences, backend {BACKEND}" in out
        assert row(out, "L1E28")[-1] == "candidate"
        merged = ModelStats.load(tmp_path / "merged.safetensors")
        assert merged.header.to_json() == whole.header.to_json() and merged.banks.keys() == whole.banks.keys()
        assert all(state.equal(whole.banks[bank]) for bank, state in merged.banks.items())


def test_same_as_the_library(small, small_stats):
    result = sedetect.profile_model(small, text=sedetect.Text(tokens=256, seq_len=16))
    assert_same(result.stats, ModelStats.load(small_stats))


def test_no_candidate_in_a_random_model(small, small_stats):
    code, out, err = run("profile", small, *SMALL)
    assert code == 0 and err == ""
    assert out.startswith("no candidate: the rule names 1 of 16 because it always names at least one expert")
    assert "written to" not in out
    document = ranked(small_stats.with_name("super_experts.json"))
    assert [expert["verdict"] for expert in document["super_experts"]] == [None]
    assert row(out, document["super_experts"][0]["name"])[-1] == "-"
    assert f"each domain alone ({', '.join(DOMAINS)}): none\n" in out


def test_options_reach_the_statistics(small, small_stats, tmp_path):
    options = ("--channels", "--coactivation", "--backend", "torch", "--dtype", "bfloat16", "--seed", 1)
    code, out, err = run("profile", small, "-o", tmp_path, *SMALL, *options, "--batch-size", 3)
    assert code == 0 and err == "" and "(bfloat16): 256 tokens in 16 sequences" in out and "backend torch\n" in out
    plain, stats = ModelStats.load(small_stats), ModelStats.load(tmp_path / "stats.safetensors")
    assert stats.header.dtype == "bfloat16" and plain.header.dtype == "float32"
    assert stats.header.window == plain.header.window == 16
    assert {name for bank in stats.header.banks.values() for name in bank.backends} == {"torch"}
    for bank, state in stats.banks.items():
        assert state.channel_max.shape == (8, 32) and state.in_channel_sq.shape == (8, 24)
        assert torch.equal(state.coactivation.diagonal(), state.rows)
        assert plain.banks[bank].channel_max is None and plain.banks[bank].coactivation is None
    assert [source.ranges for source in plain.header.sources.values()] == [[[0, 4]]] * 4
    assert all(source.ranges != [[0, 4]] for source in stats.header.sources.values())


def test_rerun_with_fewer_domains(small, tmp_path):
    """Statistics of domains that are no longer there go; files of others stay."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in "ab":
        (data / f"{name}.txt").write_text(f"the {name} of everything " * 50)
    (out / "domains").mkdir(parents=True)
    (out / "domains" / "notes.txt").touch()
    common = {"stats.safetensors", "super_experts.json", "run.json", "domains/notes.txt"}
    assert run("profile", small, "-o", out, "--data", data, *SMALL).code == 0
    assert files_of(out) == common | {"domains/a.safetensors", "domains/b.safetensors"}
    assert run("profile", small, "-o", out, "--data", data / "a.txt", *SMALL).code == 0
    assert files_of(out) == common | {"domains/a.safetensors"}
    assert_same(ModelStats.load(out / "stats.safetensors"), ModelStats.load(out / "domains" / "a.safetensors"))


def test_text_that_runs_short_is_said(small, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four " * 50)
    code, out, _ = run("profile", small, "-o", tmp_path / "out", "--data", tmp_path / "a.txt", "--seq-len", 16)
    used = ModelStats.load(tmp_path / "out" / "stats.safetensors").header.tokens
    assert code == 0 and 0 < used < 1000 and used % 16 == 0
    assert f"note: 32768 tokens asked, {used} used" in out


def test_unused_weights_are_noted(copy):
    shard = next(copy.glob("model-00001*"))
    save_file(load_file(shard) | {"model.extra.weight": torch.ones(3)}, shard, {"format": "pt"})
    index = json.loads((copy / INDEX).read_text())
    edit_json(copy / INDEX, weight_map=index["weight_map"] | {"model.extra.weight": shard.name})
    code, out, err = run("profile", copy, *SMALL)
    assert code == 0 and err == "" and "1 weights are not used" in out and "model.extra.weight" in out


def test_terminal_that_cannot_show_a_token(small, tmp_path):
    """Every expert's largest row is a Chinese token here, which ASCII cannot show; and stderr stays empty."""
    (tmp_path / "a.txt").write_text("的一是在不了有和人这" * 200, encoding="utf-8")
    code, out, err = spawn("profile", small, "--data", tmp_path / "a.txt", *SMALL, PYTHONIOENCODING="ascii")
    assert code == 0 and err == "" and out.isascii() and "'\\u" in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "Inf"])
def test_nonfinite_weight(tmp_path, value):
    """One bad element in layer 3, expert 5: named as the birthplace, everything before and beside it unharmed."""
    model, out = Path(shutil.copytree(TINY, tmp_path / "model")), tmp_path / "out"
    weight = "model.layers.3.mlp.experts.5.down_proj.weight"
    shard = model / json.loads((model / INDEX).read_text())["weight_map"][weight]
    tensors = load_file(shard)
    tensors[weight][7, 3] = value
    save_file(tensors, shard, {"format": "pt"})

    code, text, err = run("profile", model, "-o", out, "--tokens", 1024, "--seq-len", 128)
    assert code == 0 and err == ""
    headline = text.splitlines()[0]
    assert headline.startswith("1 candidate: L1E28") and headline.endswith("; non-finite values from L3E5 on")
    assert row(text, "L1E28")[-1] == "candidate"
    document = ranked(out / "super_experts.json")
    assert document["nonfinite"][0] == "L3E5" and all(int(name[1]) > 3 for name in document["nonfinite"][1:])
    assert document["population"] == 256 - sum(int(name[1]) < 8 for name in document["nonfinite"])
    (found,) = document["super_experts"]
    assert found["value"] == pytest.approx(1262, rel=0.01) and found["channel"] == 101
    stats = ModelStats.load(out / "stats.safetensors")
    assert_coverage(text, stats)  # a token of NaN is routed to the same few experts
    states = [stats.banks[BankId("decoder", layer, "routed")] for layer in range(LAYERS)]
    assert all(states[layer].nonfinite.sum() == 0 for layer in range(3))
    born = states[3].nonfinite
    assert born[5] == states[3].rows[5] > 0 and born.sum() == born[5]  # one element in every row


# rank


def test_rank_is_what_profile_printed(profiled):
    (_, printed, _), folder = profiled
    code, out, err = run("rank", folder / "stats.safetensors")
    assert code == 0 and err == "" and printed.splitlines()[0] in out.splitlines()
    for name in ("L1E28", "L9E7"):
        wanted = row(printed, name)
        wanted[5] = "#0"  # a statistics file has no tokenizer: the token's id
        assert row(out, name) == wanted


@pytest.mark.parametrize(
    "options, verdicts",
    [
        (["--layers", 1], {"L1E28": ("yes", "candidate"), "L9E7": ("yes", "candidate")}),
        (["--layers", 0.1], {"L1E28": ("late", "candidate"), "L9E7": ("late", "candidate")}),
        (["--fraction", 0.9], {"L1E28": ("yes", "candidate")}),
        (["--percentile", 0, "--fraction", 0.8], {"L1E28": ("yes", "candidate"), "L9E7": ("late", "candidate")}),
        (["--compat", "published-tool"], {"L1E28": ("yes", "candidate"), "L9E7": ("late", "candidate")}),
    ],
)
def test_rank_under_other_thresholds(profiled, tmp_path, options, verdicts):
    code, out, err = run("rank", profiled[1] / "stats.safetensors", *options, "-o", tmp_path / "new" / "ranking.json")
    assert code == 0 and err == ""
    for name in ("L1E28", "L9E7"):
        assert (name in verdicts) == (f" {name} " in out)
    for name, wanted in verdicts.items():
        assert tuple(row(out, name)[-3::2]) == wanted
    document = ranked(tmp_path / "new" / "ranking.json")
    for key in ("super_experts", "others"):
        for expert in document[key]:
            named = "yes" if key == "super_experts" else "late" if expert["late"] else "no"
            assert expert["token"] is None
            assert expert["name"] not in verdicts or verdicts[expert["name"]] == (named, expert["verdict"])
    for option, value in zip(options[::2], options[1::2]):
        assert document["criteria"][option.removeprefix("--")] == value
    compat = "--compat" in options
    assert document["threshold"] == (document["maximum"] // 10 if compat else pytest.approx(
        document["maximum"] * document["criteria"]["fraction"]
    ))  # fmt: skip


@pytest.mark.parametrize(
    "options, said",
    [
        (["--percentile", 100], "percentile 100.0"),
        (["--percentile", "nan"], "percentile nan"),
        (["--fraction", 1], "fraction 1.0"),
        (["--layers", 0], "layers 0.0"),
        (["--compat", "zork"], "Invalid value for '--compat': 'zork'"),
        (["--compat", "published-tool", "--fraction", 0.2], "fraction 0.2"),
    ],
)
def test_rank_refuses(small_stats, tmp_path, options, said):
    message = refused(run("rank", small_stats, *options, "-o", tmp_path / "ranking.json"))
    assert message.startswith(f"sedetect: {said} ") and not any(tmp_path.iterdir())


# merge


def test_the_same_file_twice(profiled, tmp_path):
    whole, part = profiled[1] / "stats.safetensors", profiled[1] / "domains" / "code.safetensors"
    for again in (whole, part):
        message = refused(run("merge", whole, again, "-o", tmp_path / "merged.safetensors"))
        assert f"{again}: source " in message and "given twice" in message
    assert not any(tmp_path.iterdir())


def test_statistics_of_another_model(small_stats, tmp_path):
    """Same config, other weights; same model, other precision."""
    other = put_model(tmp_path / "other", seed=1)
    assert run("profile", other, "-o", tmp_path / "a", *SMALL).code == 0
    a = tmp_path / "a" / "stats.safetensors"
    message = refused(run("merge", small_stats, a, "-o", tmp_path / "merged"))
    assert f"{a}: " in message and "digest" in message and str(small_stats.parent) not in message
    assert run("profile", other, "-o", tmp_path / "b", *SMALL, "--dtype", "bfloat16").code == 0
    b = tmp_path / "b" / "stats.safetensors"
    message = refused(run("merge", a, b, "-o", tmp_path / "merged"))
    assert f"{b}: " in message and "float32 and bfloat16" in message
    assert not (tmp_path / "merged").exists()


def test_merge_keeps_what_it_cannot_replace(small_stats, tmp_path):
    (tmp_path / "merged").mkdir()
    assert f"-o {tmp_path / 'merged'}: is a folder" in refused(run("merge", small_stats, "-o", tmp_path / "merged"))
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refused(run("merge", small_stats, "-o", tmp_path / "file" / "merged"))
    assert files_of(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "mine"


def _rewrite(source: Path, target: Path, metadata=lambda m: None, tensors=lambda t: None) -> None:
    with safe_open(source, "pt") as file:
        meta, data = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    metadata(meta)
    tensors(data)
    save_file(data, target, meta)


BAD_STATISTICS = {
    "missing": (lambda s, t: None, "no such statistics file"),
    "folder": (lambda s, t: t.mkdir(), "no such statistics file"),
    "empty": (lambda s, t: t.touch(), "damaged"),
    "truncated": (lambda s, t: t.write_bytes(s.read_bytes()[:-1]), "damaged"),
    "cut header": (lambda s, t: t.write_bytes(s.read_bytes()[:99]), "damaged"),
    "text": (lambda s, t: t.write_text("not a safetensors file"), "damaged"),
    "a checkpoint's shard": (lambda s, t: save_file({"a": torch.ones(1)}, t), "not a sedetect statistics file"),
    "another version": (
        lambda s, t: _rewrite(s, t, lambda m: m.update(version="99")), "version '99', this sedetect reads 1 and 2",
    ),
    "no header": (lambda s, t: _rewrite(s, t, lambda m: m.pop("header")), "damaged"),
    "header no JSON": (lambda s, t: _rewrite(s, t, lambda m: m.update(header="{")), "damaged"),
    "lost statistic": (lambda s, t: _rewrite(s, t, tensors=lambda d: d.pop("decoder.1.routed/rows")), "'rows'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATISTICS)
def test_bad_statistics(small_stats, tmp_path, case):
    damage, said = BAD_STATISTICS[case]
    bad, out = tmp_path / "bad", tmp_path / "out"
    damage(small_stats, bad)
    for args in (["rank", bad, "-o", out], ["merge", bad, "-o", out], ["merge", small_stats, bad, "-o", out]):
        message = refused(run(*args))
        assert message.startswith(f"sedetect: {bad}") and said in message
    assert not out.exists()


# Bad input to profile. Each case is what damages a copy of a good checkpoint, arguments, and what is said; {copy},
# {tmp} and {shard} stand for the copy's path, the folder it is in, and the name of its second shard.


def _dense(copy: Path) -> None:
    shutil.rmtree(copy)
    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(copy)
    put_tokenizer(copy)


def _vision(copy: Path) -> None:
    shutil.rmtree(copy)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.ViTModel(config).save_pretrained(copy)
    put_tokenizer(copy)


def _pickle_only(copy: Path) -> None:
    for file in copy.glob("model*"):
        file.unlink()
    torch.save({}, copy / "pytorch_model.bin")


def _truncate(copy: Path) -> None:
    with (copy / _shard(copy, 1)).open("rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)


def _grow_vocabulary(copy: Path) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens(["Zwölfboxkämpfer"])
    tokenizer.save_pretrained(copy)
    (copy / "a.txt").write_text("Zwölfboxkämpfer one two three " * 50, encoding="utf-8")


def _shard(copy: Path, number: int) -> str:
    return sorted(file.name for file in copy.glob("model-*.safetensors"))[number]


BAD_INPUT = {
    "missing path": (lambda c: shutil.rmtree(c), [], ["{copy}: no such folder"]),
    "a file": (lambda c: (shutil.rmtree(c), c.touch()), [], ["{copy}: is a file"]),
    "no hub name": (lambda c: None, ["a/b/c"], ["a/b/c: no such folder"]),
    "unreachable hub": (lambda c: None, ["nosuch/model"], ["nosuch/model: ", "hub", "connection"]),
    "empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), [], ["{copy}"]),
    "dense model": (_dense, [], ["Qwen3ForCausalLM: no MoE layer found", "Mixture-of-Experts"]),
    "no language model": (_vision, [], ["ViTModel: no MoE layer found", "Mixture-of-Experts"]),
    "truncated shard": (_truncate, [], ["{copy}/{shard}: ", "bytes where its header says", "again"]),
    "missing shard": (lambda c: (c / _shard(c, 1)).unlink(), [], ["{copy}/{shard}: missing (1 of ", "download"]),
    "pickle only": (_pickle_only, [], ["{copy}/pytorch_model.bin: pickled", "save_pretrained"]),
    "no weights": (lambda c: [f.unlink() for f in c.glob("model*")], [], ["{copy}: no model.safetensors"]),
    "unknown architecture": (
        lambda c: edit_json(c / "config.json", model_type="zork"), [], ["{copy}/config.json: ", "'zork'", "newer"],
    ),
    "no config": (lambda c: (c / "config.json").unlink(), [], ["{copy}"]),
    "no tokenizer": (lambda c: [f.unlink() for f in c.glob("tokenizer*")], [], ["{copy}: ", "tokenizer"]),
    "small vocabulary": (
        lambda c: put_model(c, vocab_size=64), [],
        ["tokenizer {copy}: ", "embedding has 64 rows", "saved with the model"],
    ),
    "large tokenizer": (
        _grow_vocabulary, ["--data", "{copy}/a.txt"], ["tokenizer {copy}: ", "id 4096,", "4096 rows"],
    ),
    "missing data": (lambda c: None, ["--data", "{tmp}/none.txt"], ["{tmp}/none.txt: no such file"]),
    "empty data": (lambda c: (c / "a.txt").touch(), ["--data", "{copy}/a.txt"], ["{copy}/a.txt: empty"]),
    "blank data": (lambda c: (c / "a.txt").write_text(" \n"), ["--data", "{copy}/a.txt"], ["{copy}/a.txt: empty"]),
    "folder without data": (lambda c: (c / "d").mkdir(), ["--data", "{copy}/d"], ["{copy}/d: no .txt"]),
    "data shorter than a window": (
        lambda c: (c / "a.txt").write_text("three words only"), ["--data", "{copy}/a.txt"],
        ["no domain fills a window", "--seq-len 16", "shorter windows"],
    ),
    "not UTF-8": (
        lambda c: (c / "a.txt").write_bytes(b"abc\xff" * 99), ["--data", "{copy}/a.txt"],
        ["{copy}/a.txt: not UTF-8 at byte 3", "iconv"],
    ),
    "another type of data": (
        lambda c: (c / "a.csv").write_text("text"), ["--data", "{copy}/a.csv"],
        ["{copy}/a.csv: ", "'.csv'", ".parquet"],
    ),
    "no tokens": (lambda c: None, ["--tokens", 0], ["--tokens 0: ", "at least 1"]),
    "no batch": (lambda c: None, ["--batch-size", 0], ["--batch-size 0: ", "at least 1"]),
    "no window": (lambda c: None, ["--seq-len", 1], ["--seq-len 1: ", "at least 2"]),
    "window beyond the model": (lambda c: None, ["--seq-len", 257], ["--seq-len 257: ", "256 positions"]),
    "negative seed": (lambda c: None, ["--seed", -1], ["--seed -1: ", "at least 0"]),
    "backend": (lambda c: None, ["--backend", "nonsense"], ["backend 'nonsense' ", "cpu, cuda, triton, torch"]),
    "dtype": (lambda c: None, ["--dtype", "nonsense"], ["--dtype nonsense: ", "float32"]),
    "integer dtype": (lambda c: None, ["--dtype", "int8"], ["--dtype int8: ", "float32"]),
    "device": (lambda c: None, ["--device", "nonsense"], ["--device nonsense: ", "use cpu"]),
    "attention": (lambda c: None, ["--attn", "nonsense"], ["{copy}: ", "nonsense"]),
    "chat template": (lambda c: None, ["--chat-template"], ["tokenizer {copy}: ", "leave out --chat-template"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(copy, tmp_path, case):
    damage, arguments, said = BAD_INPUT[case]
    shard, out = _shard(copy, 1), tmp_path / "out"

    def fill(text):
        return str(text).format(copy=copy, tmp=tmp_path, shard=shard)

    damage(copy)
    model = [] if arguments and "/" in str(arguments[0]) else [copy]
    before = files_of(tmp_path)
    message = refused(run("profile", *SMALL, "-o", out, *model, *map(fill, arguments)))
    for part in said:
        assert fill(part) in message
    assert not out.exists() and files_of(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "Usage"),
        (["profile"], "Missing argument 'MODEL'"),
        (["profile", "{model}", "--tokens", "many"], "--tokens"),
        (["profile", "{model}", "--nonsense"], "--nonsense"),
        (["profile", "{model}", "{model}"], "unexpected extra argument"),
        (["rank"], "Missing argument 'STATS'"),
        (["merge", "{model}"], "Missing option '-o'"),
        (["zork"], "'zork'"),
    ],
)
def test_malformed_command(small, arguments, said):
    code, out, err = run(*(argument.format(model=small) for argument in arguments))
    assert code == 2 and said in out + err and "Traceback" not in err


def test_help():
    code, out, err = run("--help")
    assert code == 0 and err == "" and all(command in out for command in ("profile", "rank", "merge"))


def test_output_that_cannot_be_written(small, tmp_path):
    """Refused before the work; root may write anywhere, but not through a file."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "domains").touch()
    with mock.patch.object(pipeline, "profile_model", side_effect=AssertionError("the work was begun")):
        for out, obstacle in (("file", "file"), ("file/sub", "file"), ("taken", "taken/domains")):
            message = refused(run("profile", small, "-o", tmp_path / out))
            assert f"-o {tmp_path / out}: {tmp_path / obstacle} cannot be written" in message
    assert files_of(tmp_path) == {"file", "taken/domains"} and (tmp_path / "file").read_text() == "mine"


def test_refusal_in_a_process_of_its_own(copy):
    """The real streams: nothing of transformers, warnings or a progress bar beside the one line."""
    _dense(copy)
    assert "Qwen3ForCausalLM: no MoE layer found" in refused(spawn("profile", copy, *SMALL))


def test_training_mode_is_refused(small):
    model = transformers.AutoModelForCausalLM.from_pretrained(small).train()
    before = dict(vars(model))
    with pytest.raises(SedetectError, match=r"^Qwen3MoeForCausalLM: is in training mode; call model\.eval\(\)"):
        sedetect.profile(model)
    with pytest.raises(SedetectError, match="training mode"):
        sedetect.profile_model(model, text=sedetect.Text(tokens=256, seq_len=16), tokenizer=load_tokenizer(small))
    assert vars(model) == before and model.training
    with sedetect.profile(model.eval()) as prof:
        model(input_ids=torch.tensor([[0, 5, 6]]))
    assert prof.stats.header.tokens == 3


def test_an_argument_is_named_by_its_flag():
    """In Python by its name; the message is one."""
    parts = ["give ", Argument("seq_len"), " 8, ", Argument("granularity", "layer"), ", ", Argument("tool"), " or "]
    error = SedetectError(*parts, Argument("stream", False), " and ", Argument("first_rows", True))
    assert str(error) == "give seq_len 8, granularity='layer', tool or stream=False and first_rows=True"
    assert error.told(flag) == "give --seq-len 8, --granularity layer, --to or --no-stream and --first-rows"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Ctrl-C


def interrupted_run(after: int, times: int, *args) -> Result:
    """`sedetect profile ARGS` in this process, with Ctrl-C (so many times) after a number of batches."""
    # A shell lets what it starts in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    original = pipeline.profile_model

    def press() -> None:
        for _ in range(times):
            installed = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is installed:  # another thread may delay the handler
                time.sleep(0.001)

    def profile_model(*args, progress, **options):
        batches = []

        def watch(*step):
            progress(*step)
            batches.append(step)
            if len(batches) == after:
                press()

        if after == 0:
            press()
        return original(*args, progress=watch, **options)

    try:
        with mock.patch.object(pipeline, "profile_model", profile_model):
            result = run("profile", *args, *SMALL, "--batch-size", 1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    return result


def test_ctrl_c_without_output(small):
    code, out, err = interrupted_run(3, 1, small)
    assert code == 130 and "48 tokens in 3 sequences" in out
    assert err.splitlines() == [
        "stopping after this batch; press Ctrl-C again to abort",
        "interrupted after 48 of 256 tokens; nothing saved (no -o)",
    ]


def test_ctrl_c_in_the_second_domain(small, tmp_path):
    code, _, err = interrupted_run(6, 1, small, "-o", tmp_path)
    assert code == 130 and err.endswith(f"interrupted after 96 of 256 tokens; saved to {tmp_path}\n")
    tokens = {file.stem: ModelStats.load(file).header.tokens for file in (tmp_path / "domains").iterdir()}
    assert tokens == {"english": 64, "chinese": 32}
    stats = ModelStats.load(tmp_path / "stats.safetensors")
    assert stats.header.tokens == 96 and all(state.rows.sum() == 96 * 2 for state in stats.banks.values())


def test_ctrl_c_before_the_first_batch(small, tmp_path):
    code, out, err = interrupted_run(0, 1, small, "-o", tmp_path / "out")
    assert code == 130 and out == "" and err.endswith("interrupted after 0 of 256 tokens; nothing to save\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_twice_gives_up(small, tmp_path):
    code, out, err = interrupted_run(3, 2, small, "-o", tmp_path / "out")
    assert code == 130 and out == "" and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_at_a_terminal(tmp_path):
    """The signal itself, to a process whose progress bar has been seen to move."""
    screen, terminal = os.openpty()
    options = ("-o", tmp_path / "out", "--tokens", 32768, "--seq-len", 128, "--batch-size", 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "sedetect", "profile", *map(str, (TINY, *options))],
        env=os.environ | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=terminal, text=True,
    )  # fmt: skip
    os.close(terminal)
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    seen, asked = "", False
    try:
        while chunk := _read(screen):
            seen += chunk
            if not asked and "english" in seen:
                process.send_signal(signal.SIGINT)
                asked = True
        out, _ = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
        os.close(screen)
    assert asked and process.returncode == 130, seen

    stats = ModelStats.load(tmp_path / "out" / "stats.safetensors")
    tokens = stats.header.tokens
    assert 0 < tokens < 32768 and tokens % 128 == 0 and stats.header.sequences == tokens // 128
    for layer in range(LAYERS):
        assert stats.banks[BankId("decoder", layer, "routed")].rows.sum() == tokens * TOP_K
    seen = re.sub(r"\x1b\[[\d;]*m", "", seen)  # without colors
    assert f"interrupted after {tokens:,} of 32,768 tokens; saved to {tmp_path / 'out'}" in seen
    assert out.startswith("2 candidates: L1E28") and f"{tokens:,} tokens in" in out
    assert ranked(tmp_path / "out" / "super_experts.json")["super_experts"][0]["name"] == "L1E28"


def _read(terminal: int) -> str:
    """What a terminal's other side wrote; empty when it was closed."""
    try:
        return os.read(terminal, 4096).decode(errors="replace")
    except OSError:
        return ""
