"""What an option may be, so that a wrong choice is refused before the library is imported.

tests/test_start.py holds each against the library's own table.
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


class How(StrEnum):  # of an option that may be repeated, typer takes no Literal
    SKIP = "skip"
    RENORMALIZE = "renormalize"
    REMOVE = "remove"


GROUP = 128  # inputs per scale, as sedetect.compression.simulated has it
