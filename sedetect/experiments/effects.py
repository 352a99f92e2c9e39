"""Confidence intervals of a change of the loss, from differences per document by a sign-flip test.

A document is one window of text, measured twice: with the model as it is, and with an intervention. Its difference is
that of its mean losses in nats per token, so exp(mean difference) - 1 is the relative change of perplexity over all
documents.
"""

import math
from functools import lru_cache

import numpy as np

from sedetect.stats.proof import Effect

_FLIPS = 10_000
_STEPS = 40  # bisections: far below what 10,000 draws resolve


def effect(differences: np.ndarray, level: float) -> Effect:
    """The effect behind differences (n,), in nats per token, with an interval at 1 - level.

    The interval holds every shift that the sign-flip test at that level does not reject: if the differences are
    symmetric about their mean, it covers that mean with probability 1 - level, whatever their distribution. With fewer
    than log2(2 / level) documents the test cannot reject any shift, and the interval is infinite.
    """
    n, mean = len(differences), float(differences.mean())
    if n < math.log2(2 / level):
        return Effect(math.expm1(mean), -1.0, math.inf, n)
    signs = _signs(n)
    centered = differences - mean
    # Under a shift s the differences are centered + (mean - s): their flipped means need two sums, once.
    scatter, balance = signs @ centered / n, signs.mean(1)

    def refused(distance: float) -> bool:
        return float((np.abs(scatter + balance * distance) >= distance).mean()) < level

    spread = float(np.abs(centered).max())
    inside, outside = 0.0, 2 * spread
    if spread and not refused(outside):
        return Effect(math.expm1(mean), -1.0, math.inf, n)
    for _ in range(_STEPS if spread else 0):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if refused(middle) else (middle, outside)
    return Effect(math.expm1(mean), math.expm1(mean - inside), math.expm1(mean + inside), n)


@lru_cache(maxsize=4)
def _signs(n: int) -> np.ndarray:
    return np.random.default_rng(0).choice((-1.0, 1.0), (_FLIPS, n))
