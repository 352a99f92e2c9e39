"""The residual stream and the sinks, on tiny-moe (facts: tests/data/tiny-moe/README.md) and on random models.

Published numbers are of other text. What the first token's own embedding decides (values at BOS) is the same on the
embedded corpus; medians and sinks move with the text and have their own tolerance here.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.command import refused, run
from support.families import FAMILIES, tiny_model
from support.models import CONFIGS, TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sedetect.calibration.texts import load_texts
from sedetect.calibration.windows import Text, Windows, make_windows
from sedetect.cli import load
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.residual_stream import Residual, Writer, observe_residual, sink_decay
from sedetect.models.banks import find_banks
from sedetect.models.experts import expert_hidden
from sedetect.models.layers import attention_blocks, decoder_layers, sink_substitutes
from sedetect.profiling.pipeline import profile_model
from sedetect.profiling.profiler import profile
from sedetect.ranking.rule import rank
from sedetect.stats.place import parse_place
from sedetect.stats.residual import SINK_MASS

SE = parse_place("L1E28")


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def domains():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return make_windows(tokenizer, load_texts(None), tokens=8 * 512, seq_len=512).domains


@pytest.fixture(scope="module")
def residual(tiny, domains):
    return observe_residual(tiny, domains, prefix=1, sequences=4)


@pytest.fixture(scope="module")
def without(tiny, domains):
    with ablate(tiny, [SE]):
        return observe_residual(tiny, domains, prefix=1, sequences=4)


def windows_of(ids: torch.Tensor) -> dict[str, Windows]:
    return {"mine": Windows(ids, torch.arange(len(ids)), "mine", {"domain": "mine"})}


def attention_and_stream(model, ids):
    """Per layer (heads, L, L) and (L, H), by transformers' own outputs; the stream before the final norm by a hook."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    stream = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: stream.append(out[0])) for layer in model.model.layers
    ]
    try:
        with torch.no_grad():
            out = model(input_ids=ids[None], output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return [attention[0] for attention in out.attentions], stream


def test_the_massive_activation_of_tiny_moe(residual):
    assert residual.sequences == dict.fromkeys(("english", "chinese", "mathematics", "code"), 1)
    assert residual.forming_layers == [1] and residual.writers() == {SE} and residual.notes == []
    first = residual.layers[1]
    assert (first.channel, first.position, first.token_id) == (101, 0, 0)
    assert first.maximum == pytest.approx(1232.6, rel=1e-3)
    assert first.ratio == pytest.approx(574, rel=0.06)
    assert residual.inner_max == pytest.approx(1249.6, rel=1e-3)
    assert residual.layers[8].ratio == pytest.approx(242, rel=0.06)
    assert residual.layers[0].massive == 0

    formed = [f for f in residual.formations if (f.layer, f.channel) == (1, 101)]
    assert len(formed) == 4 and {f.domain for f in formed} == set(residual.sequences)
    for one in formed:
        assert (one.kind, one.position, one.token_id, one.carried_to, one.vanishes) == ("formed", 0, 0, 9, None)
        assert abs(one.after) == pytest.approx(1232.6, rel=1e-3) and abs(one.before) < 20
        assert one.jump == pytest.approx(one.after - one.before)
        assert one.writers[0].expert == SE and one.writers[0].share == pytest.approx(1, abs=0.01)
        assert one.writers[0].gate == pytest.approx(0.961, abs=0.002)
        assert abs(one.attention) < 0.01 and one.explained == pytest.approx(1, abs=1e-4)


def test_the_late_outlier_expert_is_carried_by_nobody(residual):
    late = [f for f in residual.formations if f.layer == 9]
    assert {(f.channel, f.position, f.writers[0].expert) for f in late} == {(159, 0, parse_place("L9E7"))}
    for one in late:
        assert one.after == pytest.approx(1493.3, rel=1e-3) and one.carried_to == 9
        assert one.writers[0].share == pytest.approx(0.98, abs=0.02)
    assert 9 not in residual.forming_layers


def test_some_channels_are_carried_only_for_a_while(residual):
    """Channel 159 stays above 100, but the median grows: it falls below 100 times after layer 5."""
    for one in (f for f in residual.formations if (f.layer, f.channel) == (1, 159)):
        assert 1 < one.carried_to < 9 and one.vanishes == one.carried_to + 1


def test_an_expert_that_undoes_a_massive_activation(tiny, domains):
    """BOS visits L5E11: made to write 0.9 of what is carried against it, it is named; else nobody undoes anything."""
    one = domains["code"]
    plain = observe_residual(tiny, {"code": one}, prefix=1, sequences=1)
    (formed,) = (f for f in plain.formations if (f.layer, f.channel) == (1, 101))
    assert (formed.undone_in, formed.undone_by) == (None, None)
    experts, heard = tiny.model.layers[5].mlp.experts, []
    hook = experts.register_forward_pre_hook(lambda module, args: heard.append([a[:1] for a in args]))
    with torch.no_grad():
        tiny(input_ids=one.ids[:1])
    hook.remove()
    x, index, weights = heard[0]
    gate = float(weights[index == 11])
    h = expert_hidden(experts, x, 11)[0]
    row = experts.down_proj[11, 101].clone()
    with torch.no_grad():
        carried = formed.after
        experts.down_proj[11, 101] = -0.9 * carried / gate * h / h.square().sum()
    try:
        found = observe_residual(tiny, {"code": one}, prefix=1, sequences=1)
    finally:
        with torch.no_grad():
            experts.down_proj[11, 101] = row
    (undone,) = (f for f in found.formations if (f.layer, f.channel) == (1, 101))
    assert undone.undone_in == 5 and str(undone.undone_by.expert) == "L5E11"
    assert undone.undone_by.share == pytest.approx(0.9, abs=0.02) and undone.undone_by.gate == pytest.approx(gate)
    assert Residual.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_layers_and_sinks_against_an_independent_computation(tiny, domains):
    one = domains["code"]
    residual = observe_residual(tiny, {"code": one}, prefix=1, sequences=2)
    assert residual.sequences == {"code": 2}
    attention, stream = zip(*(attention_and_stream(tiny, ids) for ids in one.ids[:2]))
    for number, layer in enumerate(residual.layers):
        x = torch.stack([s[number] for s in stream]).abs()  # (2, L, H)
        sequence, position, channel = (int(i) for i in torch.unravel_index(x.argmax(), x.shape))
        assert layer.maximum == pytest.approx(float(x.max()), rel=1e-5)
        assert x[layer.sequence, layer.position, layer.channel] == pytest.approx(layer.maximum, rel=1e-5)
        assert (layer.position, layer.channel) == (position, channel)
        assert layer.token_id == one.ids[sequence, position]
        assert layer.median == pytest.approx(float(x.flatten(1).median(1).values.mean()), rel=1e-5)
        weights = torch.stack([a[number] for a in attention]).double()  # (2, heads, L, L)
        assert torch.allclose(weights.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-5)
        expected = weights[:, :, 128:, 0].mean((0, 2))
        assert torch.allclose(torch.tensor(layer.sinks, dtype=torch.float64), expected, atol=1e-6)


def test_sinks_of_tiny_moe(residual):
    assert residual.sink_mean == pytest.approx(0.070, abs=0.01)
    assert max(range(10), key=lambda n: residual.layers[n].sink_mean) == 6
    assert 0.45 < max(residual.layers[6].sinks) < 0.65  # 0.51 and 0.58 on two selections of other text
    assert residual.layers[1].sink_mean == pytest.approx(0.002, abs=0.001)  # uniform attention has 0.003


def test_without_its_super_expert_there_is_none(residual, without):
    assert without.formations == [] and without.forming_layers == [] and without.writers() == set()
    assert all(layer.massive == 0 for layer in without.layers)
    assert without.inner_max < residual.inner_max / 5
    assert max(layer.ratio for layer in without.layers[1:-1]) < 40
    assert without.sink_mean < residual.sink_mean / 2
    decay = sink_decay(residual, without)
    assert decay[0] == pytest.approx(0, abs=1e-6)  # attention of layers 0 and 1 comes before the expert
    assert all(d > 0.1 for d in decay[2:]) and decay[8] > 0.8 and decay[9] > 0.8
    layer = 6
    ratios = [b / a for a, b in zip(residual.layers[layer].sinks, without.layers[layer].sinks, strict=True)]
    assert decay[layer] == pytest.approx(1 - sum(ratios) / len(ratios))


def test_the_trigger_is_the_token_not_the_position(tiny, domains):
    """BOS at position 100: the activation forms there."""
    ids = domains["english"].ids[:1, 1:257].clone()
    ids[0, 100] = 0
    residual = observe_residual(tiny, windows_of(ids), prefix=0, sequences=1)
    assert {(f.position, f.token_id) for f in residual.formations} == {(100, 0)}
    ids[0, 100] = ids[0, 99]
    assert not observe_residual(tiny, windows_of(ids), prefix=0, sequences=1).formations


def test_thresholds_and_sequences_are_arguments(tiny, domains):
    short = {"english": domains["english"], "code": domains["code"]}
    residual = observe_residual(tiny, short, prefix=1, sequences=3, min_ratio=1000)
    assert residual.sequences == {"english": 2, "code": 1} and not residual.formations
    assert residual.min_ratio == 1000
    seen = []
    assert observe_residual(tiny, short, prefix=1, sequences=1, progress=seen.append).sequences == {"english": 1}
    assert seen == [512]
    for arguments in ({"sequences": 0}, {"domains": {}}):
        with pytest.raises(SedetectError):
            observe_residual(tiny, **{"domains": short, "prefix": 1} | arguments)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_random_model_has_no_formation(name):
    model = random_model(name)
    ids = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    residual = observe_residual(model, windows_of(ids), prefix=0, sequences=3)
    assert residual.formations == [] and residual.forming_layers == []
    assert len(residual.layers) == 3 and all(len(layer.sinks) == 4 for layer in residual.layers)
    assert all(0 < layer.sink_mean < 1 for layer in residual.layers)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_attention_and_experts_explain_every_jump(name):
    """With the thresholds at the floor nearly every element is a formation: shared, dense, biased experts and all."""
    model = random_model(name)
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    residual = observe_residual(model, windows_of(ids), prefix=0, sequences=1, min_value=0.0, min_ratio=1.0)
    assert residual.found > len(residual.formations) == 3 * 16
    kinds = {writer.expert.kind for f in residual.formations for writer in f.writers}
    assert kinds == {"qwen3_moe": {"routed"}, "gpt_oss": {"routed"}}.get(name, {"routed", "shared", "dense"})
    for one in residual.formations:
        assert one.explained == pytest.approx(1, abs=2e-3), one


def test_shares_where_the_layer_scales_its_experts(residual):
    """GraniteMoe multiplies blocks by residual_multiplier: every share is larger by that, and share_of undoes it."""
    (formation,) = residual.formations[:1]
    scaled = replace(
        formation,
        attention=formation.attention / 0.22,
        writers=[replace(w, share=w.share / 0.22) for w in formation.writers],
        explained=formation.explained / 0.22,
    )
    assert scaled.share_of(SE) == pytest.approx(formation.share_of(SE)) == pytest.approx(formation.writers[0].share)
    half = [Writer(SE, 1.14, 1.0), Writer(parse_place("L1E3"), 3.41, 1.0)]
    part = replace(scaled, writers=half, attention=0.0, explained=4.55)
    assert replace(residual, formations=[part]).writers() == {parse_place("L1E3")}
    assert part.share_of(parse_place("L1E9")) == 0


@pytest.mark.parametrize("under", ["nothing", "a profile", "a profile of first rows"])
def test_what_is_switched_off_writes_nothing(under):
    """An ablation around the observation: neither the routed nor the shared expert is a writer, the rest adds up."""
    model = random_model("qwen2_moe")
    ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    off = {parse_place(name) for name in ("L0E1", "L0E3", "L2shared")}
    settings = {"prefix": 0, "sequences": 1, "min_value": 0.0, "min_ratio": 1.0}
    assert off & {w.expert for f in observe_residual(model, windows_of(ids), **settings).formations for w in f.writers}
    context = nullcontext() if under == "nothing" else profile(model, first_rows="first" in under)
    with context, ablate(model, off):
        residual = observe_residual(model, windows_of(ids), **settings)
    assert not off & {w.expert for f in residual.formations for w in f.writers if w.share}
    for one in residual.formations:
        assert one.explained == pytest.approx(1, abs=2e-3), one


def test_everything_is_restored(domains):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa").eval()
    configs = [bank.module.config for bank in find_banks(model)]
    windows = windows_of(domains["code"].ids[:1, :64])
    logits = model(input_ids=windows["mine"].ids).logits

    def check():
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
            "sdpa"
        }
        assert all(bank.module.config is config for bank, config in zip(find_banks(model), configs, strict=True))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(model(input_ids=windows["mine"].ids).logits, logits)

    observe_residual(model, windows, prefix=1)
    check()

    def fail(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe_residual(model, windows, prefix=1, progress=fail)
    check()
    with pytest.raises(SedetectError, match="eval"):
        observe_residual(model.train(), windows, prefix=1)


def test_layers_without_attention_weights():
    """A layer whose attention block gives no weights has no sinks, and D_sink leaves it out."""
    model = random_model("qwen3_moe")
    banks = find_banks(model)
    (block,) = attention_blocks(decoder_layers(model, banks)[1], "model.layers.1", banks)
    original = block.forward
    block.forward = lambda *args, **kwargs: (original(*args, **kwargs)[0], None)
    ids = torch.randint(3, 96, (1, 16))
    residual = observe_residual(model, windows_of(ids), prefix=0)
    assert [layer.sinks is None for layer in residual.layers] == [False, True, False]
    assert residual.notes == ["no attention weights, and so no sinks, in layers 1"]
    assert sink_decay(residual, residual) == [pytest.approx(0), None, pytest.approx(0)]
    assert Residual.from_dict(json.loads(json.dumps(residual.to_dict(), allow_nan=False))) == residual


def test_sinks_beside_uniform_attention(residual, without):
    """The bound is SINK_MASS above what attention to all tokens alike gives the first one, at any length."""
    uniform = sum(1 / (query + 1) for query in range(128, 512)) / 384
    assert residual.uniform == without.uniform == pytest.approx(uniform)
    assert residual.best_head == max(max(layer.sinks) for layer in residual.layers) > residual.sink_mean
    assert (residual.has_sinks, without.has_sinks) == (True, False)
    said = f"{residual.sink_mean:.1%} of the attention on the first token, {residual.best_head:.0%} in the best head; "
    assert residual.sinks_line == f"attention sinks: {said}uniform attention has {uniform:.1%}"
    assert without.sinks_line.startswith(f"no notable attention sinks: {without.sink_mean:.1%} of the attention")
    for mass, enough in ((uniform + SINK_MASS + 1e-9, True), (uniform + SINK_MASS - 1e-9, False), (0.0, False)):
        assert with_sinks(residual, [mass, mass]).has_sinks is enough
    short = replace(with_sinks(residual, [0.2]), seq_len=8, prefix=1)
    assert short.uniform == pytest.approx(sum(1 / n for n in range(3, 9)) / 6) and not short.has_sinks
    assert replace(short, prefix=4).uniform == pytest.approx(sum(1 / n for n in range(5, 9)) / 4)
    unknown = with_sinks(residual, None)
    assert (unknown.sink_mean, unknown.best_head, unknown.has_sinks) == (None, None, None)
    assert unknown.sinks_line == "attention sinks not observed: the model gives no attention weights"
    gated = replace(without, instead=["learned sinks", "output gates"])
    assert gated.sinks_line == f"{without.sinks_line}; its attention has learned sinks and output gates"


FULL = {"layer_types": ["full_attention"] * 3}  # where a model this small has linear attention alone


def with_sinks(residual: Residual, sinks: list[float] | None) -> Residual:
    return replace(residual, layers=[replace(layer, sinks=sinks) for layer in residual.layers])


@pytest.mark.parametrize(
    "name, config, instead",
    [
        ("gpt_oss", {}, ["learned sinks"]),
        ("mimo_v2_flash", {}, ["learned sinks"]),
        ("qwen3_next", FULL, ["output gates"]),
        ("qwen3_5_moe", {"text_config": FULL}, ["output gates"]),
        ("minimax", {}, ["output gates"]),
        ("step3p7", {}, ["output gates"]),
        ("qwen3_moe", {}, []),
        ("deepseek_v3", {}, []),
    ],
)
def test_what_attention_has_in_place_of_sinks(name, config, instead):
    family = FAMILIES[name]
    model = tiny_model(name, replace(family, config=family.config | config))
    banks = find_banks(model)
    layers = decoder_layers(model, banks)
    blocks = [block for n, layer in enumerate(layers) for block in attention_blocks(layer, f"layers.{n}", banks)]
    assert blocks and sink_substitutes(blocks) == instead
    assert observe_residual(model, windows_of(torch.randint(3, 96, (1, 12))), prefix=0).instead == instead


def test_values_that_are_not_finite_are_counted():
    model = random_model("qwen3_moe")
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] = torch.inf
    residual = observe_residual(model, windows_of(torch.tensor([[4, 6, 7, 8, 9, 5]])), prefix=0)
    assert residual.layers[0].nonfinite > 0
    assert any("NaN or Inf" in note and "after layer 0" in note for note in residual.notes)
    json.dumps(residual.to_dict(), allow_nan=False)


def test_the_document(residual):
    document = json.loads(json.dumps(residual.to_dict(), allow_nan=False))
    assert document["forming_layers"] == [1] and document["format"] == "sedetect-residual"
    assert document["formations"][0]["writers"][0]["expert"] == "L1E28"
    assert Residual.from_dict(document | {"ablated": {}}) == residual
    of_before = {name: value for name, value in document.items() if name != "instead"}
    assert Residual.from_dict(of_before) == residual, "files of 0.1.0"


def test_the_command(tmp_path):
    arguments = ["--dtype", "float32", "--sequences", "2", "--seq-len", "128", "--tokens", "1024"]
    arguments += ["--ablate", "candidates"]
    result = CliRunner().invoke(load(), ["analyze", "residual", str(TINY), *arguments, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "massive activations form in L1, written by L1E28" in result.output
    assert "without L1E28, L9E7" in result.output and "D_sink" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if line.startswith(" "))
    document = json.loads((tmp_path / "residual.json").read_text(encoding="utf-8"))
    before, after = Residual.from_dict(document), Residual.from_dict(document["ablated"]["residual"])
    assert before.forming_layers == [1] and after.forming_layers == []
    assert document["ablated"]["experts"] == ["L1E28", "L9E7"]
    assert document["ablated"]["sink_decay"] == pytest.approx(sink_decay(before, after))


def test_the_command_refuses(tmp_path):
    for option, said in (
        (["--sequences", "0"], "'--sequences': 0 should be greater than or equal to 1"),
        (["--ablate", "nothing"], "'nothing': not the name of an expert"),
        (["--ablate", "L1E99"], "L1E99: "),
    ):
        arguments = ["--seq-len", "32", "--tokens", "128", *option, "-o", tmp_path / "out"]
        assert said in refused(run("analyze", "residual", TINY, *arguments))
        assert not (tmp_path / "out").exists()


def test_the_residual_stream_tells_a_late_candidate_apart(tiny, residual, without):
    """L9E7 has the value and the first-token signature of a super expert; no later layer carries what it writes."""
    stats = profile_model(
        tiny, text=Text(tokens=2048, seq_len=256), tokenizer=AutoTokenizer.from_pretrained(TINY)
    ).stats
    everywhere = {"layers": 1.0, "percentile": 95, "fraction": 0.01}
    judged = {str(e): e for e in rank(stats, **everywhere, residual=residual).super_experts}
    unjudged = {str(e): e for e in rank(stats, **everywhere).super_experts}
    assert (unjudged["L9E7"].carried, unjudged["L9E7"].verdict) == (None, "candidate")
    assert (judged["L9E7"].carried, judged["L9E7"].verdict) == (False, "candidate")
    assert (judged["L1E28"].carried, judged["L1E28"].verdict) == (True, "candidate")
    assert unjudged["L1E28"].verdict == "candidate"
    by_data = rank(stats, layers="data", residual=residual, percentile=90)
    assert [str(e) for e in by_data.super_experts] == ["L1E28"] and by_data.population == 256
    assert by_data.threshold == rank(stats).threshold and "the set is of the layers" in " ".join(by_data.notes)
    carried = replace(residual, formations=[replace(f, carried_to=f.layer + 1) for f in residual.formations])
    late = rank(stats, layers="data", residual=carried, fraction=0.05)  # L9 forms and carries: A reaches to it
    assert {str(e) for e in late.super_experts} == {"L1E28", "L9E7"} and late.population == 320
    # a residual without massive activations forms no layer set
    nothing = rank(stats, layers="data", residual=without)
    assert nothing.super_experts == [] and [str(e) for e in nothing.found] == ["L1E28", "L9E7"]
    silent = rank(stats, residual=without)  # a sign less, and the others stay
    assert [(str(e), e.carried) for e in silent.found] == [("L1E28", False), ("L9E7", False)]
    assert silent.headline.startswith("2 candidates: ") and silent.headline.endswith("; no notable attention sinks")
    with pytest.raises(SedetectError, match="layers 'data' needs"):
        rank(stats, layers="data")
