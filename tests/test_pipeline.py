"""profile_model: a checkpoint and texts in, merged statistics out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.compare import assert_same
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.texts import load_texts
from sedetect.errors import SedetectError
from sedetect.experiments.evaluation import perplexity
from sedetect.experiments.residual_stream import observe_residual
from sedetect.models import compiled, loading
from sedetect.models.banks import find_banks
from sedetect.models.loading import load_tokenizer
from sedetect.ops.choose import missing_fast_path
from sedetect.profiling import profiler
from sedetect.stats.model import merge_all
from sedetect.stats.note import Note


@pytest.fixture(scope="module")
def tiny():
    return sedetect.profile_model(TINY, text=sedetect.Text(tokens=8192), loading=sedetect.Loading(dtype="float32"))


def test_the_super_expert_of_tiny_moe(tiny):
    """The published facts of the checkpoint: tests/data/tiny-moe/README.md."""
    ranking = sedetect.rank(tiny.stats)
    (found,) = ranking.super_experts
    assert (found.layer, found.expert, found.channel, found.position, found.token_id) == (1, 28, 101, 0, 0)
    assert found.value == pytest.approx(1262.11, rel=0.01)
    assert found.verdict == "candidate" and found.signature and not found.late
    assert found.first_gate == pytest.approx(0.961, abs=0.005)
    late = next(expert for expert in ranking.others if expert.expert == 7)
    assert (late.layer, late.channel, late.late, late.verdict) == (9, 159, True, "candidate")
    assert late.value == pytest.approx(1087.5, rel=0.01)
    assert ranking.population == 256


def test_domains_merge_to_the_whole(tiny):
    assert list(tiny.domains) == ["english", "chinese", "mathematics", "code"]
    merged = merge_all(reversed(tiny.domains.values()))
    assert all(state.equal(tiny.stats.banks[bank]) for bank, state in merged.banks.items())
    assert tiny.stats.header.tokens == 8192 and tiny.stats.header.sequences == 16
    assert tiny.stats.header.window == 512
    note = missing_fast_path(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    assert tiny.stats.header.notes == ([Note("slow", note)] if note else [])
    for stats in tiny.domains.values():
        assert [str(expert) for expert in sedetect.rank(stats).super_experts] == ["L1E28"]
    domains = {source.info["domain"] for source in tiny.stats.header.sources.values()}
    assert domains == set(tiny.domains)


@pytest.fixture
def counted(monkeypatch):
    """How often a run does what it should do once."""
    counts = {}

    def count(module, name):
        original = getattr(module, name)

        def counting(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (loading, "check_checkpoint"),
        (loading, "find_banks"),
        (profiler, "find_banks"),
        (profiler, "attach"),
        (profiler, "model_digest"),
    ):
        count(module, name)
    return counts


SHORT = {"text": sedetect.Text(2048, 128, batch_size=1), "loading": sedetect.Loading(dtype="float32")}


def test_a_run_looks_once(counted):
    once = dict.fromkeys(("check_checkpoint", "find_banks", "attach", "model_digest"), 1)
    rounds = sedetect.profile_model(TINY, **SHORT, keep_rounds=True)
    assert len(rounds.rounds) > 1 and len(rounds.domains) == 4
    assert counted == once | {"find_banks": 2}  # of the model without weights, to refuse by, and of the one that runs
    assert not compiled._attached


def test_every_source_has_statistics_of_its_own():
    """Those of a profile that is attached for it alone, notes too."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = torch.arange(5, 69).reshape(2, 32)
    masked = torch.zeros(2, 1, 32, 32)  # a mask that says nothing of the rows: a note
    calls = {"one": {"input_ids": ids, "attention_mask": masked}, "two": {"input_ids": ids[:, :8]}}
    options = {"channels": True, "coactivation": True, "first_rows": True}
    together = {}
    with profiler.SourcesProfile(model, find_banks(model), prefix=4, measuring=sedetect.Measuring(**options)) as prof:
        for name, inputs in calls.items():
            prof.begin(name, {"domain": name})
            model(**inputs)
            together[name] = prof.take()
        prof.begin("none", {})
        assert any("never ran" in str(note) for note in prof.take().header.notes)
    for name, inputs in calls.items():
        with sedetect.profile(model, source=name, info={"domain": name}, prefix=4, **options) as prof:
            model(**inputs)
        assert_same(together[name], prof.stats)
        assert together[name].header == prof.stats.header
    assert together["one"].header.notes != together["two"].header.notes


def test_an_import_registers_nothing():
    code = """
import sedetect
from support.models import random_model
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface
known = [ExpertsInterface().valid_keys(), FP8ExpertsInterface().valid_keys()]
assert not any("sedetect" in keys for keys in known), known
with sedetect.profile(random_model("qwen3_moe")):
    assert "sedetect" in ExpertsInterface().valid_keys() and "sedetect" in FP8ExpertsInterface().valid_keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_every_kept_row_is_a_token_of_its_window(tiny):
    """Place and token of the outliers, against the text cut anew."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for domain, stats in tiny.domains.items():
        stream = tokenizer(load_texts(None)[domain][0], add_special_tokens=False)["input_ids"]
        for state in stats.banks.values():
            kept = state.outliers[state.outliers[..., 0] >= 0]
            for *_, sequence, position, token in kept[::37, :7].tolist():
                assert position > 0 and token == stream[sequence * 511 + position - 1]


def test_a_loaded_model_and_texts_of_ones_own():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(SedetectError, match="needs its tokenizer"):
        sedetect.profile_model(model)
    seen = []
    result = sedetect.profile_model(
        model.eval(),
        {"mine": ["one two three " * 40]},
        text=sedetect.Text(tokens=10_000, seq_len=32, batch_size=2),
        tokenizer=tokenizer,
        progress=lambda domain, done, total: seen.append((domain, done, total)),
    )
    total = result.stats.header.tokens
    assert 0 < total < 10_000 and total % 32 == 0
    assert seen[-1] == ("mine", total, total) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert any("10000 tokens asked" in str(note) and note.count == total for note in result.stats.header.notes)
    assert result.seconds > 0 and not result.interrupted


def test_stopping_keeps_whole_batches():
    asked = iter([False, False, True])
    result = sedetect.profile_model(
        TINY, text=sedetect.Text(tokens=8192, seq_len=64, batch_size=1), stop=lambda: next(asked)
    )
    assert result.interrupted and list(result.domains) == ["english"]
    assert result.stats.header.tokens == 128
    assert all(state.rows.sum() == 128 * 4 for state in result.stats.banks.values())


def test_a_seed_chooses_other_windows_that_still_merge():
    text = {"code": [load_texts(None)["code"][0]]}
    first = sedetect.profile_model(TINY, text, text=sedetect.Text(tokens=256, seq_len=64))
    other = sedetect.profile_model(TINY, text, text=sedetect.Text(tokens=256, seq_len=64, seed=5))
    assert first.stats.header.sources.keys() == other.stats.header.sources.keys()
    ranges = [next(iter(r.stats.header.sources.values())).ranges for r in (first, other)]
    assert ranges[0] == [[0, 4]] and ranges[1] != ranges[0]
    assert first.stats.merge(other.stats).header.sequences == 8


def test_optional_statistics_are_saved(tmp_path):
    result = sedetect.profile_model(
        TINY, text=sedetect.Text(tokens=512, seq_len=64), measuring=sedetect.Measuring(channels=True, coactivation=True)
    )
    result.stats.save(tmp_path / "s.safetensors")
    for state in sedetect.ModelStats.load(tmp_path / "s.safetensors").banks.values():
        assert state.channel_max.shape == (32, 256) and state.in_channel_sq.shape == (32, 48)
        assert torch.equal(state.channel_max.amax(1), state.out_max)
        assert torch.equal(state.coactivation.diagonal(), state.rows)
        assert torch.equal(state.coactivation.sum(1), 4 * state.rows)


def test_a_tokenizer_prefix_that_data_lacks_is_said():
    """Without BOS this model shows no candidate: the drop-in says why."""
    model = AutoModelForCausalLM.from_pretrained(TINY).eval()
    ids = torch.randint(3, 4096, (2, 64))
    with sedetect.profile(model, prefix=0) as prof:
        model(input_ids=ids)
    assert any("do not begin with the prefix token" in str(note) for note in prof.stats.header.notes)
    assert not sedetect.rank(prof.stats).found


def test_the_ranking_document_is_json(tiny):
    from sedetect.cli.tables import ranking_document

    document = ranking_document(sedetect.rank(tiny.stats), tiny.tokenizer)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["super_experts"][0]["token"] == "<|bos|>"


ENCODERS = {"switch_transformers", "nllb_moe", "diffusion_gemma"}


@pytest.mark.parametrize("name", sorted(ENCODERS & {*available()}))
def test_encoder_and_decoder_read_the_text(name):
    """Both stacks see every token; what takes a decoder alone refuses by name."""
    model, tokenizer = tiny_model(name, FAMILIES[name]), load_tokenizer(TINY)
    model.resize_token_embeddings(4096)
    result = sedetect.profile_model(model, tokenizer=tokenizer, text=sedetect.Text(tokens=256, seq_len=16))
    routed = {bank.stack: int(state.rows.sum()) for bank, state in result.stats.banks.items() if bank.kind == "routed"}
    assert set(routed) == {"encoder", "decoder"} and all(routed.values())
    assert any("encoder" in str(note) for note in result.stats.header.notes)
    for refused in (
        lambda: perplexity(model, result.windows, prefix=1),
        lambda: observe_residual(model, result.windows, prefix=1),
    ):
        with pytest.raises(SedetectError, match="has an encoder and a decoder; "):
            refused()


def test_a_text_of_which_no_token_is_counted_is_refused(monkeypatch):
    """A profile of nothing would say that there is no candidate."""
    model, tokenizer = random_model("qwen3_moe"), load_tokenizer(TINY)
    model.resize_token_embeddings(4096)
    # As of a model whose experts read tokens of which its forward is not told.
    monkeypatch.setattr("sedetect.profiling.pipeline.run_tokens", lambda model, ids: model.model(ids))
    with pytest.raises(
        SedetectError, match=r"Qwen3MoeForCausalLM ran its \d+ tokens, and none could be counted \(rows"
    ):
        sedetect.profile_model(model, tokenizer=tokenizer, text=sedetect.Text(tokens=256, seq_len=16))
