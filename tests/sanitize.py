"""One small case of every kernel of a GPU backend, for compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py triton
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/sanitize.py triton initcheck
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py triton

The same with cuda in the place of triton. Prints a line for each case, after comparing it with the torch backend's
result on the CPU. With initcheck, rows of no expert are left out where a gate that is not fused would compute on what
they hold, which nobody reads. Without a GPU the Triton kernels run interpreted, to see that the script works.
"""

import sys

import torch
from support.interpreter import INTERPRETED  # before triton
from support.kernels import assert_close, make_call, make_rows, moe_mlp, swiglu
from support.quantized import fp4, fp8

from sedetect import ops
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.ops.choose import BACKENDS
from sedetect.stats.bank import BankStats

INITCHECK = "initcheck" in sys.argv[2:]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda", 0)
SHAPES = [
    (5, 2, 4, 64, 32),  # tiles of 16 rows, most of them tails; a plan of one block
    (40, 2, 2, 72, 40),  # tiles of 64 rows; row tails in the last column tile
    (300, 2, 3, 264, 136),  # tiles of 128 rows; a plan of several blocks
    (140, 1, 1, 64, 4096),  # so many columns that cuda sorts the rows before gate_up
]
# Few slots; few rows of an expert; many.
QUANTIZED_SHAPES = [(5, 2, 4, 64, 32), (40, 2, 4, 64, 32), (300, 2, 3, 288, 160)]


def run(backend: str, dtype: torch.dtype, shape: tuple[int, ...], fused: bool) -> None:
    call = make_call(shape, dtype, 1, sentinels=fused or not INITCHECK)
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    how = {} if fused else {"gate": swiglu}
    tokens, _, experts, _, intermediate = shape
    rows, served = make_rows(tokens, 1), []
    state, reference = BankStats.empty(experts, DEVICE), BankStats.empty(experts)
    note = lambda name, why: served.append(name)  # noqa: E731
    for _ in range(2):  # the second finds records to merge with
        out = moe_mlp(moved | how, state=state, rows=rows.to(DEVICE), backend=backend, served=note)
        expected = moe_mlp(call | how, state=reference, rows=rows, backend="torch")
    assert served == [backend, backend]
    assert_close(f"{backend} {dtype} {shape} {fused=}", out.cpu(), expected.double(), dtype)
    assert torch.equal(state.counts.cpu(), reference.counts)
    x = torch.randn(tokens, intermediate).to(dtype)
    single = BankStats.empty(1, DEVICE)
    y = ops.linear_stats(x.to(DEVICE), moved["down"][0], None, single, rows=rows.to(DEVICE), backend=backend)
    ops.output_stats(y, x.to(DEVICE), single, rows=rows.to(DEVICE), backend=backend)
    assert int(single.rows.cpu()) == 2 * int(rows.counted.sum())
    print(f"{backend} {dtype} {shape} {'fused' if fused else 'general'}: ok", flush=True)


def run_quantized(backend: str, shape: tuple[int, ...], packed: bool) -> None:
    call = make_call(shape, torch.bfloat16, 2, sentinels=True)
    state, weights = BankStats.empty(shape[2], DEVICE), {}
    for name in ("gate_up", "down"):
        stored, scale = (fp4 if packed else fp8)(call[name].float())
        weights[name] = (stored, scale, None if packed else (128, 128), torch.bfloat16)
    on_host = {name: QuantizedWeights(*weight) for name, weight in weights.items()}
    on_device = {
        name: QuantizedWeights(stored.to(DEVICE), scale.to(DEVICE), *rest)
        for name, (stored, scale, *rest) in weights.items()
    }
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    served = []
    out = moe_mlp(moved | on_device, state=state, backend=backend, served=lambda name, why: served.append(name))
    expected = moe_mlp(call | on_host, state=BankStats.empty(shape[2]), backend="torch")
    assert served == [backend]
    what = f"{backend} {'mxfp4' if packed else 'fp8'} {shape}"
    assert_close(what, out.cpu(), expected.double(), torch.bfloat16)
    print(f"{what}: ok", flush=True)


def main() -> None:
    backend = sys.argv[1] if len(sys.argv) > 1 else "triton"
    for dtype in (torch.float32, torch.bfloat16):
        if BACKENDS[backend].refusal(DEVICE, dtype) is None:
            for shape in SHAPES:
                for fused in (True, False):
                    run(backend, dtype, shape, fused)
    for shape in QUANTIZED_SHAPES:
        for packed in (False, True):
            run_quantized(backend, shape, packed)


if __name__ == "__main__":
    main()
