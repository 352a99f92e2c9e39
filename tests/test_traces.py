"""Traces of chosen experts: against the statistics of a profile, and against a computation of their own."""

import json

import pytest
import torch
from support.checkpoints import put_model
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sedetect
from sedetect.calibration.texts import load_texts
from sedetect.calibration.windows import Windows, make_windows
from sedetect.cli import load
from sedetect.errors import SedetectError
from sedetect.experiments.traces import bucket_name, is_delimiter, trace_experts
from sedetect.models.attach import SubstitutedDown, is_attached
from sedetect.models.banks import find_banks
from sedetect.stats.place import parse_place

SE, LATE = parse_place("L1E28"), parse_place("L9E7")


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def domains(tokenizer):
    return make_windows(tokenizer, load_texts(None), tokens=8 * 128, seq_len=128).domains


@pytest.fixture(scope="module")
def traces(tiny, tokenizer, domains):
    return trace_experts(tiny, domains, [LATE, SE], tokenizer=tokenizer, top=10_000, batch_size=2)


def test_rows_are_those_of_an_independent_computation(tiny, domains, traces):
    """x and routing read by a hook on the experts module, y computed row by row."""
    module = tiny.model.layers[1].mlp.experts
    calls = []
    hook = module.register_forward_pre_hook(lambda module, args: calls.append(args))
    expected = {}
    with torch.no_grad():
        for domain, windows in domains.items():
            for ids, number in zip(windows.ids, windows.numbers.tolist()):
                tiny(input_ids=ids[None])
                x, index, gates = calls.pop()
                for token, slot in (index == 28).nonzero().tolist():
                    gate, up = (module.gate_up_proj[28] @ x[token]).chunk(2)
                    y = module.down_proj[28] @ (torch.nn.functional.silu(gate) * up)
                    value, channel = y.abs().max(0)
                    expected[domain, number, token] = (ids[token], gates[token, slot], value, channel)
    hook.remove()
    trace = traces.experts[1]
    assert trace.expert == SE and trace.rows == len(trace.top) == len(expected)
    for row in trace.top:
        token, gate, value, channel = expected[row.domain, row.sequence, row.position]
        assert row.token_id == token and row.gate == pytest.approx(float(gate), rel=1e-3)
        assert row.value == pytest.approx(float(value), rel=1e-3)
        assert row.channel == channel or row.value < 20
    assert [row.value for row in trace.top] == sorted((row.value for row in trace.top), reverse=True)


def test_counts_and_maxima_are_those_of_a_profile(tiny, domains, traces):
    stats = sedetect.ModelStats.empty()
    for windows in domains.values():
        with sedetect.profile(tiny, source=windows.source) as prof:
            prof.batch(sequence_ids=windows.numbers)
            tiny(input_ids=windows.ids)
        stats = stats.merge(prof.stats)
    for trace in traces.experts:
        place = trace.expert
        bank = stats.banks[place.bank]
        assert trace.rows == int(bank.rows[place.expert])
        assert trace.kinds["first"].rows == int(bank.first_rows[place.expert])
        assert trace.top[0].value == pytest.approx(float(bank.out_max[place.expert]), rel=1e-4)
        gates = sum(group.gate * group.rows for group in trace.kinds.values())
        assert gates == pytest.approx(float(bank.gate_sum[place.expert]), rel=1e-4)


def test_bos_dominates(traces):
    assert [trace.expert for trace in traces.experts] == [LATE, SE]
    late, found = traces.experts
    assert traces.tokens == 1024 and sum(traces.sequences.values()) == 8
    first = found.kinds["first"]
    assert (first.rows, first.seen) == (8, 8) and first.gate == pytest.approx(0.961, abs=0.002)
    assert first.mean == pytest.approx(1262.1, rel=1e-3) == first.maximum
    assert {(row.position, row.text, row.channel) for row in found.top[:8]} == {(0, "<|bos|>", 101)}
    assert found.top[8].value < 50
    assert next(iter(found.tokens)) == 0 and found.texts[0] == "<|bos|>"
    assert late.kinds["first"].maximum == pytest.approx(1087.5, rel=1e-3)


def test_groups_partition_the_rows(traces, domains, tokenizer):
    for trace in traces.experts:
        for groups in (trace.kinds, trace.positions):
            assert sum(group.rows for group in groups.values()) == trace.rows
            assert max(group.maximum for group in groups.values()) == trace.top[0].value
        assert sum(trace.share(kind) for kind in trace.kinds) == pytest.approx(1)
        assert trace.share("unknown") == 0
        assert list(trace.positions) == ["0", "1-15", "16-63", "64-255"]
        assert [group.seen for group in trace.positions.values()] == [8, 8 * 15, 8 * 48, 8 * 64]
        assert len(trace.tokens) == 20
        ids = torch.cat([windows.ids.flatten() for windows in domains.values()])
        for token, group in trace.tokens.items():
            mine = [row for row in trace.top if row.token_id == token]
            assert group.rows == len(mine) and group.seen == int((ids == token).sum())
            assert group.mean == pytest.approx(sum(row.value for row in mine) / len(mine))
            assert group.maximum == mine[0].value and trace.texts[token] == tokenizer.decode([token])
        delimiters = [row for row in trace.top if row.position and is_delimiter(row.text)]
        assert trace.kinds["delimiter"].rows == len(delimiters) > 0


def test_special_tokens_inside_the_text(tiny, tokenizer):
    """What delimits the turns of a chat: BOS in mid-text is special, not first, and fires the super expert."""
    ids = torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    ids[1, 40] = 0
    windows = Windows(ids, torch.tensor([3, 7]), "mine", {"domain": "chat", "chat_template": True})
    traces = trace_experts(tiny, {"chat": windows}, [SE], tokenizer=tokenizer)
    (trace,) = traces.experts
    assert traces.chat_template and trace.kinds["special"].rows == 1 and trace.kinds["first"].rows == 2
    assert trace.kinds["special"].maximum > 500
    assert {(row.sequence, row.position) for row in trace.top[:3]} == {(3, 0), (7, 0), (7, 40)}


def test_shared_and_dense_experts_see_every_token():
    model = random_model("qwen2_moe")
    ids = torch.randint(3, 96, (3, 20))
    places = [parse_place(name) for name in ("L0shared", "L1dense", "L2E5")]
    traces = trace_experts(model, {"mine": Windows(ids, torch.arange(3), "mine", {})}, places, top=5, batch_size=2)
    shared, dense, _ = traces.experts
    with sedetect.profile(model) as prof:
        model(input_ids=ids)
    for trace, kind in ((shared, "shared"), (dense, "dense")):
        place = trace.expert
        assert place.kind == kind and trace.rows == 60 and len(trace.top) == 5
        state = prof.stats.banks[place.bank]
        assert trace.top[0].value == pytest.approx(float(state.out_max[0]), rel=1e-4)
        assert trace.top[0].gate == 1 and trace.top[0].text is None
        assert set(trace.kinds) == {"first", "text"}
    assert not any(isinstance(module, SubstitutedDown) for module in model.modules())


def test_what_is_refused(tiny, domains):
    for name in ("L1E32", "L10E0", "L1shared"):
        with pytest.raises(SedetectError, match=f"{name}: Qwen3MoeForCausalLM has no such expert"):
            trace_experts(tiny, domains, [parse_place(name)])
    assert not any(is_attached(bank) for bank in find_banks(tiny))


def test_outputs_that_are_not_finite():
    model = random_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 7] = torch.nan
    windows = Windows(torch.randint(3, 96, (2, 30)), torch.arange(2), "mine", {})
    traces = trace_experts(model, {"mine": windows}, [parse_place("L2E3")])
    (trace,) = traces.experts
    assert trace.rows == trace.nonfinite > 0 and trace.top[0].value is None
    document = json.loads(json.dumps(traces.to_dict(), allow_nan=False))
    assert document["experts"][0]["kinds"]["text"]["maximum"] is None


def test_the_document(traces):
    document = json.loads(json.dumps(traces.to_dict(), allow_nan=False))
    found = document["experts"][1]
    assert found["expert"] == "L1E28" and found["tokens"][0]["text"] == "<|bos|>"
    assert found["shares"]["first"] == found["kinds"]["first"]["rows"] / found["rows"]


def test_delimiters_and_buckets():
    assert all(map(is_delimiter, ("\n", " ", ".", ").", "\u3002\n", "  ==", "", "\u201d")))
    assert not any(map(is_delimiter, ("a", ". The", "\u4e2d", "1.", "\ufffd")))
    assert [bucket_name(n) for n in (-1, 0, 1, 2, 3, 4)] == ["unknown", "0", "1-15", "16-63", "64-255", "256-1023"]


def test_the_command(tmp_path):
    """Token texts are escaped: a markup tag in one would break the table, or vanish."""
    arguments = ["--seq-len", "64", "--tokens", "512", "-o", str(tmp_path)]
    result = CliRunner().invoke(load(), ["analyze", "trace", str(TINY), "--experts", "candidates", *arguments])
    assert result.exit_code == 0, result.output
    assert "L1E28: " in result.output and "'<|bos|>'" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if line.startswith(" "))
    document = json.loads((tmp_path / "traces.json").read_text(encoding="utf-8"))
    assert [found["expert"] for found in document["experts"]] == ["L1E28", "L9E7"]
    assert all(found["top"][0]["position"] == 0 for found in document["experts"])


def test_the_command_without_a_candidate(tmp_path):
    """That there is none is an answer, not an error."""
    arguments = [str(put_model(tmp_path / "model")), "--seq-len", "16", "--tokens", "256"]
    result = CliRunner().invoke(load(), ["analyze", "trace", *arguments])
    assert result.exit_code == 0 and "--experts candidates: no candidate" in result.output
    result = CliRunner().invoke(
        load(), ["analyze", "residual", *arguments, "--sequences", "2", "--ablate", "candidates"]
    )
    assert result.exit_code == 0 and "no massive activation that a later layer carries" in result.output
    assert "D_sink" not in result.output
