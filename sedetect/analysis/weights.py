"""Similarity, matching and projection of the weight matrices of a layer's experts.

From the checkpoint alone, without a forward: the weights of one layer at a time are in memory. The analyses are the
static ones of arXiv 2406.18219, over every routed bank and the shared experts of its layer:

    similarity    cosine of whole matrices (matrix level), and of the means of their neurons (neuron level, averaged)
    matching      cosine of two matrices after the neurons of one are put in the order that fits the other best, and how
                  far that order is from the one they have (Kendall's tau) (neuron level, reordered)
    router        cosine of gate embeddings, and how much of it the similarity of the experts explains (R2)
    projection    principal components of whole matrices, and of neurons

Here a matrix is (I, H), one row per neuron, whatever its layout; see sedetect.analysis.matrices. Matrices of unequal
shape have no similarity: it is NaN. Every similarity of a layer is one Gram matrix, in float32 by chunks that are
summed in float64.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from sedetect.analysis.common import (
    Analysis,
    Group,
    LayerArrays,
    Standing,
    groups_of,
    new_analysis,
    off_diagonal,
    standing,
    to_others,
    without,
)
from sedetect.analysis.dense import DENSE, DenseModel, open_layers
from sedetect.analysis.matrices import NAMES, expert_matrices
from sedetect.checkpoints.options import Loading
from sedetect.errors import Argument, SedetectError, check_type
from sedetect.models.banks import find_banks, layer_path
from sedetect.models.identity import join_digest, model_dtype, model_id
from sedetect.models.routers import find_router

COMPONENTS = 3
_CHUNK = 2**26  # elements that are in float32 at a time
_NEURONS = 64  # of an expert whose projection is kept
_CLUSTER, _REACH = 5, 3.0  # points that make a cluster, and its reach in median distances to the last of them

Rows = Sequence[torch.Tensor]  # matrices of experts, (e, I, H) each; together N of them


class Matching(NamedTuple):
    """Two matrices (I, H) fitted to each other.

    order       (I,): neuron order[i] of the second stands for neuron i of the first
    similarity  cosine of the matrices, the second in that order; unmatched: as they are
    tau         Kendall's rank correlation of that order with 0 .. I - 1
    """

    order: np.ndarray
    similarity: float
    unmatched: float
    tau: float


class Projection(NamedTuple):
    """Principal components: scores (N, 3), and the share of the variance of each (3,)."""

    scores: torch.Tensor
    explained: torch.Tensor


class Regression(NamedTuple):
    """A least-squares line: r2 is the square of Pearson's correlation."""

    r2: float
    slope: float
    intercept: float


def gram(stacks: Rows, transform: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
    """Inner products of N matrices of one shape: (N, N) float64.

    transform changes each chunk of their elements, (N, n) float32, before it is multiplied.
    """
    number = sum(len(stack) for stack in stacks)
    neurons, width = stacks[0].shape[1:]
    step = max(1, _CHUNK // (number * width))
    total = torch.zeros(number, number, dtype=torch.float64, device=stacks[0].device)
    for start in range(0, neurons, step):
        chunk = torch.cat([stack[:, start : start + step].float().flatten(1) for stack in stacks])
        chunk = transform(chunk)
        total += (chunk @ chunk.t()).double()
    return total


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products (N, N); 0 beside a vector of zeros."""
    norms = products.diagonal().clamp(min=0).sqrt()
    found = products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    return found.clamp(-1, 1)


def matrix_similarity(stacks: Rows) -> torch.Tensor:
    """Cosine of every pair of matrices, flattened: (N, N) float64."""
    return cosines(gram(stacks))


def neuron_means(stacks: Rows) -> torch.Tensor:
    """The mean neuron of every matrix: (N, H) float64. The matrices may have any number of neurons."""
    return torch.cat([torch.stack([matrix.double().mean(0) for matrix in stack]) for stack in stacks])


def vector_similarity(vectors: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of vectors (N, D): (N, N) float64."""
    vectors = vectors.double()
    return cosines(vectors @ vectors.t())


def match_neurons(first: torch.Tensor, second: torch.Tensor) -> Matching:
    """Put the neurons of the second matrix (I, H) in the order in which the sum of their cosines with those of the
    first is largest (Hungarian algorithm)."""
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import kendalltau

    first, second = first.float(), second.float()
    tiny = torch.finfo(torch.float32).tiny
    units = [matrix / matrix.norm(dim=1, keepdim=True).clamp(min=tiny) for matrix in (first, second)]
    _, order = linear_sum_assignment((units[0] @ units[1].t()).cpu().numpy(), maximize=True)
    tau = float(kendalltau(order, np.arange(len(order))).statistic) if len(order) > 1 else 1.0
    moved = second[torch.from_numpy(order).to(second.device)]
    return Matching(order, _cosine(first, moved), _cosine(first, second), tau)


def regress(x: torch.Tensor, y: torch.Tensor) -> Regression:
    """The line of y (n,) over x (n,), as scipy fits it; NaN for fewer than two points, and without spread in x or y."""
    from scipy.stats import linregress

    if len(x) < 2 or float(x.max() - x.min()) == 0 or float(y.max() - y.min()) == 0:
        return Regression(*[float("nan")] * 3)
    line = linregress(x.cpu().double().numpy(), y.cpu().double().numpy())
    return Regression(float(line.rvalue) ** 2, float(line.slope), float(line.intercept))


def project_matrices(stacks: Rows) -> Projection:
    """Principal components of N flattened matrices, every element scaled to variance 1 over the N.

    Taken from their Gram matrix, so that the elements are read once. An element that is the same in all of them is 0.
    """
    from sklearn.decomposition import KernelPCA

    products = gram(stacks, _standardise)
    number = min(COMPONENTS, len(products) - 1)
    kept = KernelPCA(number, kernel="precomputed", eigen_solver="dense")
    scores = torch.zeros(len(products), COMPONENTS, dtype=torch.float64)
    explained = torch.zeros(COMPONENTS, dtype=torch.float64)
    total = float(products.trace())
    if number and total:
        found = torch.from_numpy(kept.fit_transform(products.cpu().numpy()))
        scores[:, : found.shape[1]] = _signed(found)
        explained[: found.shape[1]] = torch.from_numpy(kept.eigenvalues_) / total
    return Projection(scores, explained)


def stray(scores: torch.Tensor) -> torch.Tensor:
    """(N,) bool: experts that DBSCAN puts into no cluster by the first two components of scores (N, 3).

    The published analysis leaves such experts out of its picture of one model, with a radius of 50, which suits the
    spread of that model's scores. Here it is 3 times the median distance to the 4th neighbor, whatever the spread.
    """
    from sklearn.cluster import DBSCAN

    points = scores[:, :2]
    if len(points) <= _CLUSTER:
        return torch.zeros(len(points), dtype=torch.bool)
    radius = _REACH * float(torch.cdist(points, points).sort(1).values[:, _CLUSTER - 1].median())
    labels = DBSCAN(eps=max(radius, 1e-300), min_samples=_CLUSTER).fit(points.numpy()).labels_
    return torch.from_numpy(labels == -1)


def project_neurons(stacks: Rows, keep: int = _NEURONS) -> Projection:
    """Principal components of the neurons of N matrices together, every coordinate scaled to variance 1 over them.

    The matrices may have any number of neurons. scores: (N, keep, 3), of so many neurons of each, evenly spaced; NaN
    where there are fewer.
    """
    from scipy.linalg import eigh

    matrices = [matrix for stack in stacks for matrix in stack]
    width, device = matrices[0].shape[1], matrices[0].device
    count = sum(len(matrix) for matrix in matrices)
    sums = torch.zeros(2, width, dtype=torch.float64, device=device)
    for matrix in matrices:
        sums[0] += matrix.double().sum(0)
    mean = sums[0] / count
    for matrix in matrices:
        sums[1] += (matrix.double() - mean).square().sum(0)
    scale = _inverse((sums[1] / max(count - 1, 1)).sqrt())
    covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
    for matrix in matrices:
        z = ((matrix.double() - mean) * scale).float()
        covariance += (z.t() @ z).double()
    number = min(COMPONENTS, width)
    values, vectors = eigh(covariance.cpu().numpy(), subset_by_index=[width - number, width - 1])
    axes = torch.from_numpy(vectors[:, ::-1].copy()).to(device)
    scores = torch.full((len(matrices), keep, COMPONENTS), torch.nan, dtype=torch.float64)
    for place, matrix in enumerate(matrices):
        some = matrix[kept_neurons(len(matrix), keep).to(device)]
        scores[place, : len(some), :number] = (((some.double() - mean) * scale) @ axes).cpu()
    explained = torch.zeros(COMPONENTS, dtype=torch.float64)
    explained[:number] = torch.from_numpy(values[::-1].copy()) / max(float(covariance.trace()), 1e-300)
    return Projection(_signed(scores), explained)


def kept_neurons(neurons: int, keep: int = _NEURONS) -> torch.Tensor:
    """Numbers of the neurons whose projection is kept, of so many: evenly spaced, at most keep."""
    return torch.linspace(0, neurons - 1, min(keep, neurons)).round().long()


@torch.no_grad()
def analyze_group(
    matrices: list[dict[str, torch.Tensor]],
    router: torch.Tensor | None,
    pairs: Sequence[tuple[int, int]],
    progress: Callable[[str], None] = lambda label: None,
) -> dict[str, torch.Tensor]:
    """The arrays of one group of N experts, on the CPU.

    Args:
        matrices: expert_matrices of its banks, the routed experts first.
        router: (E, D), the gate embeddings of the routed experts.
        pairs: of places among the N, to match; both must have matrices of the same shape.
        progress: called with what is done next.
    Returns:
        for every matrix M of "gate", "up" and "down" (float32 unless it says otherwise):
        M.similarity, M.neuron_similarity (N, N): of whole matrices, of mean neurons
        M.norm, M.peak (N,): Frobenius norm, and largest |weight|; NaN for an expert without that matrix
        M.scores (N, 3), M.explained (3,), M.stray (N,) bool: projection of whole matrices, and those in no cluster
        M.neuron_scores (N, 64, 3), M.neuron_explained (3,): projection of neurons
        M.matched, M.unmatched, M.tau (P,): of the pairs; M.chance (1,): similarity of the first of the matrices and a
            random one, matched, which neurons without anything in common reach
        M.r2, M.slope, M.intercept: (1,) of the router's similarity over M.neuron_similarity, pairs of routed experts
        router.similarity (E, E), router.norm (E,): of the gate embeddings; pairs (P, 2) int64
    """
    found: dict[str, torch.Tensor] = {"pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)}
    experts = len(next(iter(matrices[0].values())))
    if router is not None:
        found["router.similarity"] = vector_similarity(router[:experts])
        found["router.norm"] = router[:experts].double().norm(dim=1)
    for name in matrices[0]:
        stacks = [of[name] if name in of else _like(of["down"]) for of in matrices]
        whole = _same(stacks, slice(1, None))  # of one shape, row by row
        wide = _same(stacks, slice(2, None))  # of one width
        progress(f"{name}: similarity and projection")
        products = gram([s for s, fits in zip(stacks, whole) if fits])
        found[f"{name}.similarity"] = _spread(cosines(products), whole, stacks)
        means = neuron_means([s for s, fits in zip(stacks, wide) if fits])
        found[f"{name}.neuron_similarity"] = _spread(vector_similarity(means), wide, stacks)
        flat = [matrix for stack in stacks for matrix in stack]
        unknown = torch.tensor(torch.nan, dtype=torch.float64, device=flat[0].device)
        sizes = [(m.double().norm(), m.abs().amax().double()) if m.numel() else (unknown, unknown) for m in flat]
        found[f"{name}.norm"], found[f"{name}.peak"] = map(torch.stack, zip(*sizes))
        projection = project_matrices([s for s, fits in zip(stacks, whole) if fits])
        found[f"{name}.scores"] = _spread_rows(projection.scores, whole, stacks)
        found[f"{name}.explained"] = projection.explained
        found[f"{name}.stray"] = _spread_rows(stray(projection.scores).float(), whole, stacks) == 1
        projection = project_neurons([s for s, fits in zip(stacks, wide) if fits])
        found[f"{name}.neuron_scores"] = _spread_rows(projection.scores, wide, stacks)
        found[f"{name}.neuron_explained"] = projection.explained
        matched = []
        for number, (i, j) in enumerate(pairs):
            progress(f"{name}: matching neurons, pair {number + 1} of {len(pairs)}")
            matched.append(match_neurons(flat[i], flat[j]))
        if pairs:
            noise = torch.randn(flat[0].shape, generator=torch.Generator().manual_seed(0)).to(flat[0].device)
            found[f"{name}.chance"] = torch.tensor([match_neurons(flat[0], noise).similarity])
        for field, array in (("matched", "similarity"), ("unmatched", "unmatched"), ("tau", "tau")):
            found[f"{name}.{field}"] = torch.tensor([getattr(one, array) for one in matched])
        if router is not None:
            zeros = (found[f"{name}.norm"][:experts] == 0) | (found["router.norm"] == 0)
            tables = found[f"{name}.neuron_similarity"][:experts, :experts], found["router.similarity"]
            line = regress(*(off_diagonal(without(table, zeros), experts) for table in tables))
            found |= {f"{name}.{field}": torch.tensor([value]) for field, value in line._asdict().items()}
    return {n: (t.float() if t.is_floating_point() else t).cpu() for n, t in found.items()}


def analyze_weights(
    model: str | Path,
    *,
    against: str | Path | None = None,
    layers: Sequence[int] | None = None,
    pairs: int = 32,
    loading: Loading = Loading(),
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Analysis:
    """The weights of every layer of a checkpoint, one layer in memory at a time.

    Args:
        model: a checkpoint folder or a hub name.
        against: a dense model; the MLP of its layer of the same number takes part, under the name "F".
        layers: numbers of the layers; None for all that have routed experts.
        pairs: pairs of experts to match in each layer, drawn at random (the same ones every time); all where there are
            no more, none for 0.
        progress: called with (current step in words, steps done, steps in all); a step is a layer.
    Returns:
        an Analysis of the kind "weights"; the arrays of a layer are those of analyze_group.
    Raises:
        SedetectError: for what load_model refuses, a layer without experts, weights that cannot be read or are not
            finite, and a dense model whose MLPs have another width.
    """
    check_installed()
    check_type("loading", loading, Loading)
    if pairs < 0:
        raise SedetectError(Argument("pairs"), f" {pairs}: must be at least 0")
    streamed = open_layers(model, loading, _layers_with_experts)
    groups = groups_of(find_banks(streamed.model), layers)
    dense = None if against is None else DenseModel(against, loading)
    if dense is not None:
        dense.check(groups)
    known = model_id(streamed.model)
    result = new_analysis("weights", streamed.model, join_digest(known, None))
    result.settings = {"pairs": pairs, "against": None if dense is None else dense.name}
    seen: set[str] = set()
    sums: list[int | None] = []
    by_layer = _by_layer(groups)
    for done, (path, here) in enumerate(by_layer.items()):

        def report(label: str, path: str = path, done: int = done) -> None:
            progress(f"{path}: {label}", done, len(by_layer))

        report("reading")
        number = streamed.paths.index(path)
        streamed.load(number)
        sums.append(streamed.checksum(number))
        for group in here:
            members, banks = group.members, [group.routed, *group.shared]
            matrices = [expert_matrices(streamed.model, bank) for bank in banks]
            other = None if dense is None else dense.matrices(group.routed, streamed.device)
            if other is not None:
                matrices.append(other)
                members.append(DENSE)
            elif dense is not None:
                seen.add(dense.lacking(group.routed))
            _check_finite(path, members, matrices)
            router = find_router(streamed.model, group.routed)
            weight = None if router is None else router.weight
            chosen = draw_pairs(matrices, pairs)
            arrays = analyze_group(matrices, weight, chosen, report)
            result.layers[group.routed.id] = LayerArrays(group.routed.experts, members, arrays)
            seen |= _odd_shapes(group, matrices)
            if router is None:
                seen.add(f"{group.routed.id}: no router found beside its experts")
        del matrices
        streamed.free(number)
    if len(sums) < len(streamed.paths):
        seen.add("layers were left out: other weights of this architecture cannot be distinguished from these")
    elif "weights" not in model_dtype(streamed.model):  # their layout differs from that of dequantized weights
        streamed.load_rest()
        sums.append(streamed.rest_checksum())
        result.digest = join_digest(known, None if None in sums else sum(one for one in sums if one is not None))
    result.notes = sorted(seen)
    return result


def _check_finite(path: str, members: list[str], matrices: list[dict[str, torch.Tensor]]) -> None:
    """Raise SedetectError for the first member with a weight that is NaN or Inf. matrices: of analyze_group, of whose
    experts members are the names."""
    first = 0
    for of in matrices:
        for name, stack in of.items():
            # Both keep a NaN, and neither makes a tensor of the stack's size.
            finite = stack.amax((1, 2)).isfinite() & stack.amin((1, 2)).isfinite()
            if not finite.all():
                member = members[first + int(finite.long().argmin())]
                raise SedetectError(
                    f"{path}: {name} of {member} holds NaN or Inf; fix the checkpoint, or name the other layers (",
                    Argument("layers"),
                    ")",
                )
        first += len(of["down"])


def known(layer: LayerArrays, name: str, field: str) -> torch.Tensor:
    """The table of pairs name.field, NaN beside members whose matrix, or gate embedding, is zeros."""
    return without(layer.arrays[f"{name}.{field}"], layer.arrays[f"{name}.norm"] == 0)


def summarize(layer: LayerArrays) -> dict[str, dict[str, float]]:
    """A summary of a layer's arrays, {number: {matrix: value}}: means over the pairs of routed experts of
    similarity and neuron_similarity, over the matched pairs of unmatched, matched and tau; chance and r2. Quantities
    that were not computed are left out."""
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in NAMES if f"{name}.similarity" in layer.arrays):
        for field in ("similarity", "neuron_similarity"):
            values = off_diagonal(known(layer, name, field), layer.experts)
            found.setdefault(field, {})[name] = float(values.double().mean())
        for field in ("unmatched", "matched", "tau", "chance", "r2"):
            values = layer.arrays.get(f"{name}.{field}", torch.empty(0))
            if len(values):
                found.setdefault(field, {})[name] = float(values.double().nanmean())
    return found


def standings(layer: LayerArrays, expert: int) -> dict[str, Standing]:
    """The Standing of one routed expert in its layer: by the norm and largest weight of its matrices, by how
    alike they are to the others' on average ("gate neurons": their means), and by its gate embedding."""
    found = {}
    for name in (name for name in NAMES if f"{name}.norm" in layer.arrays):
        found[f"|{name}|"] = standing(layer.arrays[f"{name}.norm"][: layer.experts], expert)
        found[f"largest of {name}"] = standing(layer.arrays[f"{name}.peak"][: layer.experts], expert)
        for field, label in (("similarity", name), ("neuron_similarity", f"{name} neurons")):
            found[f"{label} to others"] = standing(to_others(known(layer, name, field), layer.experts), expert)
    if "router.norm" in layer.arrays:
        found["|gate embedding|"] = standing(layer.arrays["router.norm"], expert)
        similar = to_others(known(layer, "router", "similarity"), layer.experts)
        found["gate embedding to others"] = standing(similar, expert)
    return found


def draw_pairs(matrices: list[dict[str, torch.Tensor]], number: int) -> list[tuple[int, int]]:
    """count pairs i < j of experts with matrices of the first bank's shape, at random with a fixed seed."""
    first = matrices[0]["down"].shape[1:]
    places: list[int] = []
    start = 0
    for of in matrices:
        fits = of["down"].shape[1:] == first and of.keys() == matrices[0].keys()
        places += range(start, start + len(of["down"])) if fits else []
        start += len(of["down"])
    every = [(i, j) for n, i in enumerate(places) for j in places[n + 1 :]]
    chosen = np.random.default_rng(0).permutation(len(every))[:number]
    return [every[i] for i in sorted(chosen.tolist())]


def check_installed() -> None:
    """Raise SedetectError where the libraries of the analyses are missing."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise SedetectError(
            f"this analysis needs {error.name}; install it with: pip install 'sedetect[analysis]'"
        ) from None


def _layers_with_experts(model: nn.Module) -> dict[str, nn.Module]:
    paths = [layer_path(bank) for bank in find_banks(model) if bank.id.routed]
    return {path: model.get_submodule(path) for path in paths}


def _by_layer(groups: list[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(layer_path(group.routed), []).append(group)
    return found


def _odd_shapes(group: Group, matrices: list[dict[str, torch.Tensor]]) -> set[str]:
    first = matrices[0]["down"].shape[1:]
    names = [bank.id.kind for bank in (group.routed, *group.shared)] + [DENSE]
    odd = {name: of["down"].shape[1:] for name, of in zip(names, matrices) if of["down"].shape[1:] != first}
    return {
        f"{name}: {neurons} neurons of width {width} where routed experts have {first[0]} of {first[1]}; compared by "
        + ("its mean neuron alone" if width == first[1] else "nothing")
        for name, (neurons, width) in odd.items()
    }


def _like(down: torch.Tensor) -> torch.Tensor:
    """A matrix that a bank does not have: of no neurons and no width, so that it is compared with nothing."""
    return down.new_zeros(len(down), 1, 0)


def _same(stacks: Rows, part: slice) -> list[bool]:
    return [stack.shape[part] == stacks[0].shape[part] for stack in stacks]


def _spread(matrix: torch.Tensor, fits: list[bool], stacks: Rows) -> torch.Tensor:
    """(n, n) over the experts that fit as (N, N) over all, NaN elsewhere."""
    at = (
        torch.cat([torch.full((len(stack),), fit) for fit, stack in zip(fits, stacks)])
        .nonzero()[:, 0]
        .to(matrix.device)
    )
    number = sum(len(stack) for stack in stacks)
    full = matrix.new_full((number, number), torch.nan)
    full[at[:, None], at] = matrix
    return full


def _spread_rows(rows: torch.Tensor, fits: list[bool], stacks: Rows) -> torch.Tensor:
    at = torch.cat([torch.full((len(stack),), fit) for fit, stack in zip(fits, stacks)])
    full = rows.new_full((len(at), *rows.shape[1:]), torch.nan)
    full[at] = rows
    return full


def _standardise(chunk: torch.Tensor) -> torch.Tensor:
    return (chunk - chunk.mean(0)) * _inverse(chunk.std(0) if len(chunk) > 1 else torch.zeros_like(chunk[0]))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where it is 0."""
    return torch.where(scale > 0, 1 / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0)


def _signed(scores: torch.Tensor) -> torch.Tensor:
    """Scores whose largest, by magnitude, is positive in every component: the sign of an axis is arbitrary."""
    flat = scores.reshape(-1, scores.shape[-1]).nan_to_num()
    largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))[0]
    return scores * torch.where(largest < 0, -1.0, 1.0)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """NaN beside zeros."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
