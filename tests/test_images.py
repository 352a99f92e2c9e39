"""Calibration with images: chats through a model's own processor, against loops over what the processor gives."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.command import run
from support.conformance import hooks
from support.conformance import plant as scale
from support.families import FAMILIES
from support.models import TINY
from support.page import Page
from support.processors import CASES, build, draw, experts_called, families, make_processor, rows_of, save

import sedetect
from sedetect.calibration.drawn import draw_images
from sedetect.compression.pruning import choose_kept
from sedetect.errors import SedetectError
from sedetect.kernels.records import decode
from sedetect.models.banks import find_banks
from sedetect.models.loading import load_model, load_processor
from sedetect.ranking.modalities import uses
from sedetect.ranking.saliencies import found_places
from sedetect.results import Results
from sedetect.stats.place import Place

pytest.importorskip("PIL")

SHORT = sedetect.Text(tokens=1024, seq_len=128, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cache(lambda name: save(name, tmp_path_factory.mktemp("multimodal") / name))


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("deepseek_ocr2")


def rows_by_loops(folder, processor, chats):
    """By (module, modality, expert): rows of chats that run one by one, unpadded; and the token ids of each chat."""
    model = load_model(folder, sedetect.Loading(multimodal=True))
    image, rows, texts = model.config.image_token_id, Counter(), []
    with torch.no_grad(), experts_called(model) as calls:
        for chat in chats:
            inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
            inputs = inputs.to(model.dtype)  # pixels, of bfloat16 in llama4
            model(**inputs, use_cache=False)
            ids = inputs["input_ids"][0].tolist()
            texts.append(ids)
            rows.update(rows_of(calls, ["image" if token == image else "text" for token in ids], inputs))
            calls.clear()
    return rows, texts, image


# A checkpoint is as transformers has its class, without what FAMILIES adjusts.
@pytest.mark.parametrize("name", families(name for name in CASES if FAMILIES[name].adjust is None))
def test_drawn_images_reach_every_expert_that_their_tokens_choose(checkpoint, name):
    folder = checkpoint(name)
    processor = load_processor(folder)
    result = sedetect.profile_model(folder, text=SHORT)
    taken = result.chats["images"].numbers.tolist()
    assert taken == [*range(len(taken))] and len(taken) > 1
    rows, texts, image = rows_by_loops(folder, processor, draw_images()[: len(taken)])
    tokens = {"image": sum(ids.count(image) for ids in texts), "all": sum(map(len, texts))}
    assert list(result.domains)[-1] == "images" and len(result.domains) == 5
    drawn = result.domains["images"]
    assert (drawn.header.tokens, drawn.header.sequences) == (tokens["all"], len(texts))
    assert [ids.tolist() for ids in result.chats["images"].ids] == texts
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
    """Chats with one image, none, two and twice two, which share a forward; in parts that merge the same."""
    contents = ([IMAGE, QUESTION], [QUESTION], *[[QUESTION, IMAGE, IMAGE]] * 2)
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
    assert source.ranges == [[0, 4]] and source.info["domain"] == "seen"
    assert [ids.tolist() for ids in whole.chats["seen"].ids] == texts
    assert [len(batch.ids) for batch in whole.chats["seen"].batches(8)] == [1, 1, 2]
    size = sedetect.Text(batch_size=1)
    parts = [sedetect.profile_model(folder, str(file), text=size, part=(number, 2)) for number in range(2)]
    merged = parts[0].stats.merge(parts[1].stats)
    assert merged.banks[bank].rows.equal(whole.stats.banks[bank].rows)
    image = parts[0].modalities["image"].merge(parts[1].modalities["image"])
    assert image.banks[bank].rows.equal(whole.modalities["image"].banks[bank].rows)
    with pytest.raises(SedetectError, match="twice"):
        parts[0].stats.merge(parts[0].stats)


def test_images_in_parquet_are_those_of_files(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = sedetect.profile_model(folder, str(written(tmp_path, [chat([QUESTION, IMAGE], ANSWER)])))
    stored = chat([QUESTION, {"type": "image", "image": (tmp_path / "a.png").read_bytes()}], ANSWER)
    parquet.write_table(pa.Table.from_pylist([{"messages": stored}]), tmp_path / "seen.parquet")
    read = sedetect.profile_model(folder, str(tmp_path / "seen.parquet"))
    assert read.chats["seen"].source == files.chats["seen"].source
    for kind, stats in files.modalities.items():
        for bank, state in stats.banks.items():
            assert state.equal(read.modalities[kind].banks[bank], sums_rtol=0)


def test_tokens_buy_chats_and_a_seed_chooses_them(folder, tmp_path):
    file = written(tmp_path, [chat([IMAGE, {"type": "text", "text": f"What is {n}?"}], ANSWER) for n in range(8)])
    whole = sedetect.profile_model(folder, str(file)).chats["seen"]
    few = [sedetect.profile_model(folder, str(file), text=sedetect.Text(350, seed=seed)).chats["seen"]
           for seed in (None, 1, 2)]  # fmt: skip
    assert whole.numbers.tolist() == [*range(8)]
    taken = [chats.numbers.tolist() for chats in few]
    assert taken[0] == [*range(len(taken[0]))] and len({*map(tuple, taken)}) == 3
    for chats in few:
        assert chats.tokens <= 350 < chats.tokens + max(map(len, whole.ids)) and chats.source == whole.source
        assert all(ids.equal(whole.ids[number]) for ids, number in zip(chats.ids, chats.numbers.tolist()))
    other = written(tmp_path, [chat([IMAGE, {"type": "text", "text": f"What is {n}?"}], ANSWER) for n in range(8)], [])
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
    with pytest.raises(SedetectError, match="images: chat 0: .*DeepseekOcr2Processor"):
        sedetect.profile_model(model, tokenizer=processor.tokenizer, processor=processor, text=text)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize(("of", "images"), [("Qwen3VL", "Qwen2VL"), ("Llama4", "Llama4")])  # a video part; one backend
def test_a_processor_that_needs_torchvision(folder, tmp_path, of, images):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    parts = {"image_processor": {"image_processor_type": f"{images}ImageProcessor"}}
    parts["video_processor"] = {"video_processor_type": f"{of}VideoProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": f"{of}Processor", **parts}))
    with pytest.raises(SedetectError, match=r"its processor cannot be loaded without torchvision; pip install"):
        sedetect.profile_model(tmp_path, text=sedetect.Text(domains=("images",)))
    (tmp_path / "processor_config.json").write_text("{")  # not for want of a library
    with pytest.raises(SedetectError, match=r"its processor cannot be loaded \("):
        load_processor(tmp_path)


@pytest.mark.torchvision
def test_sound():
    """Chats with sound of two lengths, the second with an image before it."""
    processor = make_processor("qwen3_omni_moe")
    model = build("qwen3_omni_moe", processor)
    sounds = [{"type": "audio", "audio": {"array": [0.1] * 160 * n, "sampling_rate": 16000}} for n in (100, 50)]
    image = {"type": "image", "image": draw(60, 40)}
    chats = [chat([sounds[0], QUESTION], ANSWER), chat([image, QUESTION, sounds[1]], ANSWER)]
    result = sedetect.profile_model(model, {"heard": chats}, tokenizer=processor.tokenizer, processor=processor)
    ids = [one.tolist() for one in result.chats["heard"].ids]
    token = {kind: processor.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "audio")}
    counts = {kind: [text.count(number) for text in ids] for kind, number in token.items()}
    assert counts["audio"] == [13, 7] and counts["image"][0] == 0 < counts["image"][1]
    counts["text"] = [len(text) - sum(of[n] for of in counts.values()) for n, text in enumerate(ids)]
    tokens = {kind: (stats.header.tokens, stats.header.sequences) for kind, stats in result.modalities.items()}
    assert tokens == {"text": (sum(counts["text"]), 2), "image": (sum(counts["image"]), 1), "audio": (20, 2)}
    for kind, stats in result.modalities.items():
        for state in stats.banks.values():
            for record in filter(None, decode(torch.cat((state.outliers, state.first_outliers), 1).flatten(0, 1))):
                assert ids[record.sequence][record.position] == record.token_id
                assert next((k for k, number in token.items() if number == record.token_id), "text") == kind
    sounds[1]["audio"] = object()
    with pytest.raises(SedetectError, match="heard: chat 1: not a readable sound"):
        sedetect.profile_model(model, {"heard": chats}, tokenizer=processor.tokenizer, processor=processor)
    sounds[1]["audio"] = sounds[0]["audio"] | {"sampling_rate": 8000}
    with pytest.raises(SedetectError, match="heard: chat 1: sampled at 8000 Hz, the processor takes 16000"):
        sedetect.profile_model(model, {"heard": chats}, tokenizer=processor.tokenizer, processor=processor)


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


# All but those whose experts of images are not those of text, whose layer 1 is dense, or whose router's inputs of text
# and of images are not told apart by one direction.
PLANTED = [n for n in CASES if n not in ("ernie4_5_vl_moe", "llama4", "inkling", "qwen3_5_moe", "qwen4_exp")]
EXPERT = Place("decoder", 1, "routed", 0)  # of experts that saw no row, the first to go


def is_matrix(module, rows):
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and len(weight) == rows


def plant(folder, target):
    """A copy of the checkpoint in which image tokens alone choose EXPERT, whose output is scaled up.

    All text tokens are moved in one direction, which the router's row of the expert turns down.
    """
    model, processor = load_model(folder, sedetect.Loading(multimodal=True)), load_processor(folder)
    bank = next(bank for bank in find_banks(model) if bank.id == EXPERT.bank)
    block, words = model.get_submodule(bank.path.rpartition(".")[0]), model.get_input_embeddings().weight
    # the matrix of the router, wherever it stands beside the experts
    gate = next(m for m in block.modules() if m is not bank.module and is_matrix(m, 8))
    seen, images = [], []
    with torch.no_grad(), hooks() as add:
        words += 20 * words.std() * torch.randn(words.shape[1], generator=torch.Generator().manual_seed(0))
        add(gate.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2))))
        for chat in draw_images():
            inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
            model(**inputs, use_cache=False)
            images.append(inputs["input_ids"].flatten() == model.config.image_token_id)
        x, image = torch.cat(seen), torch.cat(images)
        away = x[image].mean(0) - x[~image].mean(0)
        gate.weight[EXPERT.number] = 100 * away / away.square().sum()
        scale(model, bank.path, EXPERT.number)
    shutil.copytree(folder, target)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def planted(checkpoint, tmp_path_factory):
    return cache(lambda name: plant(checkpoint(name), tmp_path_factory.mktemp("planted") / name))


@pytest.mark.parametrize("name", families(PLANTED))
def test_an_expert_of_images_is_found_and_text_alone_would_prune_it(planted, name):
    folder = planted(name)
    result = sedetect.profile_model(folder, text=SHORT)
    text, image = result.modalities["text"], result.modalities["image"]
    assert [int(stats.banks[EXPERT.bank].rows[EXPERT.number]) > 0 for stats in (text, image)] == [False, True]
    (found,) = sedetect.rank(result.stats).found
    assert found.place == EXPERT and not sedetect.rank(text).found
    chats = result.chats["images"]
    token = int(chats.ids[found.sequence_id][found.position])
    tokenizer = load_processor(folder).tokenizer
    assert token == found.token_id == tokenizer.convert_tokens_to_ids(CASES[name].special["image_token"])
    kept, kept_by_text = (choose_kept(stats, "reap", 0.25, found_places(sedetect.rank(stats)))
                          for stats in (result.stats, text))  # fmt: skip
    used = uses(result.stats, result.modalities)
    lost = {use.place for use in used if use.lost}
    assert EXPERT in lost
    assert lost == {Place(*bank, e) for bank in kept for e in set(kept[bank]) - set(kept_by_text[bank])
                    if int(image.banks[bank].rows[e])}  # fmt: skip
    for use in used:
        rows = [stats.banks[use.place.bank].rows.tolist() for stats in (image, text)]
        shares = [of[use.place.expert] / max(sum(of), 1) for of in rows]  # in a vision tower none of text
        assert (use.share, use.text) == tuple(shares) and use.rows == rows[0][use.place.expert]
        assert use.own == (use.share >= 2 * use.text and use.share >= 1 / len(rows[0]))
    assert not any(note.code == "never_ran" for note in result.stats.header.notes)
    assert not uses(text, {"text": text}) and not uses(image, {"image": image})


LITTLE = ("--tokens", 2048, "--seq-len", 128)


@pytest.fixture(scope="module")
def profiled(planted, tmp_path_factory):
    """A folder of results of images, and what was printed."""
    out = tmp_path_factory.mktemp("profiled")
    return out, run("profile", planted("deepseek_ocr2"), *LITTLE, "-o", out).out


def test_commands_show_what_images_use(planted, profiled, tmp_path):
    folder, (out, printed) = planted("deepseek_ocr2"), profiled
    assert "by domain: english none; chinese none; mathematics none; code none; images L1E0\n" in printed
    assert "by modality: text none; image L1E0\n" in printed
    assert re.search(
        r"^image tokens use 2 times as much as text does, or more: .*L1E0 \(\d+% of", printed, re.MULTILINE
    )
    assert re.search(r"^text alone would prune \(25% of each layer, by reap\), .*L1E0", printed, re.MULTILINE)
    assert re.search(r"^image: 1,450 tokens in 10 spans; coverage: 16 routed", printed, re.MULTILINE)
    assert {path.name for path in Results(out).modalities.path.iterdir()} == {"text.safetensors", "image.safetensors"}
    ranked = run("rank", out, "--by", "frequency").out
    assert "by modality: image L1E0; text none" in ranked and "by frequency), but all tokens would not: " in ranked
    alone = run("rank", Results(out).modalities.file("image")).out
    assert alone.startswith("1 candidate: L1E0") and "by modality" not in alone
    other = tmp_path / "other"
    assert run("profile", folder, *LITTLE, "--seed", 1, "-o", other).code == 0
    assert "text tokens alone: no candidate in any of 2 runs\n" in run("compare", out, other).out
    assert "image tokens alone: the same candidates in all 2 runs: L1E0\n" in run("compare", out, other).out
    apart = run("compare", *(Results(out).modalities.file(name) for name in ("text", "image")))
    assert apart.code == 1 and apart.out.startswith("the candidates differ")
    assert run("profile", folder, *LITTLE, "--domains", "text", "-o", other).code == 0
    assert not list(Results(other).modalities.path.iterdir())
    assert "alone:" not in run("compare", out, other).out


def test_the_report_shows_what_images_use(profiled):
    pytest.importorskip("altair")
    assert run("report", profiled[0]).code == 0
    page = Page((profiled[0] / "report.html").read_text())
    assert "Tokens of each modality alone" in page.text and "text alone would prune" in page.text
