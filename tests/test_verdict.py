"""Verdicts from the command line: with the residual stream as evidence, and "none" where there is no candidate."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import INDEX, put_model
from support.command import SMALL, files_of, ranked, refused, row, run
from support.models import TINY, random_model

import sedetect
from sedetect import ModelStats, SedetectError
from sedetect.cli.tables import evidence
from sedetect.profiling import pipeline
from sedetect.stats.residual import Residual

TEXT = ("--tokens", 2048, "--seq-len", 128)


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    out = tmp_path_factory.mktemp("observed")
    return run("profile", TINY, "-o", out, *TEXT, "--residual", 4), out


def test_profile_judges_by_the_residual_stream(observed):
    (code, out, err), folder = observed
    assert code == 0 and err == ""
    assert {"stats.safetensors", "super_experts.json", "residual.json"} <= files_of(folder)
    document = ranked(folder / "super_experts.json")
    assert document["criteria"]["residual"] is True
    (found,), (late,) = document["super_experts"], document["others"]
    assert (found["name"], found["carried"], found["verdict"]) == ("L1E28", True, "candidate")
    assert (late["name"], late["carried"], late["verdict"]) == ("L9E7", False, "candidate")
    lines = out.splitlines()
    (mine,) = [line for line in lines if line.startswith("L1E28: ")]
    assert mine.endswith("; writes 100% of a massive activation in channel 101, carried to L9")
    assert f"|y| {found['first_max']:.4g} on first tokens, {found['rest_max']:.4g} on the rest" in mine
    assert f"mean routing weight {found['first_gate']:.2g} and {found['rest_gate']:.2g}" in mine
    (other,) = [line for line in lines if line.startswith("L9E7: ")]
    assert other.endswith("; writes no massive activation that later layers carry")
    assert (row(out, "L1E28")[-4:], row(out, "L9E7")[-4:]) == (
        ["yes", "yes", "yes", "candidate"],
        ["late", "yes", "no", "candidate"],
    )
    at = lines.index("massive activations form in L1, written by L1E28 (4 sequences observed)")
    assert lines[at + 1] == Residual.load(folder).sinks_line and lines[at + 1].startswith("attention sinks: ")
    assert Residual.load(folder) == Residual.load(folder / "residual.json")


def test_rank_takes_what_the_folder_holds(observed, tmp_path):
    folder = observed[1]
    for source in ([folder], [folder / "stats.safetensors", "--residual", folder / "residual.json"]):
        out = run("rank", *source, "--layers", 1).out
        assert (row(out, "L1E28")[-2:], row(out, "L9E7")[-2:]) == (["yes", "candidate"], ["no", "candidate"])
        out = run("rank", *source, "--layers", "data", "-o", tmp_path / "ranking.json").out
        assert out.startswith("2 candidates: L1E28 ")
        document = ranked(tmp_path / "ranking.json")
        assert document["population"] == 256 and document["criteria"]["layers"] == "data"
    out = run("rank", folder / "stats.safetensors", "--layers", 1).out
    assert row(out, "L1E28")[-2:] == row(out, "L9E7")[-2:] == ["yes", "candidate"]  # as first tokens have it
    assert "carried" not in out and "writes" not in out


def test_residual_refusals(observed, tmp_path):
    stats = observed[1] / "stats.safetensors"
    assert "layers 'data' needs" in refused(run("rank", stats, "--layers", "data"))
    assert "--layers zork" in refused(run("rank", stats, "--layers", "zork"))
    assert "residual.json: no such file" in refused(run("rank", stats, "--residual", tmp_path / "residual.json"))
    damaged = tmp_path / "damaged.json"
    bad = {
        "{": "is not valid JSON",
        "[]": "is a document without format",
        '{"format": "sedetect-residual", "version": "1"}': "damaged",
    }
    for text, said in bad.items():
        damaged.write_text(text)
        assert f"damaged.json: {said}" in refused(run("rank", stats, "--residual", damaged))
    document = json.loads((observed[1] / "residual.json").read_text())
    damaged.write_text(json.dumps(document | {"version": "2"}))
    assert "is sedetect-residual version 2, not" in refused(run("rank", stats, "--residual", damaged))
    damaged.write_text(json.dumps(document | {"model": "another", "digest": "0"}))
    assert "the residual stream is that of another (0)" in refused(run("rank", stats, "--residual", damaged))
    assert "--residual 0: must be at least 1" in refused(run("profile", TINY, "--residual", 0))


def test_a_random_model_has_none(tmp_path):
    model = put_model(tmp_path / "random")
    code, out, err = run("profile", model, *SMALL, "--residual", 2)
    assert code == 0 and err == "" and out.startswith("no candidate: ")
    assert "no massive activation that a later layer carries (2 sequences observed)" in out
    code, out, err = run("ablate", model, *SMALL, "-o", tmp_path / "out")
    assert code == 0 and err == "" and out.startswith("--experts candidates: no candidate: ")
    assert "nothing to switch off" in out and not (tmp_path / "out").exists()


def test_tiny_moe_without_its_super_expert(tmp_path):
    """Its down_proj zeroed in the file: nothing stands out, and nothing massive is left to carry. What feeds it is the
    largest on BOS then, a candidate by that sign alone."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    weight = "model.layers.1.mlp.experts.28.down_proj.weight"
    shard = model / json.loads((model / INDEX).read_text())["weight_map"][weight]
    tensors = load_file(shard)
    save_file(tensors | {weight: torch.zeros_like(tensors[weight])}, shard, {"format": "pt"})
    code, out, err = run("profile", model, "-o", tmp_path / "out", *TEXT, "--residual", 4)
    assert code == 0 and err == "" and out.startswith("1 candidate: L0E24 (|y| 26")
    document = ranked(tmp_path / "out" / "super_experts.json")
    judged = {expert["name"]: expert for expert in document["super_experts"] + document["others"]}
    assert {name for name, one in judged.items() if one["verdict"] is not None} == {"L0E24"}
    assert judged["L0E24"]["signature"] and judged["L0E24"]["ratio"] < 1.1 and not judged["L0E24"]["carried"]
    assert "L9E7" not in judged  # it fires on the activation that is gone
    assert Residual.load(tmp_path / "out").forming_layers == []


def test_a_profile_outlives_its_observation(tmp_path, monkeypatch):
    """What fails or is stopped after the profile does not lose it, and a residual stream of another run goes."""
    (tmp_path / "residual.json").write_text("{}")
    model = put_model(tmp_path / "model")

    def fail(*args, **options):
        raise SedetectError("layer 0: no residual stream")

    monkeypatch.setattr(pipeline, "observe_residual", fail)
    code, out, err = run("profile", model, *SMALL, "--residual", 2, "-o", tmp_path)
    assert (
        code == 0
        and err == ""
        and "note: the residual stream was not observed: " in out
        and "no residual stream" in out
    )
    assert not (tmp_path / "residual.json").exists() and ModelStats.load(tmp_path).header.tokens == 256

    def stopped(*args, progress, **options):
        progress(16)

    monkeypatch.setattr(pipeline, "observe_residual", stopped)
    done = []
    result = pipeline.profile_model(
        model,
        text=sedetect.Text(tokens=256, seq_len=16),
        residual=2,
        stop=lambda: len(done) > 0,
        progress=lambda domain, *_: done.append(1) if domain == "residual" else None,
    )
    assert result.interrupted and result.residual is None and result.stats.header.tokens == 256


def test_a_reader_that_leaves(observed, tmp_path):
    """`sedetect rank ... | head -1`: the file is there, and the exit code is not that of sets that differ."""
    file = tmp_path / "ranking.json"
    command = [sys.executable, "-m", "sedetect", "rank", str(observed[1]), "-o", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141 and ranked(file)["format"] == "sedetect-ranking"


def test_text_of_users_is_no_picture(observed):
    assert "random:x: x is not a number" in refused(run("ablate", TINY, "--experts", "random:x"))


def test_a_draw_is_repeatable():
    names = [run("analyze", "residual", TINY, *TEXT, "--sequences", 1, "--ablate", "random:2").out for _ in range(2)]
    assert names[0] == names[1] and "without L" in names[0]


def test_evidence_of_one_token():
    """No other token to compare with, and none is needed: first tokens are compared with each other."""
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.tensor([[5], [6]]))
    (expert, *_) = sedetect.rank(prof.stats, min_value=0, min_ratio=0).super_experts
    assert expert.signature and evidence(expert).startswith(
        f"{expert}: |y| {expert.first_max:.4g} on first tokens, no row on the rest"
    )


def test_evidence_of_what_was_not_observed():
    """Rows that cannot be mapped: nothing is said of first tokens."""
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))
    (expert, *_) = sedetect.rank(prof.stats, min_value=0, min_ratio=0).super_experts
    assert expert.signature is None and evidence(expert) == f"{expert}: first tokens not observed"
