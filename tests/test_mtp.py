"""The head that predicts a further token: measured by the model's own definition, named, and pruned with the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import refused, run
from support.conformance import Seen, experts_rows, hooks
from support.heads import EXPERT, LAYERS, put_head
from support.models import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig

import sedetect
from sedetect.compression.merging import group_ream
from sedetect.compression.pruning import choose_kept, prune_checkpoint
from sedetect.errors import SedetectError
from sedetect.experiments.proof import candidates_of
from sedetect.kernels.records import decode
from sedetect.stats.place import BankId

BANK = BankId("mtp", LAYERS, "routed")
TEXT = sedetect.Text(tokens=320, seq_len=32, batch_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, longer = put_head(tmp_path_factory.mktemp("mtp") / "m", CONFIGS["deepseek_v3"]())
    return folder, longer, sedetect.profile_model(folder, text=TEXT, mtp=True)


@torch.no_grad()
def by_loop(folder: Path, longer, windows) -> tuple[dict[int, Seen], dict[tuple[int, int], int]]:
    """What the head's experts see and give, one row at a time; and the expected tokens by (sequence, position)."""
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen, tokens = {e: Seen() for e in range(8)}, {}
    layer, calls = longer.model.layers[LAYERS], []

    def norm(x, name):
        weight = stored[f"model.layers.{LAYERS}.{name}.weight"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight

    for ids, number in zip(windows.ids, windows.numbers.tolist()):
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state
        both = torch.cat((norm(model.model.embed_tokens(ids[None, 1:]), "enorm"), norm(hidden[:, :-1], "hnorm")), -1)
        x = both @ stored[f"model.layers.{LAYERS}.eh_proj.weight"].T
        length = x.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rotary = longer.model.rotary_emb(x, position_ids=torch.arange(1, length + 1)[None])
        with hooks() as add:
            add(layer.mlp.experts.register_forward_pre_hook(lambda m, args: calls.append(args)))
            layer(x, attention_mask=mask, position_embeddings=rotary)
        one = {e: Seen() for e in range(8)}
        experts_rows(one, layer.mlp.experts, *calls.pop(), ids[None, 1:], None)
        tokens |= {(number, place): int(token) for place, token in enumerate(ids.tolist()) if place}
        for e, own in one.items():
            seen[e].rows += own.rows
            seen[e].norm_sum += own.norm_sum
            seen[e].out_max = max(seen[e].out_max, own.out_max)
    return seen, tokens


def test_its_experts_by_a_plain_loop(made):
    folder, longer, result = made
    (state,) = [state for bank, state in result.stats.banks.items() if bank == BANK]
    seen, tokens = {e: Seen() for e in range(8)}, {}
    for windows in result.windows.values():
        part, known = by_loop(folder, longer, windows)
        for e, own in part.items():
            seen[e].rows += own.rows
            seen[e].norm_sum += own.norm_sum
            seen[e].out_max = max(seen[e].out_max, own.out_max)
        tokens |= {(windows.source, *place): token for place, token in known.items()}
    for e, own in seen.items():
        assert int(state.rows[e]) == own.rows
        assert float(state.out_max[e]) == pytest.approx(own.out_max, rel=1e-3)
        assert float(state.norm_sum[e]) == pytest.approx(own.norm_sum, rel=1e-3)
    sources = sorted(result.stats.header.sources)
    for first, records in ((True, state.first_outliers), (False, state.outliers)):
        for record in filter(None, decode(records.flatten(0, 1))):
            assert tokens[sources[record.source], record.sequence, record.position] == record.token_id
            assert (record.position == 1) == first
    assert int(state.rows.sum()) == 2 * sum(w.ids[:, 1:].numel() for w in result.windows.values())


def test_the_planted_expert_is_found_and_the_model_is_measured_as_without(made):
    folder, _, result = made
    plain = sedetect.profile_model(folder, text=TEXT)
    assert all(result.stats.banks[bank].equal(state, sums_rtol=0) for bank, state in plain.stats.banks.items())
    assert result.stats.header.digest == plain.stats.header.digest
    assert set(result.stats.banks) - set(plain.stats.banks) == {BANK, BANK._replace(kind="shared")}
    assert f"mtp.L{LAYERS}E{EXPERT}" in {str(expert) for expert in sedetect.rank(result.stats).found}
    ranked = sedetect.rank(plain.stats)
    assert [str(e) for e in sedetect.rank(result.stats).super_experts] == [str(e) for e in ranked.super_experts]
    assert result.stats.header.banks[str(BANK)].module == f"model.layers.{LAYERS}.mlp.experts"
    codes = {note.code for note in result.stats.header.notes}
    assert "mtp" in codes and "unmeasured_experts" not in codes
    assert "unmeasured_experts" in {note.code for note in plain.stats.header.notes}


def test_pruned_by_its_own_saliency_it_loads_again(made, tmp_path):
    """By the command, from the results of a profile; without the head's statistics it is left out, and said so."""
    folder, _, _ = made
    profile = tmp_path / "profile"
    options = ("--tokens", "320", "--seq-len", "32", "--batch-size", "4")
    assert "mtp.L3E5" in run("profile", folder, "-o", profile, "--mtp", *options).out
    assert f"model.layers.{LAYERS}.mlp.experts" in run("plan", folder).out
    said = run("prune", folder, "-o", tmp_path / "out", "--stats", profile, "--ratio", "0.5").out
    assert "left out" not in said and "protected: mtp.L3E5" in said
    stats = sedetect.ModelStats.load(profile)
    kept = choose_kept(stats, "reap", 0.5, [e.place for e in sedetect.rank(stats).found], groups=2)
    assert EXPERT in kept[BANK]
    source, written = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    for layer, bank in ((LAYERS, BANK), (1, BankId("decoder", 1, "routed"))):
        for number, before in enumerate(kept[bank]):
            name = f"model.layers.{layer}.mlp.experts.{{}}.down_proj.weight"
            assert torch.equal(written[name.format(number)], source[name.format(before)])
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(written[name], source[name][kept[bank]])
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm"):
        name = f"model.layers.{LAYERS}.{name}.weight"
        assert torch.equal(written[name], source[name])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.n_routed_experts, config.num_hidden_layers, config.num_mtp_layers) == (4, LAYERS, 1)
    again = sedetect.profile_model(tmp_path / "out", text=TEXT, mtp=True)
    now = kept[BANK].index(EXPERT)
    assert f"mtp.L{LAYERS}E{now}" in {str(expert) for expert in sedetect.rank(again.stats).found}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and len(model.model.layers) == LAYERS


def test_without_its_statistics_it_is_left_out(made, tmp_path):
    folder, _, _ = made
    plain = sedetect.profile_model(folder, text=TEXT).stats
    notes = prune_checkpoint(folder, tmp_path / "without", choose_kept(plain, "reap", 0.5, groups=2))
    assert "tensors of multi-token prediction heads left out" in notes[0]
    assert json.loads((tmp_path / "without" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_sibling_of_the_same_form(tmp_path):
    """GLM-4.5, whose pattern of tensors to ignore names other layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    folder, _ = put_head(tmp_path / "m", Glm4MoeConfig(**sizes, **heads, n_routed_experts=8, num_experts_per_tok=2))
    result = sedetect.profile_model(folder, text=TEXT, mtp=True)
    assert f"mtp.L{LAYERS}E{EXPERT}" in {str(expert) for expert in sedetect.rank(result.stats).found}
    assert int(result.stats.banks[BANK].rows.sum()) == 2 * sum(w.ids[:, 1:].numel() for w in result.windows.values())


def test_what_is_refused(made, tmp_path):
    folder, longer, result = made
    tiny = Path("tests/data/tiny-moe")
    assert "its config has no multi-token prediction head" in refused(run("profile", tiny, "--mtp"))
    assert "streamed layer by layer" in refused(run("profile", folder, "--mtp", "--stream"))
    with pytest.raises(SedetectError, match="a loaded model is without its head"):
        sedetect.profile_model(longer, text=TEXT, tokenizer=result.tokenizer, mtp=True)
    assert sedetect.rank(result.stats).found and not candidates_of(result.stats, None)  # all in the head
    with pytest.raises(SedetectError, match="mtp.L3E5: is in a head that the model does not run"):
        candidates_of(result.stats, None, f"mtp.L{LAYERS}E{EXPERT}")
    with pytest.raises(SedetectError, match="mtp.3.routed: the model does not run this head"):
        group_ream({}, result.stats, "reap", {})
    without = shutil.copytree(folder, tmp_path / "without")
    tensors = load_file(without / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "eh_proj" not in k}, without / "model.safetensors", {"format": "pt"})
    with pytest.raises(SedetectError, match="cannot be loaded"):
        sedetect.profile_model(without, text=TEXT, mtp=True)
    document = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps(document | {"num_nextn_predict_layers": 2}))
    with pytest.raises(SedetectError, match="has 2 heads that predict further tokens"):
        sedetect.profile_model(without, text=TEXT, mtp=True)
