"""Profiles of compiled models: the call of a bank as one torch.library op, which torch.compile keeps whole.

An op takes tensors and numbers, so a measurement goes by its number among those that are attached. Its state and the
row context are arguments, so that a captured graph reads those of its own call; what the bank's module holds is not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch

from sedetect.kernels.rows import Rows

_OF_ROWS = len(Rows.unmapped(0, "cpu").tensors())
_attached: dict[int, Any] = {}  # of all profiles under way: an op of torch belongs to the process, as its numbers do


@contextmanager
def attached(measured: Sequence[Any]) -> Iterator[None]:
    """Give the lowest free numbers, so that graphs of an earlier profile of the same model serve the next one."""
    for one in measured:
        one.number = next(n for n in count() if n not in _attached)
        _attached[one.number] = one
    try:
        yield
    finally:
        for one in measured:
            del _attached[one.number]


@torch.library.custom_op("sedetect::measure", mutates_args=("state",))
def _measure(
    inputs: list[torch.Tensor], state: list[torch.Tensor], rows: list[torch.Tensor], source: int, number: int
) -> torch.Tensor:
    one, states = _attached[number], iter(state)
    seen = [own.replaced(list(islice(states, len(own.kept())))) for own in one.states]
    groups = [Rows(*rows[at : at + _OF_ROWS], source=source) for at in range(0, len(rows), _OF_ROWS)]
    return one.compute(list(zip(seen, groups)), *inputs)


@_measure.register_fake
def _(inputs, state, rows, source, number):
    one, x = _attached[number], inputs[0]
    return x.new_empty((*x.shape[:-1], one.bank.hidden), dtype=one.output_dtype(x.dtype))


def measure(measurement: Any, rows: Rows, *inputs: torch.Tensor) -> torch.Tensor:
    """measurement.compute of its states and the rows of each, in a graph that is being compiled."""
    state = [tensor for own in measurement.states for tensor in own.kept()]
    tensors = [tensor for one in (rows, *rows.parts) for tensor in one.tensors()]
    return _measure(list(inputs), state, tensors, rows.source, measurement.number)
