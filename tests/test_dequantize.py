"""Quantized weights: their definition value by value, and the Triton kernels that dequantize them tile by tile."""

import pytest
import torch
import triton
import triton.language as tl
from support.interpreter import DEVICE, INTERPRETED
from support.kernels import (
    SHAPES,
    TOLERANCES,
    assert_close,
    assert_parts_of,
    loop_over_slots,
    make_call,
    make_rows,
    moe_mlp,
    swiglu,
    weights_of,
)
from support.quantized import E2M1, E8M0, FP8, fp4, fp8

from sedetect.kernels.dequantize import QuantizedWeights, decode_e8m0, dequantize
from sedetect.kernels.gate import Gate
from sedetect.kernels.gate_up import gate_up
from sedetect.kernels.plan import plan
from sedetect.ops.triton import TritonBackend
from sedetect.stats.bank import BankStats

GPT_OSS = Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0)

# T, k, E, H, I; packed values take an even H and I.
if INTERPRETED:
    SHAPES = [
        (1, 1, 1, 8, 8),  # so few elements that the rounding of each shows
        (7, 2, 3, 36, 18),  # dimensions that divide nothing: no copy engine
        (36, 4, 4, 160, 96),  # tiles of 64 rows, a tail in every dimension
        (200, 1, 1, 192, 128),  # tiles of 128 rows
    ]
else:
    SHAPES = [*(s for s in SHAPES if s[3] % 2 == s[4] % 2 == 0), (515, 8, 16, 520, 264), (600, 8, 16, 512, 256)]


def per_half(weight):
    """One scale for each half of the rows, as gate and up of one number each are stored together."""
    stored, scale = zip(*(fp8(half, half.shape[1:]) for half in weight.chunk(2, dim=1)))
    return torch.cat(stored, 1), torch.cat(scale, 1)


# name -> (what stores weights so, the block its checkpoint names)
FORMATS = {
    "fp8": (fp8, (128, 128)),
    "fp8-ue8m0": (lambda w: fp8(w, scales=E8M0), (128, 128)),
    "fp8-odd-blocks": (lambda w: fp8(w, (48, 24)), (48, 24)),
    "fp8-halves": (per_half, None),
    "mxfp4": (fp4, None),
    "fp4-float-scales": (lambda w: fp4(w, torch.float32), (128, 128)),
}


def quantized(name, weight, dtype):
    """Weights in this format, and what they stand for in float64."""
    store, block = FORMATS[name]
    stored, scale = store(weight.float())
    weights = QuantizedWeights(stored.to(DEVICE), scale.to(DEVICE), block, dtype)
    return weights, torch.stack([weights[e] for e in range(len(weights))]).cpu()


def test_packed_fp4_value_by_value():
    packed = torch.randint(-128, 128, (6, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    result = dequantize(packed, scale, (128, 128), torch.float32)
    for row in range(6):
        for column in range(96):
            byte = int(packed[row, column // 2]) % 256
            value = E2M1[byte // 16 if column % 2 else byte % 16]
            assert float(result[row, column]) == pytest.approx(value * float(scale[row, column // 32]), rel=1e-6)


def test_blocks_value_by_value():
    """Also of blocks that the dimensions cut short, and of as many scales as no block makes."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, given, scales in (
        (200, 150, (128, 128), (2, 2)), (24, 16, (128, 128), (2, 1)), (6, 5, None, (1, 1)), (10, 9, (4, 3), (3, 3)),
    ):  # fmt: skip
        weight = torch.randn(rows, columns, generator=generator).to(FP8)
        scale = torch.rand(scales, generator=generator) + 0.5
        result = dequantize(weight, scale, given, torch.float32)
        high, wide = given if given and scales[0] == -(-rows // given[0]) else (rows // scales[0], columns // scales[1])
        for row in range(0, rows, 3):
            for column in range(0, columns, 5):
                expected = float(weight[row, column].float()) * float(scale[row // high, column // wide])
                assert float(result[row, column]) == pytest.approx(expected, rel=1e-6), (given, row, column)
    result = dequantize(torch.ones(1, 4, dtype=FP8), torch.tensor([[0, 127, 130, 255]]).byte(), None, torch.float64)
    assert result[0, :3].tolist() == [2.0**-127, 1.0, 8.0] and result[0, 3].isnan()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_tiles_are_dequantized_to_the_bits_of_the_definition(name, dtype):
    """Token t is the t-th unit vector, so that z is the weight itself. Expert 1 has every 8-bit value, and a NaN."""
    size, generator = 144, torch.Generator().manual_seed(3)
    weights, _ = quantized(name, torch.randn(2, size, size, generator=generator) * 10, dtype)
    values = torch.randint(256, weights.stored[1].shape, generator=generator).byte()
    if not weights.packed:
        values[values & 127 == 127] = 0
        values[7, 9] = 255
    weights.stored.view(torch.uint8)[1] = values.to(DEVICE)
    if weights.scale.dtype == torch.uint8:
        low, high = (115, 130) if dtype == torch.float16 else (30, 240)  # finite products
        weights.scale[1] = torch.randint(low, high, weights.scale[1].shape, generator=generator).to(weights.scale)
    for expert in range(2):
        index = torch.full((size, 1), expert, device=DEVICE)
        z, _ = gate_up(torch.eye(size, dtype=dtype, device=DEVICE), plan(index, 2), weights)
        finite = weights[expert].isfinite().all(1)
        assert finite.sum() == size - (expert == 1 and not weights.packed)
        assert torch.equal(z.T[finite], weights[expert][finite])
        assert z.T[~finite].isnan().all()  # NaN times zero is NaN


@triton.jit
def _decode(Bytes, Out):
    at = tl.arange(0, 256)
    tl.store(Out + at, decode_e8m0(tl.load(Bytes + at)))


def test_exponents():
    bits = torch.arange(256, device=DEVICE).byte()
    out = torch.empty(256, device=DEVICE)
    _decode[(1,)](bits, out)
    assert torch.equal(out.view(torch.int32)[:255], bits.view(E8M0).float().view(torch.int32)[:255])
    assert out[255].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "name, shape",
    # Interpreted, a large shape takes half a minute: those of the two formats that models ship in.
    [
        (name, shape)
        for name in FORMATS
        for shape in SHAPES
        if not INTERPRETED or name in ("fp8", "mxfp4") or shape[0] < 9
    ],
    ids=str,
)
def test_experts(name, shape, dtype):
    """Fused and general, biased and not, with the dequantized weights; statistics of what is stored.

    Against float64, the general path with z and the module's own gate in the model's dtype, as the module has them:
    gpt_oss rounds five times, by which alone an output of few elements can be off by more than the tolerance.
    """
    gate = GPT_OSS if name == "mxfp4" else Gate()
    call = make_call(shape, dtype, sum(shape), bias=name == "mxfp4", sentinels=True)
    reference, backend = dict(call), TritonBackend()
    for one in ("gate_up", "down"):
        kind = "fp8" if one == "down" and name == "fp8-halves" else name
        call[one], reference[one] = quantized(kind, call[one], dtype)
    own = swiglu if gate == Gate() else gpt_oss
    references = {gate: own, own: lambda z: own(z.to(dtype)).double()}
    expected = {wanted: loop_over_slots(reference, exact) for wanted, exact in references.items()}
    call = {n: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for n, value in call.items()}
    rows = make_rows(shape[0], 1).to(DEVICE)
    for wanted in expected:
        state = BankStats.empty(shape[2], DEVICE)
        out = moe_mlp(call | {"gate": wanted}, state=state, rows=rows, backend="triton")
        assert_close(f"{name} {shape=} {dtype=} {wanted}", out.cpu(), expected[wanted], dtype)
    routing = plan(call["top_k_index"], shape[2])
    h, _ = gate_up(call["x"], routing, call["gate_up"], call["gate_up_bias"], gate=gate)
    y, stats = backend.down(h, routing, weights_of(call))
    routed = int(routing.offsets[-1])
    assert_parts_of(stats, y, h, routed)


def gpt_oss(z):
    g, u = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return g * torch.sigmoid(1.702 * g) * (u + 1)
