"""Multimodal models with images from their own processors: every row against a loop over what the processor gave."""

import importlib

import pytest
import torch
from support.conformance import available, hooks
from support.families import FAMILIES, model_class, tiny_config
from support.models import TINY
from transformers import AutoTokenizer

import sedetect
from sedetect.kernels.records import decode

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

SMALL = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}\n{% endfor %}"
)
# Family -> the processor's model, what its image and video parts are given, its special tokens by attribute, and an
# image in its template.
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>"}  # fmt: skip
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = {"image_token": "<|image|>", "video_token": "<|video|>", "b": "<|begin_of_image|>", "e": "<|end_of_image|>"}
ERNIE = {f"{kind}{end}_token": f"<|{kind.upper()}{end.upper()}|>" for kind in ("image", "video")
         for end in ("", "_start", "_end")}  # fmt: skip
CASES = {
    "qwen3_vl_moe": ("qwen3_vl", "qwen2_vl", {"patch_size": 16, **SMALL}, QWEN, QWEN_IMAGE),
    "qwen3_5_moe": ("qwen3_vl", "qwen2_vl", {"patch_size": 16, **SMALL}, QWEN, QWEN_IMAGE),
    "glm4v_moe": ("glm4v", "glm4v", SMALL, GLM, "<|begin_of_image|><|image|><|end_of_image|>"),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "ernie4_5_vl_moe", SMALL, ERNIE, "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>"),
    "inkling2": ("inkling2", "inkling2", {}, {"image_token": "<|unused_200054|>"}, "<|unused_200054|>"),
}  # fmt: skip


def part_of(model: str, kind: str, suffix: str) -> type:
    module = importlib.import_module(f"transformers.models.{model}.{kind}_{model}")
    return next(
        value for name, value in vars(module).items() if name.endswith(suffix) and value.__module__ == module.__name__
    )


def make_processor(name: str):
    of, images, settings, special, image = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values()]})
    tokenizer.pad_token = tokenizer.eos_token
    for key, token in special.items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    parts = [part_of(images, "image_processing", "ImageProcessor")(**settings), tokenizer]
    if of != "inkling2":
        parts.append(part_of(of, "video_processing", "VideoProcessor")())
    template = TEMPLATE.replace("IMAGE", image, 1)
    return part_of(of, "processing", "Processor")(*parts, chat_template=template)


def build(name: str, processor):
    """A tiny model with the vocabulary and the image token of the processor."""
    family = FAMILIES[name]
    cls = model_class(name, family.model)
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in family.config.items()}
    given.setdefault("text_config", {})["vocab_size"] = len(processor.tokenizer)
    config = tiny_config(cls.config_class, given)
    for key in ("image_token_id", "image_token_index", "video_token_id"):
        if hasattr(config, key):
            setattr(config, key, processor.tokenizer.convert_tokens_to_ids(CASES[name][3].get(key[:11], "</s>")))
    torch.manual_seed(0)
    return cls._from_config(config, dtype=torch.float32).eval()


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


def draw(width: int, height: int):
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (width // 4, height // 4, width // 2, height // 2))
    return image


@pytest.mark.parametrize("name", [name for name in CASES if name in available()])
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
