"""Launch: Triton kernels without the work that kernel[grid](...) repeats at every launch.

It binds the arguments, finds what each is specialized for and looks the compiled kernel up by a string of all of it,
which takes several times as long as the launch. Here the compiled kernel is remembered under the same facts, as values.
Whatever is unusual, and the first launch of each kind, goes the ordinary way.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# The releases where it was read what a launch is specialized for, and how a compiled kernel is run; for CUDA.
_KNOWN = triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.hip is None

_compiled: dict[Hashable, CompiledKernel] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: dict[str, Any], **options: int
) -> None:
    """kernel[grid](*arguments, **constants, **options).

    Args:
        arguments: those of the kernel's parameters that are not constants, in its order. constants: all others.
        options: num_warps, num_stages, maxnreg.
    """
    kinds = None if _is_watched(kernel) else _kinds(arguments)
    if kinds is None:
        kernel[grid](*arguments, **constants, **options)
        return
    device = torch.cuda.current_device()  # a compiled kernel belongs to one
    key = (kernel.fn, device, kinds, *constants, *constants.values(), *options, *options.values())
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **constants, **options)
        if isinstance(compiled, CompiledKernel):
            _compiled[key] = compiled
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    # None: no metadata and hooks. Constants are in the compiled kernel, so that only their number counts.
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants.values()
    )


def _is_watched(kernel: Any) -> bool:
    """Whether only Triton can launch the kernel as it should be: interpreted, under a profiler or a debugger."""
    if not _KNOWN or not isinstance(kernel, triton.JITFunction):
        return True
    knobs = triton.knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(hooks or knobs.runtime.debug or knobs.compilation.instrumentation_mode)


def _kinds(arguments: Sequence[Any]) -> tuple[Hashable, ...] | None:
    """What Triton specializes for in each argument; None where one is unusual, such as an address off 16 bytes."""
    kinds: list[Hashable] = []
    addresses = 0
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            kinds.append(argument.dtype)
            addresses |= argument.data_ptr()
        elif type(argument) is int and -(2**31) <= argument < 2**31:
            kinds.append(1 if argument == 1 else 16 if argument % 16 == 0 else 0)
        elif argument is None:
            kinds.append(None)
        elif isinstance(argument, TensorDescriptor):
            kinds.append((argument.base.dtype, *argument.block_shape))
        else:
            return None
    return tuple(kinds) if addresses % 16 == 0 else None
