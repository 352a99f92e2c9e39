"""What fits where: the memory there is, and what a checkpoint and the hidden states of a streamed profile take."""

import json
import math
import re
from pathlib import Path

import psutil
import torch
from transformers.modeling_utils import str_to_torch_dtype

from sedetect.checkpoint import choose_device, choose_dtype, read_header, shards_of

WEIGHTS_SHARE = 0.9  # of the free memory; the rest is for a forward
_CGROUP = Path("/sys/fs/cgroup")  # of this process, in a container
_HIDDEN_SHARE = {"cuda": 0.25, "cpu": 0.5}  # of the free memory; what is larger goes to the next place


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now; of main memory, what the process's control group (container) leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used, kinds = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        # Cached files count as used, but make room.
        cached = re.findall(r"^(?:in)?active_file (\d+)$", kinds.read_text() if kinds.is_file() else "", re.MULTILINE)
        free = min(free, int(limit.read_text()) - int(used.read_text()) + sum(map(int, cached)))
    return free


def weight_bytes(folder: str | Path, dtype: str | torch.dtype = "auto", dequantized: bool = False) -> int:
    """Bytes of a checkpoint folder's weights in memory, floating-point ones in dtype; from the files' headers alone.

    dequantized: 8-bit floats take 16 bits, which is what transformers makes of them without a GPU. Raises SedetectError
    as check_checkpoint does.
    """
    dtype, total = choose_dtype(dtype), 0
    for shard in shards_of(Path(folder)):
        for name, entry in json.loads(read_header(shard)).items():
            if name != "__metadata__":
                stored = str_to_torch_dtype.get(entry["dtype"])
                cast = dtype != "auto" and stored is not None and stored.is_floating_point
                start, end = entry["data_offsets"]
                wide = 2 if dequantized and entry["dtype"].startswith("F8_E") else 1
                total += math.prod(entry["shape"]) * dtype.itemsize if cast else (end - start) * wide
    return total


def too_large(folder: str | Path, device: str | torch.device | None, dtype: str | torch.dtype = "auto") -> str | None:
    """Why a checkpoint folder's weights do not fit the device's free memory, as one line; None where they do."""
    device = choose_device(device)
    needed, free = weight_bytes(folder, dtype, dequantized=not torch.cuda.is_available()), free_memory(device)
    if needed <= WEIGHTS_SHARE * free:
        return None
    return f"{size(needed)} of weights do not fit the {size(free)} free on {device}: streaming them layer by layer"


def place_of_hidden(device: torch.device, needed: int) -> torch.device | None:
    """Where hidden states of so many bytes are kept: on the device up to a quarter of its free memory (a GPU's), in up
    to half of the free main memory, else None: on disk."""
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if needed <= _HIDDEN_SHARE.get(place.type, 0) * free_memory(place):
            return place
    return None


def size(count: float) -> str:
    """Bytes for people: 31.1 MB, 1.34 TB (powers of 1000, as disks are sold)."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    place = min(len(units) - 1, int(math.log10(max(count, 1)) // 3))
    return f"{count:.0f} bytes" if place == 0 else f"{count / 1000**place:.3g} {units[place]}"
