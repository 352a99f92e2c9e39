"""Interleaved timing: every variant once per round, in rotating order, so that drift hits all alike.

On the CPU by the clock. On CUDA by events around each variant, which wait for nothing until the round ends; before each
variant 256 MB are written, which empties the L2 and lets the host run ahead of the device.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

FLUSH = 256 * 2**20  # bytes
SLOW = 0.02  # seconds: on CUDA, slower variants take part in every third round


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of each variant: median and quartiles over the rounds it took part in, after warming up all of them."""
    names = list(variants)
    order = [names[n % len(names) :] + names[: n % len(names)] for n in range(rounds)]
    if device != "cuda":
        for run in variants.values():
            run()
        seconds = {name: [] for name in names}
        for some in order:
            for name, taken in zip(some, _clock([variants[name] for name in some])):
                seconds[name].append(taken)
        return {name: _summary(values) for name, values in seconds.items()}

    flushed = torch.empty(FLUSH, dtype=torch.int8, device=device)
    for run in variants.values():
        run()  # compiles
    slow = {name for name, taken in zip(names, _events(list(variants.values()), flushed)) if taken > SLOW}
    seconds = {name: [] for name in names}
    for number, some in enumerate(order):
        some = [name for name in some if number % 3 == 0 or name not in slow]
        for name, taken in zip(some, _events([variants[name] for name in some], flushed)):
            seconds[name].append(taken)
    return {name: _summary(values) for name, values in seconds.items()}


def _clock(runs: list[Callable[[], object]]) -> list[float]:
    times = [time.perf_counter()]
    for run in runs:
        run()
        times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def _events(runs: list[Callable[[], object]], flushed: torch.Tensor) -> list[float]:
    events = []
    for run in runs:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {"median": median, "low": low, "high": high, "rounds": len(values)}


def machine(device: str) -> dict[str, str | int]:
    """The machine and versions of a measurement."""
    import platform

    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor()
