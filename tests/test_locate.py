"""Locate: a walk of first tokens finds what a profile of text finds, and reads what these tokens use."""

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.checkpoints import put_tokenizer, save_random, to_fp8, to_mxfp4
from support.command import files_of, refused, row, run, spawn
from support.documents import SAMPLES
from support.families import FAMILIES, tiny_model
from support.models import CONFIGS, TINY
from support.servers import Faults, serving

import sedetect
from sedetect import SedetectError
from sedetect.checkpoints import web
from sedetect.models.layers import run_tokens
from sedetect.models.loading import load_model, load_tokenizer
from sedetect.profiling import walk
from sedetect.stats.proof import Proof

TRAINED = Path(__file__).parents[2] / "shared" / "models"
TOKENS = (5, 17, 33)  # beside the tokenizer's own, 0


def resident(model, found: sedetect.Located) -> sedetect.ModelStats:
    """The statistics of the same sequences through the whole model."""
    ids = torch.tensor(found.first_tokens)[:, None]
    with sedetect.profile(model, source=next(iter(found.stats.header.sources))) as prof:
        prof.batch(sequence_ids=torch.arange(len(ids)))
        run_tokens(model, ids)
    return prof.stats


def agree(found: sedetect.ModelStats, whole: sedetect.ModelStats, rtol: float) -> None:
    """Rows bit for bit, values up to the rounding of products with weights that lie elsewhere in memory."""
    assert found.banks.keys() <= whole.banks.keys()
    for bank, state in found.banks.items():
        other = whole.banks[bank]
        assert torch.equal(state.counts, other.counts), bank
        torch.testing.assert_close(state.out_max, other.out_max, rtol=rtol, atol=0)
        torch.testing.assert_close(state.sums, other.sums, rtol=rtol, atol=1e-9)


@pytest.fixture(scope="module")
def located():
    return sedetect.locate(TINY, first_tokens=4)


@pytest.mark.parametrize(
    "name",
    ["tiny-moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("q_base", "n_gated", "g_sinks"))],
)
def test_trained_checkpoints(name):
    """The candidates, channels and super weights of a profile of text with the residual stream, and no others."""
    folder = TINY if name == "tiny-moe" else TRAINED / name
    if not folder.is_dir():
        pytest.skip(f"needs the trained checkpoint {name} in ../shared/models")
    found = sedetect.locate(folder)
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    profile = sedetect.profile_model(model, tokenizer=tokenizer, text=sedetect.Text(2048), residual=2)
    expected = sedetect.rank(profile.stats, residual=profile.residual).found
    inside = sorted((one for one in expected if one.layer < found.layers), key=lambda one: -one.value)
    assert [str(one) for one in found.candidates] == [str(one) for one in inside]
    weights = sedetect.find_super_weights(model, inside, profile.windows)
    assert [one.weight for one in found.candidates] == [str(one) for one in weights]
    for one, other in zip(found.candidates, inside):
        assert (one.channel, one.token_id, one.sign) == (other.channel, 0, other.sign)
        assert (one.signature, one.carried) == (other.signature, other.carried)
        assert one.value == pytest.approx(other.value, rel=2**-7)  # bfloat16, another batch
    assert found.residual.writers() == {one.place for one in found.candidates if one.carried}
    ranked = sedetect.rank(found.stats, residual=found.residual)  # as of the folder that the command writes
    assert {one.place for one in ranked.found} == {one.place for one in found.candidates}
    agree(found.stats, resident(model, found), rtol=2**-7)
    assert found.read < 0.32 * found.stored


@pytest.mark.parametrize("name", CONFIGS)
def test_random_checkpoints_have_none(tmp_path, name):
    found = sedetect.locate(save_random(CONFIGS[name](), tmp_path), first_tokens=5, all_layers=True)
    assert found.candidates == [] and found.headline.startswith("no candidate: ")
    assert (found.layers, found.of) == (3, 3)


NOT_STREAMED = {
    "diffusion_gemma": "is outside model.decoder.layers",
    "gemma4": "in which layers can keep state",
    "glm5_next": "its layers hand on more than hidden states",
    "glm_moe_dsa": "its layers hand on more than hidden states",
    "hy_v4": "its layers hand on more than hidden states",
    "hy_v4_vl": "its layers hand on more than hidden states",
    "inkling2_loop": "its layers hand on more than hidden states",
    "mistral_large4": "in which layers can keep state",
    "nllb_moe": "is outside model.decoder.layers",
    "openai_privacy_filter": "attention is not causal",
    "switch_transformers": "is outside decoder.block",
    "zaya": "its layers hand on more than hidden states",
    "doge": "this model cannot be profiled",
}


HERE = [
    name
    for name in FAMILIES
    if find_spec(f"transformers.models.{name.partition(':')[0]}")
    and name != "qwen3_omni_moe:talker"  # a thinker's part
]


@pytest.mark.parametrize("name", HERE)
def test_every_architecture_agrees_or_is_refused(tmp_path, monkeypatch, name):
    """And into every expert that ran it can be looked, as if it were a candidate."""
    monkeypatch.setattr(walk, "is_candidate", lambda *signs: True)
    model = tiny_model(name, FAMILIES[name])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    put_tokenizer(tmp_path)
    if name in NOT_STREAMED:
        with pytest.raises(SedetectError, match=NOT_STREAMED[name]):
            sedetect.locate(tmp_path, first_tokens=TOKENS)
        return
    found = sedetect.locate(tmp_path, first_tokens=TOKENS, all_layers=True)
    # Loaded again, Llama 4 does not run in some transformers: see FAMILIES.
    agree(found.stats, resident(model if name == "llama4" else load_model(tmp_path), found), rtol=1e-5)
    assert len(found.candidates) == found.ran > 0
    unread = [one for one in found.candidates if one.weight is None]
    assert bool(unread) == (name == "llama4:two"), unread  # its experts are given rows of their own
    for one in set(found.candidates) - set(unread):
        assert {token for token, _ in one.fires} <= set(found.first_tokens)
        assert max(value for _, value in one.fires) == pytest.approx(one.value, rel=1e-4)


def test_a_text_is_run_as_one_sequence():
    found = sedetect.locate(TINY, text="Two plus two is four", all_layers=True)
    (ids,) = [found.first_tokens]
    assert ids == (0,) and found.stats.header.tokens > 4 and found.stats.header.sequences == 1
    assert [str(one) for one in found.candidates] == ["L1E28", "L9E7"] and found.candidates[0].position == 0
    assert "a short prompt" in found.notes[0]


@pytest.mark.parametrize("block", [8, 12])  # 12 divides the experts' 24, but not 32 and 16, as 128 not R1's 576
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8(tmp_path, name, block):
    """As a GPU holds it, and computed with what it stands for."""
    folder = save_random(CONFIGS[name](), tmp_path, dtype=torch.bfloat16)
    to_fp8(folder, block)
    found = sedetect.locate(folder, first_tokens=TOKENS, all_layers=True)
    agree(found.stats, resident(load_model(folder), found), rtol=0.05)
    assert found.stats.header.dtype == "bfloat16 (float8_e4m3fn weights)"


def test_mxfp4(tmp_path):
    config = CONFIGS["gpt_oss"]()
    config.hidden_size = config.intermediate_size = 64
    folder = save_random(config, tmp_path, dtype=torch.bfloat16)
    to_mxfp4(folder)
    found = sedetect.locate(folder, first_tokens=TOKENS, all_layers=True)
    agree(found.stats, resident(load_model(folder), found), rtol=0.05)
    experts = sum(int((state.rows > 0).sum()) for state in found.stats.banks.values())
    assert experts == found.ran < found.of * 8 and found.read < found.stored


def test_on_which_first_tokens_an_expert_fires(located):
    assert len(located.first_tokens) == 5 and located.first_tokens[0] == 0
    (one,) = located.candidates
    assert one.on() == [0] and one.fires[0] == (0, one.value)
    shown = run("locate", TINY, "--first-tokens", "The,\\n,1", "--all-layers")
    assert shown.code == 0 and "'<|bos|>' alone" in shown.out
    assert {"yes", "no", "candidate"} < set(row(shown.out, "L9E7"))  # fires on first tokens, is not carried
    assert "next: sedetect prove" in shown.out and "experts that fire later in a text are not seen" in shown.out


def test_what_it_says_while_it_runs():
    said, lines, seen = [], [], []
    found = sedetect.locate(TINY, told=said.append, found=lines.append, progress=lambda *step: seen.append(step))
    (reading,) = said
    common, experts, layers, of = reading
    assert (layers, of) == (found.layers, found.of) == (8, 10)
    embeddings = 256 * 2
    assert found.read == common + experts + embeddings + 2 * 256  # with one row of embeddings, and the last norm
    assert experts == 8 * 4 * 3 * 256 * 48 * 2
    assert lines == ["L1E28: |y| 1256 in channel 101 on '<|bos|>', weight L1E28[101,14] gives 44%"]
    assert [layer for layer, *_ in seen] == sorted(layer for layer, *_ in seen)
    assert seen[-1][1] <= common + experts + 1024


def test_results(tmp_path):
    shown = run("locate", TINY, "-o", tmp_path / "o")
    assert shown.code == 0
    assert files_of(tmp_path / "o") == {"stats.safetensors", "super_experts.json", "residual.json", "run.json"}
    document = json.loads((tmp_path / "o" / "super_experts.json").read_text())
    assert document["format"] == "sedetect-located" and document["source"] == str(TINY)
    assert [(one["name"], one["verdict"]) for one in document["candidates"]] == [("L1E28", "candidate")]
    kept = json.loads(run("export", tmp_path / "o", "--to", "json").out)
    assert kept["modules"] == ["model.layers.1.mlp.experts.28"]
    assert run("report", tmp_path / "o").code == 0


def test_a_proof_beside_a_walk(tmp_path):
    """One of this model is taken, though a walk does not know its weights' checksum; another's is refused by rank, and
    does not outlive the next walk."""
    folder = tmp_path / "o"
    assert run("locate", TINY, "-o", folder).code == 0
    (digest,) = {json.loads((folder / name).read_text())["digest"] for name in ("residual.json", "run.json")}
    assert digest.endswith("-unchecked")
    sample = SAMPLES[Proof]
    proof = replace(sample, digest=digest.replace("unchecked", "0123456789abcdef"))
    proof.save(folder / "proof.json")
    assert row(run("rank", folder).out, "L1E28")[-1] == "proved" and run("report", folder).code == 0
    replace(proof, digest=f"{'0' * 16}-0123456789abcdef").save(folder / "proof.json")
    assert "the proof is that of m" in refused(run("rank", folder))
    (folder / "domains").mkdir(exist_ok=True)
    shutil.copy(folder / "stats.safetensors", folder / "domains" / "old.safetensors")
    assert run("locate", TINY, "-o", folder).code == 0
    left = {"stats.safetensors", "super_experts.json", "residual.json", "run.json", "report.html"}
    assert files_of(folder) == left and run("rank", folder).code == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--first-tokens", "two words"), "--first-tokens 'two words': is [2-9] tokens"),
        (("--first-tokens", "400"), "--first-tokens 400: "),
        (("--text", "a", "--first-tokens", "3"), "--text: does not go with --first-tokens"),
    ],
)
def test_wrong_arguments(arguments, why):
    assert re.search(why, refused(run("locate", TINY, *arguments)))


def test_what_is_no_place():
    assert "no such folder" in refused(run("locate", "/nowhere/at/all"))
    with pytest.raises(SedetectError, match="device cuda: locate computes on the CPU"):
        sedetect.locate(TINY, loading=sedetect.Loading("cuda"))


def test_experts_that_no_model_loads_are_named(tmp_path):
    """As of layers that predict further tokens: by locate, plan and profile."""
    folder = shutil.copytree(TINY, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    wanted = "m: its experts of model.layers.9.mlp.experts are in the checkpoint and not measured"
    (line,) = sedetect.locate(folder).unmeasured
    assert wanted in line
    assert wanted in run("plan", folder).out
    notes = sedetect.profile_model(folder, text=sedetect.Text(512, 64)).stats.header.notes
    assert any(wanted in str(note) for note in notes)


@pytest.mark.parametrize(
    "faults", [{}, {"drop": 20}, {"truncate": 9}, {"busy": 15}], ids=lambda f: "+".join(f) or "none"
)
def test_the_same_over_the_network(monkeypatch, faults):
    monkeypatch.setattr(web.time, "sleep", lambda seconds: None)
    local = sedetect.locate(TINY)
    with serving({"owner/tiny-moe": TINY}, Faults(**faults)) as server:
        found = sedetect.locate(server.files("owner/tiny-moe"))
        assert found.read == server.sent
    for bank, state in found.stats.banks.items():
        assert state.equal(local.stats.banks[bank], sums_rtol=0), bank
    assert found.candidates == local.candidates and found.model == local.model == "tiny-moe"
    assert local.read < found.read < local.read + 600_000  # config, tokenizer, headers


def test_the_hub_and_its_cache(tmp_path):
    """The command itself, told by the environment where the hub is."""
    with serving({"owner/tiny-moe": TINY}) as server:
        hub = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        first = spawn("locate", "owner/tiny-moe", "--cache", tmp_path / "c", **hub)
        assert first.code == 0, first.err
        assert "1 candidate: L1E28 (|y| 1256); not proved" in first.out and "owner/tiny-moe: read " in first.out
        sent = server.sent
        again = spawn("locate", "owner/tiny-moe", "--cache", tmp_path / "c", **hub)
        assert again.code == 0 and server.sent - sent < 2000
        assert "bytes of 31.1 MB (0.0%)" in again.out
        plan = spawn("plan", "owner/tiny-moe", **hub)
        assert "locate (one first token, 8 layers): reads 6.69 MB, 21.5%" in plan.out, plan.err


def test_a_server_without_ranges_is_refused():
    with serving({"o/m": TINY}, Faults(ranges=False)) as server:
        assert "does not serve parts of a file" in refused(run("locate", server.files("o/m")))
