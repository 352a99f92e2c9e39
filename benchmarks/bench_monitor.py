"""Measure the cost of a state of ExpertMonitor in a training run.

    python benchmarks/bench_monitor.py --text EN MATH ZH --code 40        and whatever else the example takes

Trains as examples/train_tiny_moe.py does (500 steps of 32 sequences), with a state every 20 steps, and waits for the
device before each step: a step with a state minus the steps around it is what the state costs, its own time and what
the training loses by it. The first state, which begins the series, and the steps that compile are left out.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch

from sedetect.training import ExpertMonitor

EVERY, AROUND = 20, 5
EXAMPLE = Path(__file__).parents[1] / "examples/train_tiny_moe.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_moe", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Timed(ExpertMonitor):
    """Records the start of each step, after the device has finished the previous work."""

    begun: ClassVar[list[float]] = []

    def step(self, model: Any, step: int) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begun.append(time.perf_counter())
        return super().step(model, step)


def main() -> None:
    example: Any = load_example()
    example.ExpertMonitor = Timed
    with tempfile.TemporaryDirectory() as folder:
        defaults = ["--steps", "500", "--sequences", "32"]
        sys.argv = [str(EXAMPLE), folder, *defaults, *sys.argv[1:], "--every", str(EVERY)]
        example.main()
    seconds = [after - before for before, after in zip(Timed.begun, Timed.begun[1:])]
    warm = max(EVERY, len(seconds) // 8)
    due = range(-(-warm // EVERY) * EVERY, len(seconds) - AROUND, EVERY)
    costs = []
    for step in due:
        around = [seconds[step + near] for near in range(-AROUND, AROUND + 1) if near]
        costs.append(seconds[step] - statistics.median(around))
    plain = statistics.median(seconds[step] for step in range(warm, len(seconds)) if step % EVERY)
    cost = statistics.median(costs)
    print(f"a step        {plain * 1e3:6.1f} ms")
    spread = f"{min(costs) * 1e3:.1f} to {max(costs) * 1e3:.1f}, {len(costs)} states"
    print(f"a state       {cost * 1e3:6.1f} ms   ({spread})")
    print(f"every 100     {cost / (100 * plain):6.2%} of the training's time")


if __name__ == "__main__":
    main()
