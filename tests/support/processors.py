"""Processors of multimodal models, built from the bundled tokenizer, and tiny models that they go with."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor

from support.conformance import available
from support.families import FAMILIES, model_class, tiny_config
from support.models import TINY

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
MINIMAX = {"image_token": "]<]image[>[", "video_token": "]<]video[>[", "b": "]<]start of image[>[",
           "e": "]<]end of image[>["}  # fmt: skip
CASES = {
    "qwen3_vl_moe": ("qwen3_vl", "qwen2_vl", {"patch_size": 16, **SMALL}, QWEN, QWEN_IMAGE),
    "qwen3_5_moe": ("qwen3_vl", "qwen2_vl", {"patch_size": 16, **SMALL}, QWEN, QWEN_IMAGE),
    "glm4v_moe": ("glm4v", "glm4v", SMALL, GLM, "<|begin_of_image|><|image|><|end_of_image|>"),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "ernie4_5_vl_moe", SMALL, ERNIE, "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>"),
    "inkling2": ("inkling2", "inkling2", {}, {"image_token": "<|unused_200054|>"}, "<|unused_200054|>"),
    "minimax_m3_vl": ("minimax_m3_vl", "minimax_m3_vl", {}, MINIMAX, "]<]image[>["),
    "glm5_next": ("glm5_next", "glm5_next", {}, {**GLM, "bv": "<|begin_of_video|>", "ev": "<|end_of_video|>"},
                  "<|begin_of_image|><|image|><|end_of_image|>"),
    "deepseek_ocr2": ("deepseek_ocr2", "deepseek_ocr2", {"size": {"height": 192, "width": 192}},
                      {"image_token": "<image>"}, "<image>"),
}  # fmt: skip
PILLOW = {"deepseek_ocr2": {"patch_size": 4}}  # whose processors need Pillow alone, and what these are given


def families(names=CASES):
    """Parameters: those of the names that transformers has, marked torchvision where Pillow is not enough."""
    return [
        pytest.param(name, marks=() if name in PILLOW else pytest.mark.torchvision)
        for name in names
        if name in available()
    ]


def part_of(model: str, kind: str, suffix: str) -> type:
    module = importlib.import_module(f"transformers.models.{model}.{kind}_{model}")
    return next(
        value for name, value in vars(module).items() if name.endswith(suffix) and value.__module__ == module.__name__
    )


def make_tokenizer(special: dict[str, str]):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values()]})
    tokenizer.pad_token = tokenizer.eos_token
    for key, token in special.items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def make_processor(name: str):
    of, images, settings, special, image = CASES[name]
    tokenizer = make_tokenizer(special)
    backend = "" if importlib.util.find_spec("torchvision") else "Pil"
    kind = "image_processing_pil" if backend else "image_processing"
    parts = [part_of(images, kind, f"ImageProcessor{backend}")(**settings), tokenizer]
    if of != "inkling2" and name not in PILLOW:
        video = part_of(of, "video_processing", "VideoProcessor")
        parts.append(video(draw_on_frames=False) if of == "ernie4_5_vl_moe" else video())  # that needs a font
    template = TEMPLATE.replace("IMAGE", image, 1)
    return part_of(of, "processing", "Processor")(*parts, chat_template=template, **PILLOW.get(name, {}))


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
    config.get_text_config().max_position_embeddings = 1024  # of 256, which some images fill
    torch.manual_seed(0)
    return cls._from_config(config, dtype=torch.float32).eval()


def omni():
    """A tiny Qwen3-Omni thinker, which takes sound too, and its processor."""
    modalities = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "audio", "video")}
    ends = {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    tokenizer = make_tokenizer(modalities | ends)
    cls = model_class("qwen3_omni_moe", FAMILIES["qwen3_omni_moe"].model)
    config = tiny_config(cls.config_class, {"text_config": {"vocab_size": len(tokenizer)}})
    names = {name: name.replace("bos", "start").replace("eos", "end") for name in modalities | ends}
    for name, token in (modalities | ends).items():
        setattr(config, f"{names[name]}_id", tokenizer.convert_tokens_to_ids(token))
    sound = "{% elif c.type == 'audio' %}<|audio_bos|><|audio_pad|><|audio_eos|>{% else %}"
    template = TEMPLATE.replace("IMAGE", "<|vision_bos|><|image_pad|><|vision_eos|>", 1).replace("{% else %}", sound)
    processor = part_of("qwen3_omni_moe", "processing", "Processor")(
        part_of("qwen2_vl", "image_processing", "ImageProcessor")(patch_size=16, **SMALL),
        part_of("qwen2_vl", "video_processing", "VideoProcessor")(),
        WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins),
        tokenizer,
        chat_template=template,
    )
    torch.manual_seed(0)
    return cls._from_config(config, dtype=torch.float32).eval(), processor


def save(name: str, folder: Path) -> Path:
    """A checkpoint folder of the model and its processor."""
    processor = make_processor(name)
    model = build(name, processor)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    named = {"extra_special_tokens": CASES[name][3]}  # by attribute, as published tokenizers have them
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def draw(width: int, height: int):
    """A red square on white."""
    from PIL import Image

    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (width // 4, height // 4, width // 2, height // 2))
    return image
