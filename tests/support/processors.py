"""Processors of multimodal models, built from the bundled tokenizer, and tiny models that they go with."""

import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from support.conformance import available, hooks
from support.families import FAMILIES, MODELS, model_class, tiny_config
from support.loops import LOOPS
from support.models import TINY

SMALL = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% elif c.type == 'audio' %}SOUND{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """The processor of a family: that of the transformers model of its name, with the parts that its class takes.

    special   its special tokens by attribute, of the tokenizer and of the config; image_token is the one in the place
              of an image's tokens
    image     an image in its chat template; heard: a sound
    images    the model whose image part it has, and what that is given
    video     the model whose video part it has, where that is not the processor's; sound: the model whose sound part
    own       what the processor itself is given
    config    what the tiny model's config needs to take these images, beyond its family's
    """

    processor: str
    special: dict[str, str]
    image: str
    images: str
    settings: dict[str, Any] = field(default_factory=dict)
    video: str = ""
    sound: str = ""
    heard: str = ""
    own: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>"}  # fmt: skip
QWEN3_VL = Case("qwen3_vl", QWEN, "<|vision_start|><|image_pad|><|vision_end|>", "qwen2_vl",
                {"patch_size": 16, **SMALL})  # fmt: skip
GLM = {"image_token": "<|image|>", "video_token": "<|video|>", "b": "<|begin_of_image|>", "e": "<|end_of_image|>"}
GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
INKLING2 = Case("inkling2", {"image_token": "<|unused_200054|>"}, "<|unused_200054|>", "inkling2")
ERNIE = {f"{kind}{end}_token": f"<|{kind.upper()}{end.upper()}|>" for kind in ("image", "video")
         for end in ("", "_start", "_end")}  # fmt: skip
MINIMAX = {"image_token": "]<]image[>[", "video_token": "]<]video[>[", "b": "]<]start of image[>[",
           "e": "]<]end of image[>["}  # fmt: skip
OMNI = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "audio", "video")}
OMNI |= {f"{kind}_{name}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio")
         for end, name in (("bos", "bos"), ("eos", "eos"), ("bos", "start"), ("eos", "end"))}  # fmt: skip
GEMMA4 = Case(
    "gemma4", {f"{name}_token": f"<|{name}|>" for name in ("image", "audio", "boi", "eoi", "boa", "eoa")},
    "<|image|>", "gemma4", {"max_soft_tokens": 70},
    config={"vision_config": {"model_type": "gemma4_vision", "position_embedding_size": 64}},
)  # fmt: skip
CASES = {
    "qwen3_vl_moe": QWEN3_VL,
    "qwen3_5_moe": QWEN3_VL,
    "qwen4_exp": QWEN3_VL,
    "glm4v_moe": Case("glm4v", GLM, GLM_IMAGE, "glm4v", SMALL),
    "ernie4_5_vl_moe": Case(
        "ernie4_5_vl_moe", ERNIE, "<|IMAGE_START|><|IMAGE|><|IMAGE_END|>", "ernie4_5_vl_moe", SMALL
    ),
    "inkling2": INKLING2,
    "inkling2_loop": INKLING2,
    "inkling": Case(
        "inkling", {"image_token": "<|unused_200054|>", "audio_token": "<|unused_200053|>", "b": "<|content_image|>",
                    "a": "<|content_audio_input|>"},
        "<|content_image|><|unused_200054|>", "inkling",
    ),
    "minimax_m3_vl": Case("minimax_m3_vl", MINIMAX, "]<]image[>[", "minimax_m3_vl"),
    "glm5_next": Case(
        "glm5_next", {**GLM, "bv": "<|begin_of_video|>", "ev": "<|end_of_video|>"}, GLM_IMAGE, "glm5_next"
    ),
    "deepseek_ocr2": Case("deepseek_ocr2", {"image_token": "<image>"}, "<image>", "deepseek_ocr2",
                          {"size": {"height": 192, "width": 192}}, own={"patch_size": 4}),
    "unlimited_ocr": Case(
        "unlimited_ocr", {"image_token": "<image>"}, "<image>", "unlimited_ocr",
        {"size": {"height": 128, "width": 128}, "tile_size": 64, "max_patches": 2},
        config={"vision_config": {"sam_config": {"downsample_channels": [32, 32], "image_size": 128}}},
    ),
    "aria": Case(
        "aria", {"image_token": "<image>"}, "<image>", "aria", own={"size_conversion": {980: 16}},
        config={"vision_config": {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 70},
                "projector_patch_to_query_dict": {196: 16}},
    ),
    "mistral_large4": Case(
        "pixtral", {"image_token": "[IMG]", "b": "[IMG_BREAK]", "e": "[IMG_END]"}, "[IMG]", "pixtral",
        {"size": {"longest_edge": 64}}, own={"spatial_merge_size": 2},
    ),
    "hy_v4_vl": Case("hy_v4_vl", QWEN, QWEN3_VL.image, "hy_v4_vl", SMALL),
    "dots3_note": Case(
        "dots3_note",
        {"image_token": "<|imgpad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_comp_pad|>"},
        "<|imgpad|>", "qwen2_vl", {"temporal_patch_size": 1, **SMALL}, video="qwen3_vl",
    ),
    "muse_spark": Case(
        "muse_spark", {"image_token": "<|patch|>", "b": "<|image_start|>", "e": "<|image_end|>",
                       "video_token": "<|video|>", "audio_token": "<|audio|>"},
        "<|patch|>", "muse_glimmer", video="muse_glimmer", config={"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "gemma4": GEMMA4,
    "qwen3_omni_moe": Case(
        "qwen3_omni_moe", OMNI, "<|vision_bos|><|image_pad|><|vision_eos|>", "qwen2_vl", {"patch_size": 16, **SMALL},
        video="qwen2_vl", sound="whisper", heard="<|audio_bos|><|audio_pad|><|audio_eos|>",
        config={"audio_config": {"num_mel_bins": 80}},
    ),
    "llama4": Case(
        "llama4", {"image_token": "<|patch|>", "i": "<|image|>", "s": "<|image_start|>", "e": "<|image_end|>",
                   "x": "<|tile_x_separator|>", "y": "<|tile_y_separator|>"},
        "<|image|>", "llama4", {"size": {"height": 56, "width": 56}},
        config={"vision_config": {"image_size": 56, "projector_input_dim": 32, "projector_output_dim": 32,
                                  "vision_output_dim": 32, "intermediate_size": 128}},
    ),
    "step3p7": Case(
        "step3p7", {"image_token": "<im_patch>", "s": "<im_start>", "e": "<im_end>", "ps": "<patch_start>",
                    "pe": "<patch_end>", "n": "<patch_newline>"},
        "<im_patch>", "step3p7", {"size": {"height": 112, "width": 112}, "patch_size": 56},
    ),
}  # fmt: skip
# Of other classes that take images, why they are in no case.
WITHOUT = {
    "diffusion_gemma": "images left out: its encoder reads them",
    "qwen3_omni_moe:talker": "none: takes embeddings",
}
PILLOW = ("deepseek_ocr2",)  # whose processors need Pillow alone


def families(names=CASES):
    """Parameters: those of the names that transformers has, marked torchvision where Pillow is not enough."""
    return [
        pytest.param(name, marks=() if name in PILLOW else pytest.mark.torchvision)
        for name in names
        if name in available()
    ]


def multimodal() -> list[str]:
    """The families whose forward takes pictures or sound, but for the one whose tokens are given as embeddings."""

    def takes(name):
        known = inspect.signature(model_class(name, FAMILIES[name].model).forward).parameters
        return any(one in known for one in ("pixel_values", "input_features", "audio_input_ids"))

    return [name for name in available() if takes(name)]


def processor_of(name: str) -> str:
    """For the table of the docs: the class of the processor that a family is tested with, or why it is not."""
    if name not in CASES:
        return WITHOUT.get(name, "-")
    source = MODELS / CASES[name].processor / f"processing_{CASES[name].processor}.py"  # which may need torchvision
    return re.findall(r"^class (\w+Processor)\(", source.read_text(), re.MULTILINE)[0]


def part_of(model: str, kind: str, suffix: str) -> type:
    module = importlib.import_module(f"transformers.models.{model}.{kind}_{model}")
    return next(
        value for name, value in vars(module).items() if name.endswith(suffix) and value.__module__ == module.__name__
    )


def make_tokenizer(special: dict[str, str]):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": [*dict.fromkeys(special.values())]})
    tokenizer.pad_token = tokenizer.eos_token
    for key, token in special.items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def make_processor(name: str):
    case = CASES[name]
    tokenizer = make_tokenizer(case.special)
    backend = "" if importlib.util.find_spec("torchvision") else "Pil"
    cls = part_of(case.processor, "processing", "Processor")
    parts = {
        "image_processor": lambda: part_of(
            case.images, "image_processing_pil" if backend else "image_processing", f"ImageProcessor{backend}"
        )(**case.settings),
        "video_processor": lambda: part_of(case.video or case.processor, "video_processing", "VideoProcessor")(
            **{"draw_on_frames": False} if name == "ernie4_5_vl_moe" else {}  # which needs a font
        ),
        "feature_extractor": lambda: part_of(case.sound or case.processor, "feature_extraction", "FeatureExtractor")(),
        "tokenizer": lambda: tokenizer,
    }
    template = TEMPLATE.replace("IMAGE", case.image).replace("SOUND", case.heard)
    taken = {part: make() for part, make in parts.items() if part in inspect.signature(cls.__init__).parameters}
    return cls(**taken, chat_template=template, **case.own)


def build(name: str, processor):
    """A tiny model with the vocabulary and the image token of the processor."""
    family = FAMILIES[name]
    cls = model_class(name, family.model)
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in family.config.items()}
    for key, value in CASES[name].config.items():
        given[key] = (given.get(key) or {}) | value if isinstance(value, dict) else value
    given.setdefault("text_config", {})["vocab_size"] = len(processor.tokenizer)
    config = tiny_config(cls.config_class, given)
    tokens = dict.fromkeys(("image_token", "video_token", "audio_token"), len(processor.tokenizer))  # where it has none
    tokens |= {key: processor.tokenizer.convert_tokens_to_ids(token) for key, token in CASES[name].special.items()}
    for key, number in tokens.items():
        setattr(config, f"{key}_id", number)
        if hasattr(config, f"{key}_index"):
            setattr(config, f"{key}_index", number)
    config.get_text_config().max_position_embeddings = 1024  # of 256, which some images fill
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    if family.adjust is not None:
        family.adjust(model)
    return model


@contextmanager
def experts_called(model):
    """What the experts modules of the language model are given, call by call: (path, module, arguments)."""
    calls = []
    with hooks() as add:
        for path, module in model.named_modules():
            if (hasattr(module, "is_transposed") or type(module).__name__ in LOOPS) and ".vision_tower." not in path:
                keep = lambda m, args, kwargs, path=path: calls.append((path, m, [*args, *kwargs.values()]))  # noqa: E731
                add(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls


def rows_of(calls, kinds: list, inputs) -> Iterator[tuple[str, Any, int]]:
    """(path, kind, expert) of each row that has a routing weight; kinds: those of the tokens, in order."""
    vision = inputs["moe_mm_token_type_ids"].flatten().tolist() if "moe_mm_token_type_ids" in inputs else None
    for path, module, args in calls:
        mine = kinds
        if vision is not None:  # experts of images or of text alone
            mine = [kind for kind, v in zip(kinds, vision, strict=True) if (v != 0) == (".vision_moe." in path)]
        if hasattr(module, "is_transposed"):
            index, gates = args[1].tolist(), args[2].tolist()
            assert len(index) == len(mine)
            for kind, experts, weights in zip(mine, index, gates, strict=True):
                yield from ((path, kind, expert) for expert, gate in zip(experts, weights, strict=True) if gate)
        else:
            yield from ((path, mine[row], expert) for row, expert, *_ in LOOPS[type(module).__name__](module, *args))


def save(name: str, folder: Path) -> Path:
    """A checkpoint folder of the model and its processor."""
    processor = make_processor(name)
    model = build(name, processor)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    named = {"extra_special_tokens": CASES[name].special}  # by attribute, as published tokenizers have them
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def draw(width: int, height: int):
    """A red square on white."""
    from PIL import Image

    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (width // 4, height // 4, width // 2, height // 2))
    return image
