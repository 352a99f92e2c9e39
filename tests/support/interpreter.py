"""Run Triton kernels on the CPU: imported before triton where there is no GPU, and repairs what its interpreter lacks.

triton 3.6's interpreter multiplies bfloat16 as integers, truncates where the hardware rounds to nearest, reads the NaN
of FP8 as a number, turns one-element arrays into integers in a way that numpy 2.4 refuses, and reduces by a function
element by element.
"""

import functools
import os

import numpy as np
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")  # where the Triton kernels run


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def _repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, cast_float, dot, patch_tensor = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.create_dot,
        interpreter._patch_lang_tensor,
    )

    def repaired_cast(self, source, target):
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(data.view(np.uint16), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_bfloat16(source.data).float().numpy(), tl.float32)
        return cast(self, source, target)

    def repaired_cast_float(self, source, target, rounding):
        if (source.dtype.scalar, target.scalar) == (tl.float8e4nv, tl.float32):
            bits = torch.from_numpy(np.ascontiguousarray(source.data))
            return TensorHandle(bits.view(torch.float8_e4m3fn).float().numpy(), tl.float32)
        return cast_float(self, source, target, rounding)

    def repaired_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (repaired_cast(self, operand, tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    def repaired_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def repaired_reduce(self, input):
        """By slices across the axis, where the reduction is by a function of one tensor."""
        slices = [self.to_tensor(data, input[0].dtype) for data in np.moveaxis(input[0].handle.data, self.axis, 0)]
        return [functools.reduce(self.combine_fn.fn, slices)]

    InterpreterBuilder.cast_impl = repaired_cast
    InterpreterBuilder.create_fp_to_fp = repaired_cast_float
    InterpreterBuilder.create_dot = repaired_dot
    interpreter._patch_lang_tensor = repaired_tensor
    interpreter.ReduceOps.generic_reduce = repaired_reduce


if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    _repair()
