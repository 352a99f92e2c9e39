"""Conformance: does a profile of this architecture tell the truth? The checks of support/conformance.py, by hand.

    python tests/conformance.py [--device cuda] [--backend triton] [--dtype bfloat16] [--jobs 16] [FAMILY ...]

prints a line per family: its banks, the backends that served them, and the result. In float32 the experts' inputs are
those of the eager model; in bfloat16, where routing may turn on a rounding, those that they have while profiled.

    python tests/conformance.py --new

lists the classes of the installed transformers that look like experts and are in no family's model here.

    python tests/conformance.py --docs docs/models.md

writes the table of that page from the run, where every family passes.
"""

import argparse
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import transformers
from support.conformance import RTOL, attempt, available, documented
from support.families import FAMILIES, discover, named_like_experts, tiny_model
from support.processors import processor_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all that this transformers has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="one that must serve every bank; by default the fastest")
    parser.add_argument("--dtype", default="float32", choices=[str(t).removeprefix("torch.") for t in RTOL])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--docs", type=Path, help="a page whose table is written from the run")
    parser.add_argument("--new", action="store_true", help="list classes that no family here covers")
    options = parser.parse_args()
    if options.new:
        print("\n".join(uncovered()) or "every class is covered")
        return 0
    names = options.families or available()
    line = partial(attempt, device=options.device, backend=options.backend, dtype=options.dtype)
    print(f"transformers {transformers.__version__}, {options.device}, {options.dtype}")
    failures, lines = 0, []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), initializer=quietly) as pool:
        for result in pool.map(line, names):
            failures += not result.result.startswith("ok")
            lines.append(result)
            print(result, flush=True)
    print(f"{failures} of {len(names)} failed" if failures else f"all {len(names)} pass")
    if options.docs is not None and not failures and len(names) == len(FAMILIES):
        options.docs.write_text(documented(options.docs.read_text(), lines, processor_of))
    return bool(failures)


def quietly() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def uncovered() -> list[str]:
    """Classes named like experts, in models that no family here builds or behind the interface in no built model."""
    lines = []
    for name, classes in sorted((named_like_experts() | discover()).items()):
        built = [family for key, family in FAMILIES.items() if key.partition(":")[0] == name]
        inside = {type(m).__name__ for family in built for m in tiny_model(name, family).modules()}
        lines += [f"{name}: {one}" for one in classes if one not in inside]
    return lines


if __name__ == "__main__":
    sys.exit(main())
