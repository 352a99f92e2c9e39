"""Per-channel statistics for other tools: importance matrices for llama.cpp.

Measured is the input of each expert's down_proj, h, per intermediate channel (profile --channels): sum of h^2 over the
expert's finite rows, before the routing weight. It covers only down_proj; inputs of gate_proj and up_proj are not
measured.
"""

import os
from pathlib import Path

import torch

from sedetect.errors import Argument, SedetectError
from sedetect.files import write_atomic
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId

# Kind of a bank -> name of its down projection in a GGUF file.
_GGUF = {"routed": "ffn_down_exps", "shared": "ffn_down_shexp", "dense": "ffn_down"}


def write_imatrix(stats: ModelStats, path: str | os.PathLike[str]) -> int:
    """Write an importance matrix in llama.cpp's GGUF format; return its number of entries.

    Per bank: blk.<layer>.ffn_down_exps.weight.in_sum2 (E, I) and .counts (E, 1), both float32, as llama-imatrix writes
    them: sums of squares, and rows they are over. Shared experts are ffn_down_shexp, dense MLPs ffn_down. Tensors that
    it does not name are quantized without importance, which the types of the fewest bits refuse; llama-imatrix
    --in-file merges it with a file of its own.
    Raises SedetectError for statistics without channels, several stacks, or several banks of one kind in a layer.
    """
    try:
        import gguf
    except ImportError:
        raise SedetectError(f"{path}: an imatrix needs the package gguf; pip install 'sedetect[export]'") from None
    banks = _with_channels(stats)
    odd = [bank for bank in banks if bank.stack != "decoder" or bank.kind not in _GGUF]
    if odd:
        raise SedetectError(
            f"{path}: {odd[0]} has no name in llama.cpp's layout; an imatrix of this model is not known"
        )

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        names = [source.info.get("domain", name) for name, source in stats.header.sources.items()]
        writer.add_array("imatrix.datasets", names or ["unknown"])  # its reader takes the first
        writer.add_uint32("imatrix.chunk_count", stats.header.sequences)
        writer.add_uint32("imatrix.chunk_size", stats.header.window or 512)  # its default, where windows differed
        for bank, (rows, squares) in banks.items():
            name = f"blk.{bank.layer}.{_GGUF[bank.kind]}.weight"
            writer.add_tensor(f"{name}.in_sum2", squares.float().numpy())
            writer.add_tensor(f"{name}.counts", rows.float()[:, None].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(path, write)
    return len(banks)


def _with_channels(stats: ModelStats) -> dict[BankId, tuple[torch.Tensor, torch.Tensor]]:
    """Counted rows (E,), and sums of h^2 (E, I), per bank."""
    banks = {
        bank: (state.rows, state.in_channel_sq)
        for bank, state in sorted(stats.banks.items())
        if state.in_channel_sq is not None
    }
    if not banks:
        raise SedetectError("the statistics hold no channels; profile again with ", Argument("channels", True))
    return banks
