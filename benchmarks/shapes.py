"""Shared by bench_streaming.py and bench_ranks.py: shapes of models, text to run, and a cold page cache."""

import contextlib
import os
import random
from pathlib import Path

from sedetect.stats.model import ModelStats

TOKENIZER = Path(__file__).parents[1] / "tests/data/tiny-moe"
# Of Qwen3-30B-A3B, but for the number of layers.
QWEN3 = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936, "intermediate_size": 6144,
}  # fmt: skip
SMALL = QWEN3 | {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "head_dim": 16, "num_attention_heads": 4,
    "vocab_size": 4096,
}  # fmt: skip


def texts(tokens: int) -> dict[str, list[str]]:
    """Two domains of random words, each more than half of so many tokens (a word is 3.8 of tiny-moe's on average)."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(3000)]
    return {domain: [" ".join(rng.choices(words, k=tokens // 4))] for domain in ("one", "two")}


def drop_cache(folder: Path) -> None:
    """Let the system forget a checkpoint's files; as root, whatever it caches."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def from_disk() -> int:
    """Bytes that this process has read from storage so far; -1 if the system does not report them."""
    try:
        return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])
    except (OSError, IndexError):
        return -1


def differences(found: dict[str, ModelStats], expected: dict[str, ModelStats]) -> list[str]:
    """Banks whose counts, maxima or kept rows differ by a bit, or whose sums by more than 1e-12."""
    if found.keys() != expected.keys():
        return [f"domains {list(found)} and {list(expected)}"]
    return [
        f"{domain}: {bank}"
        for domain, stats in expected.items()
        for bank, state in stats.banks.items()
        if bank not in found[domain].banks or not found[domain].banks[bank].equal(state, sums_rtol=1e-12)
    ]
