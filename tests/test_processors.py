"""Multimodal models with images from their own processors: every row against a loop over what the processor gave."""

import re
from collections import Counter

import pytest
import torch
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.processors import CASES, build, draw, experts_called, families, make_processor, multimodal, rows_of

import sedetect
from sedetect.errors import SedetectError
from sedetect.kernels.records import decode

pytest.importorskip("PIL")

CHATS = [
    [{"role": "user", "content": [{"type": "image", "image": (60, 40)}, {"type": "text", "text": "What is it?"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "Two of them, and a longer text. "},
                                  {"type": "image", "image": (90, 40)}, {"type": "image", "image": (30, 80)}]}],
]  # fmt: skip


def pictures(chats):
    for chat in chats:
        yield [
            {"role": m["role"], "content": [c if c["type"] == "text" else {"type": "image", "image": draw(*c["image"])}
                                            for c in m["content"]]}
            for m in chat
        ]  # fmt: skip


@pytest.mark.parametrize("name", families())
def test_rows_are_those_of_the_processor(name):
    processor = make_processor(name)
    model = build(name, processor)
    inputs = processor.apply_chat_template(
        list(pictures(CHATS)), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    inputs = inputs.to(torch.float32)  # pixels, of bfloat16 in llama4
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = processor.tokenizer.convert_tokens_to_ids(CASES[name].special["image_token"])
    with sedetect.profile(model, modalities=True) as prof, torch.no_grad(), experts_called(model) as calls:
        model(**inputs, use_cache=False)
    kinds = [None if not m else "image" if t == image else "text" for t, m in zip(ids.flatten(), mask.flatten())]
    rows = Counter(rows_of(calls, kinds, inputs))
    assert set(prof.modalities) == {"text", "image"}
    begins = {
        (r, c) for r, line in enumerate(ids.tolist()) for c, t in enumerate(line) if t == image and line[c - 1] != image
    }
    for kind, stats in prof.modalities.items():
        assert stats.header.tokens == kinds.count(kind)
        assert stats.header.sequences == (len(begins) if kind == "image" else len(ids))
        for bank, state in stats.banks.items():
            path = stats.header.banks[str(bank)].module
            if bank.stack != "decoder":  # of patches; see test_modalities.py
                continue
            if bank.routed:
                assert state.rows.tolist() == [rows[path, kind, e] for e in range(state.num_experts)], bank
            for first, records in ((True, state.first_outliers), (False, state.outliers)):
                for record in filter(None, decode(records.flatten(0, 1))):
                    column = int((mask[record.sequence].cumsum(0) == record.position + 1).nonzero()[0])
                    assert int(ids[record.sequence, column]) == record.token_id
                    assert (record.token_id == image) == (kind == "image")
                    if kind == "image":
                        assert ((record.sequence, column) in begins) == first
    notes = [str(note) for note in prof.stats.header.notes]
    assert not any("not mapped" in note for note in notes), notes


def test_every_class_that_takes_images_is_tested_with_its_processor():
    """A class that a release adds fails here until it has a case; qwen3_omni_moe:talker takes embeddings."""
    assert set(multimodal()) <= set(CASES)


@pytest.mark.torchvision
@pytest.mark.skipif("diffusion_gemma" not in available(), reason="a later transformers has it")
def test_images_for_an_encoder_are_left_out_and_refused_where_they_are_asked_for():
    model, processor = tiny_model("diffusion_gemma", FAMILIES["diffusion_gemma"]), make_processor("gemma4")
    model.resize_token_embeddings(len(processor.tokenizer))
    given = {"tokenizer": processor.tokenizer, "processor": processor}
    result = sedetect.profile_model(model, text=sedetect.Text(tokens=64, seq_len=16), **given)
    (note,) = (note for note in result.stats.header.notes if note.code == "images_left_out")
    assert re.match("images left out: DiffusionGemma.*: its encoder reads images and sound, whose rows", note.text)
    assert not result.chats and result.stats.header.tokens == 64
    text = sedetect.Text(domains=("images",))
    with pytest.raises(SedetectError, match="not mapped to tokens; leave out domain 'images'"):
        sedetect.profile_model(model, text=text, **given)
