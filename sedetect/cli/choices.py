"""The values that options accept, kept here so that a wrong one is refused before the library is imported.

tests/test_start.py compares each with the library's own table.
"""

from enum import StrEnum
from typing import Literal

Granularity = Literal["expert", "layer"]
Saliency = Literal["frequency", "gate-sum", "ean-sum", "ean-mean", "man", "msan", "reap", "max"]
Tool = Literal["llm-compressor", "gptqmodel", "auto-round", "modelopt", "bitsandbytes", "llama.cpp", "json"]
Target = Literal[Tool, "imatrix"]
Spread = Literal["even", "global"]
Merge = Literal["nearest", "ream"]
Runtime = Literal["vllm", "sglang", "transformers"]


class How(StrEnum):  # typer does not support Literal for a repeatable option
    SKIP = "skip"
    RENORMALIZE = "renormalize"
    REMOVE = "remove"


GROUP = 128  # inputs per scale, as in sedetect.compression.simulated
