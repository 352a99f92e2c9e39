"""Memory: how much is free, and how much a checkpoint and a streamed profile's hidden states take."""

import json
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from sedetect.checkpoints.files import read_header, shards_of
from sedetect.checkpoints.staging import DTYPES
from sedetect.errors import Argument, SedetectError, shorten

WEIGHTS_SHARE = 0.9  # of the free memory; the rest is for a forward
_CGROUP = Path("/sys/fs/cgroup")  # of this process, in a container
_HIDDEN_SHARE = {"cuda": 0.25, "cpu": 0.5}  # of the free memory; what is larger goes to the next place


def free_memory(device: torch.device) -> int:
    """Bytes free on a device now; for main memory, within the limit of the process's control group (container)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used, kinds = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        # Cached files count as used, but make room.
        cached = re.findall(r"^(?:in)?active_file (\d+)$", kinds.read_text() if kinds.is_file() else "", re.MULTILINE)
        free = min(free, int(limit.read_text()) - int(used.read_text()) + sum(map(int, cached)))
    return free


def dequantized_here() -> set[str]:
    """Storage formats ("fp8", "mxfp4") that transformers converts to 16 bits when it loads them here.

    "fp8" where there is no GPU, or one below compute capability 8.9; "mxfp4" without the package kernels.
    """
    from transformers.utils import is_kernels_available  # where nothing is quantized, it is not needed

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    fp8, mxfp4 = capability < (8, 9), not is_kernels_available()
    return {name for name, gone in (("fp8", fp8), ("mxfp4", mxfp4)) if gone}


def weight_bytes(
    folder: str | os.PathLike[str], dtype: str | torch.dtype = "auto", dequantized: Collection[str] = frozenset()
) -> int:
    """Bytes of a checkpoint folder's weights in memory, floating-point ones in dtype; from the files' headers alone.

    dequantized: values stored in these formats ("fp8", "mxfp4") take 16 bits instead. Raises SedetectError as
    check_checkpoint does.
    """
    dtype, total = choose_dtype(dtype), 0
    entries: dict[str, dict[str, Any]] = {}
    for shard in shards_of(Path(folder)):
        entries |= json.loads(read_header(shard))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        stored = DTYPES.get(entry["dtype"])
        way, packed = _quantized(name, entries)
        values, wide = math.prod(entry["shape"]) * packed, way in dequantized
        if isinstance(dtype, torch.dtype) and (wide or (stored is not None and stored.is_floating_point)):
            total += values * dtype.itemsize
        else:
            start, end = entry["data_offsets"]
            total += 2 * values if wide else end - start
    return total


def _quantized(name: str, entries: dict[str, dict[str, Any]]) -> tuple[str | None, int]:
    """How the values of a tensor are quantized (None: not), and how many of them an element holds."""
    dtype = entries[name]["dtype"]
    if dtype.startswith("F8_E"):
        return "fp8", 1
    if dtype == "U8" and name.endswith("_blocks"):
        return "mxfp4", 2
    scales = (f"{name}_scale_inv", f"{name.removesuffix('weight')}scale")
    if dtype == "I8" and any(entries.get(scale, {}).get("dtype") == "F8_E8M0" for scale in scales):
        return "fp8", 2  # FP4, which the quantizer of FP8 loads
    return None, 1


def too_large(
    folder: str | os.PathLike[str], device: str | torch.device | None, dtype: str | torch.dtype = "auto"
) -> str | None:
    """Why a checkpoint folder's weights do not fit the device's free memory, as one line; None where they do."""
    device = choose_device(device)
    needed, free = weight_bytes(folder, dtype, dequantized_here()), free_memory(device)
    if needed <= WEIGHTS_SHARE * free:
        return None
    return f"{size(needed)} of weights do not fit the {size(free)} free on {device}: streaming them layer by layer"


def place_of_hidden(device: torch.device, needed: int) -> torch.device | None:
    """The place for hidden states of that many bytes: the device if they take at most a quarter of a GPU's free memory,
    main memory if at most half of it, else None (disk).
    """
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if needed <= _HIDDEN_SHARE.get(place.type, 0) * free_memory(place):
            return place
    return None


def size(count: float) -> str:
    """Bytes as text: 31.1 MB, 1.34 TB (powers of 1000, as for disks)."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    place = min(len(units) - 1, int(math.log10(max(count, 1)) // 3))
    return f"{count:.0f} bytes" if place == 0 else f"{count / 1000**place:.3g} {units[place]}"


def choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SedetectError(
            Argument("device"), f" {device}: cannot be used ({shorten(error)}); use cpu or leave it out"
        ) from None
    return device


def choose_dtype(dtype: str | torch.dtype) -> Literal["auto"] | torch.dtype:
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise SedetectError(
            Argument("dtype"), f" {dtype}: not a floating-point type of torch; use auto, bfloat16, float16 or float32"
        )
    return found
