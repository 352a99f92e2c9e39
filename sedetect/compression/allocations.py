"""The format of each routed expert under a size limit: by cost, one for all, or dealt out at random.

A multiple-choice knapsack, solved by milp of scipy (HiGHS): exact to a stated gap. It holds what a greedy ascent of the
convex hull would have to patch: an end of few large groups (layers), and the number of experts that a layer must keep
for its router.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedetect.errors import SedetectError
from sedetect.stats.place import BankId, Place

KEPT, PRUNED = "kept", "pruned"
_GAP = 1e-4
_DEALS = 1000

Plan = dict[BankId, list[str]]  # per routed bank, the format of each expert, KEPT or PRUNED


@dataclass(frozen=True)
class Costs:
    """The cost of each level.

    levels   KEPT, the formats, and PRUNED where the model can be pruned
    places   the routed experts; banks: of each, the number of its bank in the model
    cost     (experts, levels) KL divergence in nats per token; size: (experts, levels) bits
    layers   (banks, levels) what the experts of a layer cost together
    most     per bank, how many of its experts may be pruned
    """

    levels: list[str]
    places: list[Place]
    banks: np.ndarray
    cost: np.ndarray
    size: np.ndarray
    layers: np.ndarray
    most: list[int]

    def plan(self, choice: np.ndarray) -> Plan:
        """Of levels (experts,) by number."""
        plan: Plan = {}
        for place, level in zip(self.places, choice.tolist(), strict=True):
            plan.setdefault(place.bank, []).append(self.levels[level])
        return plan


def check_milp() -> None:
    """Raise SedetectError where the optimizer is missing."""
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError:
        raise SedetectError("the frontier needs scipy; install it with: pip install 'sedetect[analysis]'") from None


@dataclass(frozen=True)
class Wanted:
    """An unevaluated curve: per point, its limit (bits), the level of each expert by number, and the optimizer's
    gap.
    """

    by: str
    protected: bool
    seed: int | None
    chosen: Sequence[tuple[float, tuple[int, ...], float | None]]


def allocations(costs: Costs, limits: list[float], uniform: list[float], safe: np.ndarray, seeds: int) -> list[Wanted]:
    wanted = []
    arms = [False, *([True] if safe.any() else [])]
    for protected in arms:
        chosen = []
        for level, limit in enumerate(uniform, start=1):
            choice = np.where(safe & protected, 0, level)
            chosen.append((limit, tuple(choice.tolist()), None))
        wanted.append(Wanted("model", protected, None, chosen))
    whole = np.isin(costs.banks, costs.banks[safe])  # the layers of the protected experts
    fixed = costs.size[whole, 0].sum()
    more = [fixed + costs.size[~whole, level].sum() for level in range(1, 1 + len(uniform))] if safe.any() else []
    for by in ("layer", "expert"):
        # Protected layers alone can take more than a limit.
        sizes = limits if by == "expert" else sorted({*limits, *(one for one in more if one < limits[0])}, reverse=True)
        for protected in arms:
            mine = safe & protected
            points = [(limit, *found) for limit in sizes if (found := choose(costs, by, limit, mine)) is not None]
            wanted.append(Wanted(by, protected, None, points))
            if not protected:
                bare = points
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            dealt = [
                (limit, other, None)
                for limit, choice, _ in bare
                if (other := deal(costs, by, choice, generator)) is not None
            ]
            wanted.append(Wanted(by, False, seed, dealt))
    return wanted


def choose(costs: Costs, by: str, limit: float, safe: np.ndarray) -> tuple[tuple[int, ...], float] | None:
    """The cheapest level of each expert within limit (bits), and the gap; None if no choice is that small."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array, vstack

    cost, size, groups = costs.cost, costs.size, np.arange(len(costs.cost))
    if by == "layer":
        groups = costs.banks
        cost = costs.layers
        size = np.stack([size[groups == bank].sum(0) for bank in range(len(cost))])
        safe = np.array([safe[groups == bank].any() for bank in range(len(cost))])
    allowed = np.ones(cost.shape, dtype=bool)
    allowed[safe, 1:] = False
    prunes = costs.levels[-1] == PRUNED
    if by == "layer" and prunes:
        allowed[:, -1] = False
    number, levels = cost.shape
    if np.where(allowed, size, np.inf).min(1).sum() > limit:
        return None
    columns = np.arange(number * levels)
    once = coo_array((np.ones(len(columns)), (columns // levels, columns)))
    rows, low, high = [once, csr_array(size.reshape(1, -1) / limit)], [1.0] * number + [0.0], [1.0] * number + [1.0]
    if by == "expert" and prunes:
        pruned = columns % levels == levels - 1
        bank = costs.banks[columns[pruned] // levels]
        shape = (len(costs.most), len(columns))
        rows.append(coo_array((np.ones(pruned.sum()), (bank, columns[pruned])), shape=shape))
        low, high = low + [0.0] * len(costs.most), high + [float(most) for most in costs.most]
    scale = cost[allowed].sum() or 1.0
    found = milp(
        1e3 * cost.reshape(-1) / scale,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, allowed.reshape(-1).astype(float)),
        constraints=LinearConstraint(vstack(rows), low, high),
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        return None
    choice = found.x.reshape(cost.shape).argmax(1)
    if by == "layer":
        choice = choice[groups]
    return tuple(choice.tolist()), float(found.mip_gap)


def deal(costs: Costs, by: str, choice: tuple[int, ...], generator: np.random.Generator) -> tuple[int, ...] | None:
    """The same levels among experts (or layers) of the same size, at random; None where too many would be pruned."""
    dealt = np.array(choice)
    owners = costs.banks if by == "layer" else np.arange(len(dealt))
    first = np.unique(owners, return_index=True)[1]  # the levels of a layer are one
    alike = [(float(costs.size[i, 0]), int((owners == owners[i]).sum())) for i in first]
    for _ in range(_DEALS):
        levels = np.array(choice)[first]
        for kind in dict.fromkeys(alike):
            places = [n for n, one in enumerate(alike) if one == kind]
            levels[places] = levels[generator.permutation(places)]
        dealt = levels[np.searchsorted(owners[first], owners)]
        pruned = (dealt == len(costs.levels) - 1) if costs.levels[-1] == PRUNED else np.zeros(len(dealt), dtype=bool)
        if all(pruned[costs.banks == bank].sum() <= most for bank, most in enumerate(costs.most)):
            return tuple(dealt.tolist())
    return None
