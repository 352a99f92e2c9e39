"""Calibrate the intervals of a proof: the rates of false positives and of detecting the smallest effect.

    python benchmarks/calibrate_proof.py FOLDER L1E28 --text a.txt b.txt --windows 20 --device cuda

Measures, in plain transformers (truth.py), what each window loses without each other expert that its first token visits
(the controls), and without the expert given. Each of --draws draws takes one control, --documents of its windows, and a
random sign for each: there is no effect in that, and it is called one where the interval at --level excludes 0. Power:
the windows of the expert given, whose spread is that of a real effect, with their mean moved to the smallest effect
that matters; found where the interval lies above 0. Prints JSON.
"""

import json
import math

import numpy as np
from truth import Switch, measure, opened, parser_of

from sedetect.experiments.effects import effect
from sedetect.experiments.proof import SMALLEST


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--level", type=float, default=0.05)
    args = parser.parse_args()
    (expert,) = args.experts
    model, windows = opened(args)
    switch = Switch(model)
    base, *_ = measure(model, switch, windows, set())
    visited = {(at, e) for at, experts in switch.visited.items() for e in experts} - {expert}
    controls = [(measure(model, switch, windows, {one})[0] - base).numpy() for one in sorted(visited)]
    moved = (measure(model, switch, windows, {expert})[0] - base).numpy()

    generator = np.random.default_rng(0)

    def drawn(differences: np.ndarray, documents: int) -> np.ndarray:
        return differences[generator.permutation(len(differences))[:documents]]

    rows = []
    for documents in args.documents:
        if documents > len(windows):
            continue
        called = found = 0
        for _ in range(args.draws):
            without = drawn(controls[generator.integers(len(controls))], documents)
            null = effect(without * generator.choice((-1.0, 1.0), documents), args.level)
            called += null.low > 0 or null.high < 0
            signs = generator.choice((-1.0, 1.0), documents)
            shifted = drawn(moved - moved.mean(), documents) * signs + math.log1p(SMALLEST)
            found += effect(shifted, args.level).low > 0
        rows.append({"documents": documents, "called": called / args.draws, "power": found / args.draws})
    known = {"model": args.folder.name, "controls": len(controls), "windows": len(windows), "smallest": SMALLEST}
    print(json.dumps(known | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
