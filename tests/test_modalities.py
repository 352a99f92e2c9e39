"""Text, image, video and audio tokens apart: every row of the experts, against loops over what the model was given."""

from collections import defaultdict
from pathlib import Path
from zlib import crc32

import pytest
import torch
from support.conformance import Seen, available, experts_rows, hooks, inputs_of, reference, run
from support.families import FAMILIES, VOCAB, tiny_model
from support.models import TINY, random_model
from support.processors import multimodal

import sedetect
from sedetect.compression.pruning import choose_kept
from sedetect.errors import SedetectError
from sedetect.kernels.records import decode
from sedetect.models.modalities import MODALITIES, placeholders
from sedetect.models.row_context import RowTracker
from sedetect.ranking.coverage import unseen
from sedetect.ranking.saliencies import saliency
from sedetect.stats.place import BankId, Place

TOKENS = {"image": VOCAB - 1, "video": VOCAB - 2, "audio": VOCAB - 3}


def build(name: str):
    """A tiny model, with placeholder ids that its vocabulary has."""
    model = tiny_model(name, FAMILIES[name])
    for modality in placeholders(model.config):
        for key in (f"{modality}_token_id", f"{modality}_token_index"):
            if hasattr(model.config, key):
                setattr(model.config, key, TOKENS[modality])
    return model


def inputs_with_spans(name: str, model) -> dict[str, torch.Tensor]:
    """What the family's model is called with: a span of each modality, one begins a text, two meet."""
    inputs = inputs_of(FAMILIES[name], model)
    stack = "decoder_" if "decoder_input_ids" in inputs else ""
    ids = inputs[f"{stack}input_ids"]
    known = placeholders(model.config)
    if "pixel_values" not in inputs:  # whose image has its token already
        ids[0, 3:5] = ids[1, 0:3] = TOKENS["image"]
        if "video" in known:
            ids[1, 3:5] = TOKENS["video"]
        if "audio" in known:
            ids[0, 7] = TOKENS["audio"]
    return inputs


def modality_of(token: int, known: dict[str, int]) -> str:
    return next((name for name in known if TOKENS[name] == token), "text")


def spans(ids: torch.Tensor, known: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """By modality, the places (row, column) at which a span of it begins; of text, the first tokens of the rows."""
    found = {name: [] for name in MODALITIES}
    for row, tokens in enumerate(ids.tolist()):
        for column, token in enumerate(tokens):
            before = modality_of(tokens[column - 1], known) if column else None
            name = modality_of(token, known)
            if (name != before and name != "text") or (name == "text" and not column):
                found[name].append((row, column))
    return found


@pytest.mark.parametrize("name", multimodal())
def test_every_row_has_its_modality(name):
    """Rows, largest outputs and their places of every expert, for each modality, by plain loops."""
    model = build(name)
    inputs, known = inputs_with_spans(name, model), placeholders(model.config)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    expected, begins = reference(name, model, inputs, ids, None), spans(ids, known)
    with sedetect.profile(model, modalities=True) as prof:
        run(model, inputs)
    with sedetect.profile(model) as plain:
        run(model, inputs)
    whole, parts = prof.stats, prof.modalities
    assert all(whole.banks[bank].equal(state, sums_rtol=0) for bank, state in plain.stats.banks.items())
    present = {modality_of(token, known) for token in ids.flatten().tolist()}
    assert parts.keys() == present and "image" in present
    for modality, stats in parts.items():
        places = [modality_of(int(token), known) == modality for token in ids.flatten()]
        assert (stats.header.tokens, stats.header.sequences) == (sum(places), len(begins[modality]))
        for bank, state in stats.banks.items():
            if bank.stack == "vision" and modality == "image":
                assert state.equal(whole.banks[bank], sums_rtol=0)
            elif bank.stack != "decoder":
                assert int(state.rows.sum()) == 0  # of which no token is known
            if bank.stack != "decoder":
                continue
            seen = expected.seen[stats.header.banks[str(bank)].module]
            for expert in range(state.num_experts):
                own = {p: n for p, n in seen[expert].places.items() if modality_of(p[1], known) == modality}
                assert int(state.rows[expert]) == sum(own.values()), f"{modality} {bank} expert {expert}"
                largest = max((float(seen[expert].outputs[place].max()) for place in own), default=0.0)
                assert float(state.out_max[expert]) == pytest.approx(largest, rel=1e-4)
                for first, records in ((True, state.first_outliers), (False, state.outliers)):
                    for record in filter(None, decode(records[expert])):
                        assert int(ids[record.sequence, record.position]) == record.token_id
                        assert modality_of(record.token_id, known) == modality
                        assert ((record.sequence, record.position) in begins[modality]) == first


def towers() -> list[str]:
    """Families with experts in a vision tower."""
    return [
        name for name in available() if isinstance(FAMILIES[name].layers, dict) and "vision" in FAMILIES[name].layers
    ]


def with_pictures(video: int) -> dict[str, torch.Tensor]:
    """A text with images of 4 and 8 patches, and a video of so many frames of 4; four patches are a token."""
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(3))
    ids[0, [2, 5, 6]], ids[0, 8 : 8 + video] = TOKENS["image"], TOKENS["video"]
    pixels = torch.randn(12 + 4 * video, 3 * 14 * 14, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids,
        "pixel_values": pixels[:12],
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 4, 2]]),
        "pixel_values_videos": pixels[12:],
        "video_grid_thw": torch.tensor([[video, 2, 2]]),
    }


@pytest.mark.parametrize("name", towers())
def test_a_row_of_a_vision_tower_is_a_patch(name):
    """Its position is its number in its image or video; by plain loops over what the tower's experts are given."""
    model, inputs = build(name), with_pictures(video=2)
    calls = []
    with sedetect.profile(model, modalities=True) as prof, hooks() as add:
        for path, module in model.named_modules():
            if ".vision_tower." in path and hasattr(module, "is_transposed"):
                add(module.register_forward_pre_hook(lambda m, args, path=path: calls.append((path, m, *args))))
        run(model, inputs)
    banks = {prof.stats.header.banks[str(bank)].module: bank for bank in prof.stats.banks if bank.routed}
    assert {(kind, len(x)) for kind, (_, _, x, *_) in zip(("image", "video"), calls)} == {("image", 12), ("video", 8)}
    places = {"image": [*range(4), *range(8)], "video": [*range(8)]}
    for kind, (path, module, *given) in zip(("image", "video"), calls, strict=True):
        seen = defaultdict(Seen)
        # The place of a row there is (0, token): the patch.
        experts_rows(seen, module, *given, torch.tensor(places[kind])[:, None], None)
        state = prof.modalities[kind].banks[banks[path]]
        assert state.rows.tolist() == [seen[e].rows for e in range(state.num_experts)]
        assert not prof.modalities["text"].banks[banks[path]].rows.any() and not state.first_rows.any()
        for expert, record in enumerate(decode(state.peak())):
            if seen[expert].rows:
                assert (record.position, record.token_id, record.sequence) == (seen[expert].token, TOKENS[kind], -1)
    assert not [note for note in prof.stats.header.notes if note.code == "unmapped"]


@pytest.mark.parametrize("name", towers())
def test_where_images_have_as_many_patches_as_videos_a_note_says_that_they_are_not_told_apart(name):
    model, inputs = build(name), with_pictures(video=3)
    with sedetect.profile(model, modalities=True) as prof:
        run(model, inputs)
    (note,) = (note for note in prof.stats.header.notes if note.code == "unmapped")
    assert note.text == "rows not mapped: those of the vision stack"
    bank = next(bank for bank in prof.stats.banks if bank.stack == "vision" and bank.routed)
    assert int(prof.stats.banks[bank].rows.sum()) == 2 * 24
    assert {record.position for record in decode(prof.stats.banks[bank].peak()) if record} == {-1}


def plant_for_images(model, stats, ids, layer: int, expert: int, scale: float = 1000) -> str:
    """Send image tokens to an expert and no other token, and scale its output up; returns its name."""
    bank = next(bank for bank in stats.banks if bank.routed and bank.layer == layer)
    experts = model.get_submodule(stats.header.banks[str(bank)].module)
    block = next(m for _, m in model.named_modules() if any(child is experts for child in m.children()))
    router = next(child for n, child in block.named_children() if n in ("gate", "router"))
    seen = []
    handle = router.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        x, image = seen[0].reshape(ids.numel(), -1).double(), (ids.flatten() == TOKENS["image"]).double()
        direction = torch.linalg.lstsq(x, 40 * (2 * image - 1)).solution  # + on image tokens, - on the others
        router.weight[expert] = direction.to(router.weight.dtype)
        experts.down_proj[expert] *= scale
    return f"L{layer}E{expert}"


ROUTED_BY_A_MATRIX = ("qwen3_vl_moe", "qwen3_5_moe", "hy_v4_vl", "mistral_large4")


@pytest.mark.parametrize("name", [name for name in ROUTED_BY_A_MATRIX if name in available()])
def test_an_expert_of_images_alone_is_found_on_an_image_token(name):
    model = build(name)
    ids = inputs_with_spans(name, model)["input_ids"]
    with sedetect.profile(model, modalities=True) as prof:
        model(input_ids=ids, use_cache=False)
    planted = plant_for_images(model, prof.stats, ids, 1, 5)
    with sedetect.profile(model, modalities=True) as prof:
        model(input_ids=ids, use_cache=False)
    bank = next(bank for bank in prof.stats.banks if bank.routed and bank.layer == 1)
    assert int(prof.modalities["text"].banks[bank].rows[5]) == 0
    assert int(prof.modalities["image"].banks[bank].rows[5]) == int((ids == TOKENS["image"]).sum())
    (one,) = (e for e in sedetect.rank(prof.modalities["image"]).super_experts if str(e) == planted)
    assert one.token_id == TOKENS["image"] == int(ids[one.sequence_id, one.position])
    assert planted in {str(e) for e in sedetect.rank(prof.stats).super_experts}
    assert planted not in {str(e) for e in sedetect.rank(prof.modalities["text"]).super_experts}


@pytest.fixture(scope="module")
def model():
    return build("qwen3_vl_moe")


def image_ids() -> torch.Tensor:
    """Two texts of 12: an image of two tokens in the first; in the second one of three, first of all, and one more."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[0, 4:6] = ids[1, :3] = ids[1, 9] = TOKENS["image"]
    return ids


def counted(stats) -> tuple[int, int, int]:
    state = next(iter(stats.banks.values()))
    return stats.header.tokens, stats.header.sequences, int(state.first_rows.sum()) // 2


def test_text_alone_is_one_modality_with_the_same_bits(model):
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    with sedetect.profile(model, source="text", modalities=True) as prof:
        model(input_ids=ids)
    (modality,) = prof.modalities
    assert modality == "text"
    for bank, state in prof.stats.banks.items():
        assert prof.modalities["text"].banks[bank].equal(state, sums_rtol=0)


@pytest.mark.parametrize("pieces", [(12,), (5, 7), (4, 8), (1, 9, 2)])
def test_a_span_that_a_cache_continues_is_one(model, pieces):
    ids, cache, start = image_ids(), None, 0
    with sedetect.profile(model, modalities=True) as prof:
        for length in pieces:
            cache = model(
                input_ids=ids[:, start : start + length], past_key_values=cache, use_cache=True
            ).past_key_values
            start += length
    assert counted(prof.modalities["image"]) == (6, 3, 3)
    assert counted(prof.modalities["text"]) == (18, 1, 1)  # the second text begins with an image
    assert counted(prof.stats) == (24, 2, 2)


def test_generate_goes_on_with_text(model):
    ids, mask = image_ids(), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :2] = 0  # padding that hides two tokens of the image
    with sedetect.profile(model, modalities=True) as prof:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert counted(prof.modalities["image"]) == (4, 3, 3)
    assert prof.modalities["text"].header.tokens == 18 + 2 * 3
    records = [r for state in prof.stats.banks.values() for r in decode(state.outliers.flatten(0, 1)) if r is not None]
    assert {r.position for r in records if r.sequence == 0} <= set(range(1, 15))


def test_places_in_a_picture_are_no_positions(model):
    """Rotary position ids of three axes hold places in pictures; of four, the first is a place in the text."""
    ids = image_ids()
    axes = torch.arange(12).expand(3, 2, 12).clone()
    axes[:, :, 5:] -= 1
    for given in (axes, torch.cat((torch.arange(12).expand(1, 2, 12), axes))):
        rows = RowTracker(model).begin((), {"input_ids": ids, "position_ids": given})
        assert rows.position.tolist() == [*range(12), *range(12)]


def test_types_of_the_processor_tell_the_modality_of_embeddings(model):
    ids = image_ids()
    embeddings = model.get_input_embeddings()(ids)
    types = (ids == TOKENS["image"]).to(torch.int64)
    with sedetect.profile(model, modalities=True) as prof:
        model(inputs_embeds=embeddings, mm_token_type_ids=types)
    assert counted(prof.modalities["image"]) == (6, 3, 3)
    with sedetect.profile(model, modalities=True) as prof:
        model(inputs_embeds=embeddings)
    assert not prof.modalities
    assert [note.code for note in prof.stats.header.notes] == ["untyped"]


def test_a_compiled_model_tells_them_apart(model):
    ids = image_ids()
    with sedetect.profile(model, source="s", backend="torch", modalities=True) as plain:
        model(input_ids=ids, use_cache=False)
    with sedetect.profile(model, source="s", backend="torch", modalities=True) as prof:
        torch.compile(model, backend="eager")(input_ids=ids, use_cache=False)
    for modality, stats in plain.modalities.items():
        for bank, state in stats.banks.items():
            assert prof.modalities[modality].banks[bank].rows.equal(state.rows)
            assert prof.modalities[modality].banks[bank].first_rows.equal(state.first_rows)


def test_what_is_refused(model):
    with pytest.raises(SedetectError, match="Qwen3MoeForCausalLM: its tokens are of text alone"):
        sedetect.profile(random_model("qwen3_moe"), modalities=True)
    with pytest.raises(SedetectError, match="its tokens are of text alone"):
        sedetect.profile_model(TINY, measuring=sedetect.Measuring(modalities=True))
    with pytest.raises(SedetectError, match="modalities: are not told apart where a model is streamed"):
        sedetect.profile_model(TINY, measuring=sedetect.Measuring(modalities=True), stream=True)
    parts = []
    for source in ("one", "two"):
        with sedetect.profile(model, source=source, modalities=True) as prof:
            model(input_ids=image_ids())
        parts.append((prof.stats, prof.modalities))
    (whole, one), (_, two) = parts
    assert counted(one["image"].merge(two["image"])) == (12, 6, 6)
    for mixed in (two["image"], two["text"]):
        with pytest.raises(SedetectError, match="do not merge: one may be in the other"):
            whole.merge(mixed)
    with pytest.raises(SedetectError, match="image and of text tokens do not merge"):
        one["text"].merge(two["image"])


def test_text_alone_would_prune_what_images_use(tmp_path):
    """By the statistics of text the expert of images goes, by those of both it stays: as docs/compression.md has it."""
    ids, model = image_ids(), build("qwen3_vl_moe")
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.dim() > 1:  # the same in every release, whatever it draws first
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(crc32(name.encode())))
    with sedetect.profile(model, modalities=True) as prof:
        model(input_ids=ids, use_cache=False)
    plant_for_images(model, prof.stats, ids, 1, 5, scale=4)
    with sedetect.profile(model, modalities=True) as prof:
        model(input_ids=ids, use_cache=False)
    bank, parts = BankId("decoder", 1, "routed"), prof.modalities
    parts["text"].save(tmp_path / "text.safetensors")
    for by in ("frequency", "reap"):
        assert 5 not in choose_kept(tmp_path / "text.safetensors", by, 0.25)[bank]
        assert 5 in choose_kept(prof.stats, by, 0.25)[bank]
    assert Place(*bank, 5) in unseen(parts["text"]) and Place(*bank, 5) not in unseen(prof.stats)
    page = (Path(__file__).parents[1] / "docs" / "compression.md").read_text()
    for what, stats in {"text": parts["text"], "image": parts["image"], "both": prof.stats}.items():
        gone = sorted(set(range(8)) - set(choose_kept(stats, "reap", 0.25)[bank]))
        reaps = " | ".join(f"{value:.1f}" for value in saliency(stats, "reap")[bank].tolist())
        line = f"| {what} | {reaps} | {', '.join(f'E{e}' for e in gone)} |"
        assert line in page, line
