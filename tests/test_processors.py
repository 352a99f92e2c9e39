"""Multimodal models with images from their own processors: every row against a loop over what the processor gave."""

import pytest
import torch
from support.conformance import hooks
from support.processors import CASES, build, draw, families, make_processor

import sedetect
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
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = processor.tokenizer.convert_tokens_to_ids(CASES[name][3]["image_token"])
    calls = []
    with sedetect.profile(model, modalities=True) as prof, torch.no_grad(), hooks() as add:
        for path, module in model.named_modules():
            if hasattr(module, "is_transposed"):
                keep = lambda m, args, path=path: calls.append((path, *args[1:]))  # noqa: E731
                add(module.register_forward_pre_hook(keep))
        model(**inputs, use_cache=False)
    kinds = [None if not m else "image" if t == image else "text" for t, m in zip(ids.flatten(), mask.flatten())]
    rows = {}
    for path, index, gates in calls:
        mine = kinds
        if len(index) != len(kinds):  # the experts of images or of text alone
            vision = inputs["moe_mm_token_type_ids"].flatten() != 0
            mine = [k for k, v in zip(kinds, vision.tolist()) if v == (".vision_moe." in path)]
        for kind, experts, weights in zip(mine, index.tolist(), gates.tolist(), strict=True):
            for expert, gate in zip(experts, weights):
                if gate and kind:
                    rows[path, kind, expert] = rows.get((path, kind, expert), 0) + 1
    assert set(prof.modalities) == {"text", "image"}
    begins = {
        (r, c) for r, line in enumerate(ids.tolist()) for c, t in enumerate(line) if t == image and line[c - 1] != image
    }
    for kind, stats in prof.modalities.items():
        assert stats.header.tokens == kinds.count(kind)
        assert stats.header.sequences == (len(begins) if kind == "image" else len(ids))
        for bank, state in stats.banks.items():
            path = stats.header.banks[str(bank)].module
            if bank.routed and bank.stack == "decoder":
                assert state.rows.tolist() == [rows.get((path, kind, e), 0) for e in range(state.num_experts)], bank
            for first, records in ((True, state.first_outliers), (False, state.outliers)):
                for record in filter(None, decode(records.flatten(0, 1))):
                    column = int((mask[record.sequence].cumsum(0) == record.position + 1).nonzero()[0])
                    assert int(ids[record.sequence, column]) == record.token_id
                    assert (record.token_id == image) == (kind == "image")
                    if kind == "image":
                        assert ((record.sequence, column) in begins) == first
    notes = [str(note) for note in prof.stats.header.notes]
    assert not any("not mapped" in note for note in notes), notes
