"""Compile every Triton kernel for GPUs that need not be here.

    python tests/compile_triton.py 80 90 100 [--all] [--resources]

Runs the launchers on CPU tensors of real shapes and compiles what they would have launched. Prints one line per
kernel: target, name and bytes of shared memory; with --resources also registers and bytes of stack (spills). --all adds
the middle classes of tiles, float16, float32 and every gate.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sedetect.kernels import grouped, launch, tiles
from sedetect.kernels.combine import combine
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.down import down
from sedetect.kernels.gate import Gate
from sedetect.kernels.gate_up import gate_up
from sedetect.kernels.plan import Plan, plan, scheduled
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.rows import Rows
from sedetect.kernels.sort_rows import sort_rows
from sedetect.kernels.update import update
from sedetect.stats.bank import BankStats

SHARED = {80: 163, 90: 227, 100: 227}  # KiB of shared memory a program may use
GATES = [Gate(), Gate("gelu"), Gate("gelu_tanh"), Gate("relu2", gated=False),
         Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0)]  # fmt: skip


class Compiler:
    """Stands in for JITFunction.run: compiles a launch for the target, once for each set of types and constants."""

    def __init__(self, capability: int, disassemble: bool):
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.disassemble = disassemble
        self.seen = set()
        self.report = []

    def __call__(self, kernel, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attrs = kernel._pack_args(self.backend, kwargs, bound, specialization, options)
        key = (kernel.fn.__name__, str(specialization), str(options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=self.target, options=options.__dict__)
        shared, limit = compiled.metadata.shared, SHARED[self.target.arch] * 1024
        assert shared <= limit, f"{key}: {shared} bytes of shared memory, {limit} there"
        self.report.append((kernel.fn.__name__, shared, *(self.resources(compiled) if self.disassemble else ())))

    def resources(self, compiled) -> tuple[int, int]:
        """(registers, bytes of stack) that the assembler gave a program."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def launch_everything(dtype: torch.dtype, tokens: int, gates: list[Gate]) -> None:
    """Every launcher on a layer of Qwen3-30B-A3B's proportions, with few experts; the tensors hold nothing."""
    k, experts, hidden, intermediate = 8, 16, 2048, 768

    def empty(*size):
        return torch.empty(*size, dtype=dtype)

    routing = plan(torch.zeros(tokens, k, dtype=torch.int64), experts)
    scheduled(Plan(routing.order, routing.offsets, k))
    x, weights = empty(tokens, hidden), empty(tokens, k)
    for gate in gates:
        columns = 2 * intermediate if gate.gated else intermediate
        h, parts = gate_up(x, routing, empty(experts, columns, hidden), None, False, gate, parts=True)
    gate_up(x, routing, empty(experts, hidden, 2 * intermediate), empty(experts, 2 * intermediate), True, gates[0])
    gate_up(x, routing, empty(experts, 2 * intermediate, hidden))
    sort_rows(x, routing)
    y = down(h, routing, empty(experts, hidden, intermediate))
    down(h, routing, empty(experts, intermediate, hidden), empty(experts, hidden), True)
    combine(y, routing, weights, dtype)
    combine(y, routing, weights, dtype, h, parts)
    stats = row_parts(y, h, routing.offsets)
    update(BankStats.empty(experts), stats, routing, weights, Rows.unmapped(tokens, "cpu"))


def launch_quantized(dtype: torch.dtype, tokens: int, fp8: bool, hidden: int = 2048, intermediate: int = 768) -> None:
    """The GEMMs of the same layer with quantized weights: FP8 in blocks of 128 x 128 (from sm_89 on), and MXFP4."""
    k, experts = 8, 16
    routing = plan(torch.zeros(tokens, k, dtype=torch.int64), experts)
    x, sizes = torch.empty(tokens, hidden, dtype=dtype), ((2 * intermediate, hidden), (hidden, intermediate))
    if fp8:
        scales = [torch.empty(experts, rows // 128, columns // 128) for rows, columns in sizes]
        stored = [torch.empty(experts, *size, dtype=torch.float8_e4m3fn) for size in sizes]
        up, low = (QuantizedWeights(*pair, (128, 128), dtype) for pair in zip(stored, scales))
        h, _ = gate_up(x, routing, up, gate=GATES[0], parts=True)
        down(h, routing, low)
        gate_up(x, routing, up)
        gate_up(x, routing, up, gate=GATES[-1], parts=True)
    scales = [torch.empty(experts, rows, -(-columns // 32), dtype=torch.uint8) for rows, columns in sizes]
    stored = [torch.empty(experts, rows, columns // 2, dtype=torch.uint8) for rows, columns in sizes]
    up, low = (QuantizedWeights(*pair, (1, 32), dtype) for pair in zip(stored, scales))
    gate_up(x, routing, up, gate=GATES[0])
    h, _ = gate_up(x, routing, up, torch.empty(experts, 2 * intermediate), gate=GATES[-1], parts=True)
    down(h, routing, low, torch.empty(experts, hidden))


def compile_for(capability: int, everything: bool, disassemble: bool) -> None:
    compiler = Compiler(capability, disassemble)
    launch._is_watched = lambda kernel: True  # every launch is one of Triton's
    JITFunction.run = lambda kernel, *args, **kwargs: compiler(kernel, *args, **kwargs)
    device = tiles.Device(132, SHARED[capability] * 1024, capability // 10)
    tiles.limits = grouped.limits = lambda _: device
    tiles.choose.cache_clear()
    # Tokens that fall into a class of tiles each.
    launch_everything(torch.bfloat16, 1024, [GATES[0], GATES[-1]])
    launch_everything(torch.bfloat16, 8, GATES[:1])
    for tokens in (1024, 8):
        launch_quantized(torch.bfloat16, tokens, capability >= 89)
    launch_quantized(torch.bfloat16, 1024, False, 520, 264)  # rows that no copy engine reads
    if everything:
        for tokens in (32, 128):
            launch_everything(torch.bfloat16, tokens, GATES[:1])
            launch_quantized(torch.bfloat16, tokens, capability >= 89)
        launch_everything(torch.bfloat16, 1024, GATES)
        launch_everything(torch.float16, 1024, GATES[:1])
        launch_everything(torch.float32, 128, GATES[:1])
        launch_quantized(torch.float32, 128, capability >= 89)
    for line in compiler.report:
        print(f"sm_{capability}", *line, flush=True)


def main() -> None:
    for argument in sys.argv[1:]:
        if argument.isdigit():
            compile_for(int(argument), "--all" in sys.argv, "--resources" in sys.argv)


if __name__ == "__main__":
    main()
