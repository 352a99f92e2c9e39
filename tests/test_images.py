"""Calibration with images: chats through a model's own processor, against loops over what the processor gives."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.conformance import available, hooks
from support.models import TINY
from support.processors import CASES, draw, save

import sedetect
from sedetect.calibration.drawn import draw_images
from sedetect.errors import SedetectError
from sedetect.kernels.records import decode
from sedetect.models.loading import load_model, load_processor

pytest.importorskip("PIL")
pytest.importorskip("torchvision")

SHORT = sedetect.Text(tokens=2048, seq_len=128, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cache(lambda name: save(name, tmp_path_factory.mktemp("multimodal") / name))


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen3_vl_moe")


def rows_by_loops(folder, processor, chats):
    """By (module, modality, expert): rows of chats that run one by one, unpadded; and the token ids of each chat."""
    model = load_model(folder, sedetect.Loading(multimodal=True))
    image, rows, texts, calls = model.config.image_token_id, {}, [], []
    with torch.no_grad(), hooks() as add:
        for path, module in model.named_modules():
            if hasattr(module, "is_transposed"):
                keep = lambda m, args, path=path: calls.append((path, *args[1:]))  # noqa: E731
                add(module.register_forward_pre_hook(keep))
        for chat in chats:
            inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
            model(**inputs, use_cache=False)
            ids = inputs["input_ids"][0].tolist()
            texts.append(ids)
            for path, index, gates in calls:
                mine = ["image" if token == image else "text" for token in ids]
                if len(index) != len(ids):  # the experts of images or of text alone
                    vision = inputs["moe_mm_token_type_ids"].flatten() != 0
                    mine = [k for k, v in zip(mine, vision.tolist()) if v == (".vision_moe." in path)]
                for kind, experts, weights in zip(mine, index.tolist(), gates.tolist(), strict=True):
                    for expert, gate in zip(experts, weights):
                        rows[path, kind, expert] = rows.get((path, kind, expert), 0) + bool(gate)
            calls.clear()
    return rows, texts, image


@pytest.mark.parametrize("name", [name for name in CASES if name in available()])
def test_drawn_images_reach_every_expert_that_their_tokens_choose(checkpoint, name):
    folder = checkpoint(name)
    processor = load_processor(folder)
    result = sedetect.profile_model(folder, text=SHORT)
    rows, texts, image = rows_by_loops(folder, processor, draw_images())
    tokens = {"image": sum(ids.count(image) for ids in texts), "all": sum(map(len, texts))}
    assert list(result.domains)[-1] == "images" and len(result.domains) == 5
    drawn = result.domains["images"]
    assert (drawn.header.tokens, drawn.header.sequences) == (tokens["all"], len(texts))
    assert set(result.modalities) == {"text", "image"}
    for bank, state in drawn.banks.items():
        if not bank.routed or bank.stack != "decoder":
            continue
        path = drawn.header.banks[str(bank)].module
        by = {kind: [rows.get((path, kind, e), 0) for e in range(state.num_experts)] for kind in ("text", "image")}
        assert state.rows.tolist() == [sum(both) for both in zip(*by.values())]
        assert result.modalities["image"].banks[bank].rows.tolist() == by["image"]
        read = sum(stats.banks[bank].rows for domain, stats in result.domains.items() if domain != "images")
        assert result.modalities["text"].banks[bank].rows.tolist() == [a + b for a, b in zip(read.tolist(), by["text"])]
    assert result.modalities["image"].header.tokens == tokens["image"]
    for stats in (drawn, result.modalities["image"]):
        images_at = sorted(stats.header.sources).index(
            next(n for n in stats.header.sources if n in drawn.header.sources)
        )
        for state in stats.banks.values():
            for record in filter(None, decode(torch.cat((state.outliers, state.first_outliers), 1).flatten(0, 1))):
                if record.source == images_at and record.sequence >= 0:
                    assert texts[record.sequence][record.position] == record.token_id


def test_text_is_measured_as_without_images(folder):
    text = replace(SHORT, domains=("text",))
    alone, both = sedetect.profile_model(folder, text=text), sedetect.profile_model(folder, text=SHORT)
    assert alone.domains.keys() | {"images"} == both.domains.keys() and not alone.modalities
    for domain, stats in alone.domains.items():
        assert stats.header.sources.keys() == both.domains[domain].header.sources.keys()
        for bank, state in stats.banks.items():
            assert state.equal(both.domains[domain].banks[bank], sums_rtol=0)
    assert not sedetect.profile_model(TINY, text=SHORT).modalities  # a model of text alone


def chat(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents)]


def written(folder, chats, images=("a.png",)):
    for image in images:
        draw(60, 40).save(folder / image)
    (folder / "seen.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    return folder / "seen.jsonl"


IMAGE, QUESTION = {"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}
ANSWER = [{"type": "text", "text": "Red."}]


def test_a_file_of_chats(folder, tmp_path):
    """Chats with one image, none and two in one batch; in rounds of other sizes the same, and in parts that merge."""
    contents = ([IMAGE, QUESTION], [QUESTION], [QUESTION, IMAGE, IMAGE])
    file = written(tmp_path, [chat(content, ANSWER) for content in contents])
    whole = sedetect.profile_model(folder, str(file))
    processor = load_processor(folder)
    opened = draw(60, 40)
    chats = [chat([{"type": "image", "image": opened} if part is IMAGE else part for part in content], ANSWER)
             for content in contents]  # fmt: skip
    rows, texts, _ = rows_by_loops(folder, processor, chats)
    bank = next(bank for bank in whole.stats.banks if bank.routed and bank.stack == "decoder")
    path = whole.stats.header.banks[str(bank)].module
    expected = [rows.get((path, "text", e), 0) + rows.get((path, "image", e), 0) for e in range(8)]
    assert whole.stats.banks[bank].rows.tolist() == expected
    (source,) = whole.stats.header.sources.values()
    assert source.ranges == [[0, 3]] and source.info["domain"] == "seen"
    assert [ids.tolist() for ids in whole.chats["seen"].ids] == texts
    size = sedetect.Text(batch_size=2)
    parts = [sedetect.profile_model(folder, str(file), text=size, part=(number, 2)) for number in range(2)]
    merged = parts[0].stats.merge(parts[1].stats)
    assert merged.banks[bank].rows.equal(whole.stats.banks[bank].rows)
    image = parts[0].modalities["image"].merge(parts[1].modalities["image"])
    assert image.banks[bank].rows.equal(whole.modalities["image"].banks[bank].rows)
    with pytest.raises(SedetectError, match="twice"):
        parts[0].stats.merge(parts[0].stats)


def test_tokens_buy_chats_and_a_seed_chooses_them(folder, tmp_path):
    file = written(tmp_path, [chat([IMAGE, {"type": "text", "text": f"What is {n}?"}], ANSWER) for n in range(12)])
    whole = sedetect.profile_model(folder, str(file)).chats["seen"]
    few = [sedetect.profile_model(folder, str(file), text=sedetect.Text(100, seed=seed)).chats["seen"]
           for seed in (None, 1, 2)]  # fmt: skip
    assert whole.numbers.tolist() == [*range(12)]
    taken = [chats.numbers.tolist() for chats in few]
    assert taken[0] == [*range(len(taken[0]))] and len({*map(tuple, taken)}) == 3
    for chats in few:
        assert chats.tokens <= 100 < chats.tokens + max(map(len, whole.ids)) and chats.source == whole.source
        assert all(ids.equal(whole.ids[number]) for ids, number in zip(chats.ids, chats.numbers.tolist()))
    other = written(tmp_path, [chat([IMAGE, {"type": "text", "text": f"What is {n}?"}], ANSWER) for n in range(12)], [])
    draw(61, 40).save(tmp_path / "a.png")
    assert sedetect.profile_model(folder, str(other)).chats["seen"].source != whole.source


def test_what_is_refused(folder, tmp_path):
    file = str(written(tmp_path, [chat([IMAGE, QUESTION], ANSWER)]))
    for given, said in (
        ({"stream": True}, "a model that is streamed layer by layer reads text alone"),
        ({"until_stable": 1}, "until_stable reads text alone"),
        ({"residual": 1}, "residual: reads text"),
        ({"proving": sedetect.Proving()}, "proving: reads text"),
    ):
        with pytest.raises(SedetectError, match=said):
            sedetect.profile_model(folder, file, **given)
    with pytest.raises(SedetectError, match="takes text alone .*'seen' holds some"):
        sedetect.profile_model(TINY, file)
    with pytest.raises(SedetectError, match="takes text alone .*'images' holds some"):
        sedetect.profile_model(TINY, text=sedetect.Text(domains=("images",)))
    model, processor = load_model(folder), load_processor(folder)
    with pytest.raises(SedetectError, match="needs its processor .* pass processor="):
        sedetect.profile_model(model, file, tokenizer=processor.tokenizer)
    assert sedetect.profile_model(model, file, tokenizer=processor.tokenizer, processor=processor).modalities
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(SedetectError, match=r"seen: chat 0: .*a.png: not a readable image"):
        sedetect.profile_model(folder, file)
    sound = written(tmp_path, [chat([{"type": "audio", "path": "a.png"}, QUESTION], ANSWER)])
    with pytest.raises(SedetectError, match="holds audio and the model's processor takes none"):
        sedetect.profile_model(folder, str(sound))
    model.config.image_token_id -= 1  # of a model that is not the processor's
    text = sedetect.Text(domains=("images",))
    with pytest.raises(SedetectError, match="images: chat 0: holds image and .* makes no image token of it"):
        sedetect.profile_model(model, tokenizer=processor.tokenizer, processor=processor, text=text)
    model.config.image_token_id += 1
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(SedetectError, match="images: chat 0: Qwen3VLProcessor cannot read it"):
        sedetect.profile_model(model, tokenizer=processor.tokenizer, processor=processor, text=text)


def test_where_images_are_only_the_default_a_note_says_that_they_are_left_out(folder, monkeypatch):
    left_out = lambda result: [note.text for note in result.stats.header.notes if note.code == "images_left_out"]  # noqa: E731
    (note,) = left_out(sedetect.profile_model(folder, text=SHORT, stream=True))
    assert note.startswith("images left out: a model that is streamed")
    monkeypatch.setattr("sedetect.profiling.pictured.why_not", lambda: "drawing needs Pillow; pip install it")
    (note,) = left_out(sedetect.profile_model(folder, text=SHORT))
    assert note == "images left out: drawing needs Pillow; pip install it"
    with pytest.raises(SedetectError, match=r"^drawing needs Pillow"):
        sedetect.profile_model(folder, text=sedetect.Text(domains=("images",)))
    (folder / "processor_config.json").rename(folder / "other.json")
    assert not left_out(sedetect.profile_model(folder, text=SHORT))
    (folder / "other.json").rename(folder / "processor_config.json")
