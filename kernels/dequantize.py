"""Dequantize: weights stored in 8 or 4 bits with a scale per block, in the model's dtype where they are multiplied.

Weight-only: values are dequantized to the model's dtype, an expert's matrix at a time in torch, a tile at a time in the
GEMMs' main loop, and the activations stay as they are. Engines that quantize activations as well (transformers' own FP8
kernels among them) give slightly other numbers.
"""

import torch
import triton
import triton.language as tl

# The values of e2m1, the 4-bit float: its sign bit is 8 (Open Compute Project, Microscaling Formats 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """weight * scale, multiplied in float32 and rounded once.

    Args:
        weight: (..., M, K) of an 8-bit float; or (M, K / 2) int8 or uint8, two e2m1 values to a byte, the lower half
            first.
        scale: (rows, columns), one per block of the weight; or one number. Bytes are exponents (e8m0).
        block: rows and columns that share a scale; where there are not as many scales as that makes, or block is None,
            the weight is divided among them evenly.
    Returns:
        (M, K) in dtype.
    """
    if weight.dtype in (torch.int8, torch.uint8):
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=weight.device)
        pairs = weight.view(torch.uint8).int()
        weight = values[torch.stack((pairs & 15, pairs >> 4), dim=-1)].flatten(-2)
    scale = _scales(scale.reshape(1, 1) if scale.numel() == 1 else scale)
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).float()
    rows, columns = weight.shape[-2:]
    high, wide = block_of(weight.shape, scale.shape, block)
    scale = scale.repeat_interleave(wide, -1)[..., :columns]
    if rows % high:
        scale, high = scale.repeat_interleave(high, -2)[..., :rows, :], 1
    values = weight.float().unflatten(-2, (-1, high)).mul_(scale.unsqueeze(-2))  # float() made them
    return values.flatten(-3, -2).to(dtype)


def block_of(shape: torch.Size, scales: torch.Size, given: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a (..., M, K) weight that share one of its (..., rows, columns) scales."""
    high, wide = (
        wanted if wanted and -(-size // wanted) == count else -(-size // count)
        for size, count, wanted in zip(shape[-2:], scales[-2:], given or (0, 0))
    )
    return high, wide


def _scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32, or as the bytes of their exponents."""
    if scale.dtype == torch.float8_e8m0fnu:
        return scale.view(torch.uint8)
    return scale if scale.dtype == torch.uint8 else scale.float()


class QuantizedWeights:
    """Stands for the (E, M, K) matrices of stacked experts: [e] dequantizes the matrix of one.

    storage  dtype of stored
    stored   (E, M, K) float8_e4m3fn, or (E, M, K / 2) uint8: two e2m1 values to a byte
    scale    (E, rows, columns) float32, or uint8: exponents of 2, 127 for 1 (e8m0)
    block    rows and columns of a matrix that share a scale
    dtype    of what [e] returns, and of the products
    """

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype):
        self.stored = stored.view(torch.uint8) if stored.dtype == torch.int8 else stored
        self.scale, self.storage, self.dtype = _scales(scale), self.stored.dtype, dtype
        experts, rows, columns = stored.shape
        self.shape = torch.Size((experts, rows, columns * (2 if self.packed else 1)))
        self.block = block_of(self.shape, self.scale.shape, block)
        self.device, self.is_meta = stored.device, stored.is_meta

    @property
    def packed(self) -> bool:
        return self.storage == torch.uint8

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> torch.Tensor:
        return dequantize(self.stored[expert], self.scale[expert], self.block, self.dtype)

    def new_zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


@triton.jit
def dequantize_tile(
    w,  # (BLOCK_N, BLOCK_K) as stored; (BLOCK_N, BLOCK_K / 2) bytes when PACKED
    Scale,  # (SCALE_ROWS, SCALE_COLUMNS) of the tile's expert
    column,  # (BLOCK_N,) rows of the weight
    start,  # its first column here
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The tile in float32. SHARED columns, which divide BLOCK_K, have one scale."""
    if PACKED:
        w = _decode_e2m1(tl.join(w & 15, w >> 4).reshape(BLOCK_N, BLOCK_K))
    else:
        w = w.to(tl.float32)
    group = (start + tl.arange(0, BLOCK_K // SHARED) * SHARED) // WIDE
    # Past the last column the weight is zero, under any scale.
    group = tl.minimum(group, SCALE_COLUMNS - 1)
    scale = tl.load(Scale + (column // HIGH * SCALE_COLUMNS)[:, None] + group[None, :])
    if Scale.dtype.element_ty == tl.uint8:
        scale = decode_e8m0(scale)
    if SHARED == BLOCK_K:
        return w * scale
    return (w.reshape(BLOCK_N, BLOCK_K // SHARED, SHARED) * scale[:, :, None]).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _decode_e2m1(bits):
    """Values of 4-bit floats: their bits in float32's places are 2**-126 of them, 0.5 among the subnormals."""
    bits = bits.to(tl.int32)
    return (((bits & 7) << 22) | ((bits & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def decode_e8m0(bits):
    """2**(bits - 127); all ones are NaN."""
    bits = bits.to(tl.int32)
    shifted = tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return shifted.to(tl.float32, bitcast=True)
