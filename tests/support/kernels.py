"""Calls of the experts layer, their reference in plain loops, and how near a kernel must come to it."""

from dataclasses import fields
from itertools import pairwise

import torch

from sedetect import ops
from sedetect.kernels import tiles
from sedetect.kernels.gate import Gate
from sedetect.kernels.plan import Plan, plan_torch
from sedetect.kernels.records import COLUMN, float_bits
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.row_stats import RowParts, row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.stats.bank import BankStats

# (worst element, RMS), both relative to the RMS of a float64 reference.
TOLERANCES = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (1e-1, 8e-3), torch.float16: (1.2e-2, 1e-3)}
# T, k, E, H, I
SHAPES = [
    (1, 1, 1, 8, 8),
    (1, 4, 16, 64, 32),  # decode: most experts empty
    (7, 2, 3, 33, 17),  # dimensions that divide nothing
    (300, 4, 8, 130, 70),  # several chunks of one expert, a tail in every row
    (64, 8, 128, 96, 48),
    (515, 1, 2, 257, 65),
]


def assert_close(name, out, ref, dtype):
    worst, rms = TOLERANCES[dtype]
    scale = ref.double().square().mean().sqrt().clamp(min=1e-30)
    error = (out.double() - ref.double()) / scale
    assert error.abs().max() <= worst, f"{name}: worst element {error.abs().max():.2e} at {int(error.abs().argmax())}"
    assert error.square().mean().sqrt() <= rms, f"{name}: RMS {error.square().mean().sqrt():.2e}"


def make_call(shape, dtype, seed, skew=False, transposed=False, bias=False, sentinels=False):
    """Random inputs of one experts call, on the scale of a trained layer: what moe_mlp and weights_of take."""
    tokens, k, experts, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    scores = randn(tokens, experts)
    if skew:  # one expert takes nearly all, most take nothing
        scores[:, 0] += 10
        scores[:, experts // 2 :] -= 10
    index = scores.topk(min(k, experts)).indices
    weights = torch.rand(index.shape, generator=generator).to(dtype)
    weights[torch.rand(index.shape, generator=generator) < 0.05] = 0
    if sentinels:
        index[torch.rand(index.shape, generator=generator) < 0.3] = experts
    layout = (lambda w: w.transpose(1, 2).contiguous()) if transposed else (lambda w: w)
    return {
        "x": randn(tokens, hidden).to(dtype),
        "top_k_index": index,
        "top_k_weights": weights,
        "gate_up": layout(randn(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype),
        "down": layout(randn(experts, hidden, intermediate) * 30 / intermediate**0.5).to(dtype),
        "gate_up_bias": randn(experts, 2 * intermediate).to(dtype) if bias else None,
        "down_bias": randn(experts, hidden).to(dtype) if bias else None,
        "transposed": transposed,
        "gate": Gate(),
    }


def weights_of(call):
    names = ("gate_up", "down", "gate", "gate_up_bias", "down_bias", "transposed")
    return ops.ExpertWeights(**{name: call[name] for name in names})


def moe_mlp(call, **how):
    """ops.moe_mlp of a call."""
    return ops.moe_mlp(*(call[name] for name in ("x", "top_k_index", "top_k_weights")), weights_of(call), **how)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def make_rows(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.arange(tokens) // 16
    first = torch.arange(tokens) % 16 == 0
    counted = torch.rand(tokens, generator=generator) < 0.9
    token = torch.randint(0, 1000, (tokens,), generator=generator)
    return Rows(counted, first & counted, sequence, torch.arange(tokens) % 16, token, source=3)


def loop_over_slots(call, gate=swiglu):
    """The experts layer in float64, slot by slot; shares nothing with the package."""
    out = torch.zeros(call["x"].shape, dtype=torch.float64)
    layout = (lambda w: w.T) if call["transposed"] else (lambda w: w)
    for t in range(len(out)):
        for j, e in enumerate(call["top_k_index"][t].tolist()):
            if e >= len(call["down"]):
                continue
            z = layout(call["gate_up"][e]).double() @ call["x"][t].double()
            z = z if call["gate_up_bias"] is None else z + call["gate_up_bias"][e].double()
            y = layout(call["down"][e]).double() @ gate(z)
            y = y if call["down_bias"] is None else y + call["down_bias"][e].double()
            out[t] += call["top_k_weights"][t, j].double() * y
    return out


def gpt_oss(z):
    """transformers, modeling_gpt_oss: interleaved, clamped, up + 1."""
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def clamped_swiglu(z):
    gate, up = z.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


GATES = {
    Gate(): swiglu,
    Gate("gelu_tanh"): lambda z: (
        torch.nn.functional.gelu(z.chunk(2, dim=-1)[0], approximate="tanh") * z.chunk(2, dim=-1)[1]
    ),
    Gate("relu2", gated=False): lambda z: z.relu().square(),
    Gate(limit=10.0): clamped_swiglu,
    Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0): gpt_oss,
}
PLACE = [COLUMN[name] for name in ("sign", "channel", "sequence", "position", "token_id", "in_channel")]


def assert_equal_bits(name: str, mine: torch.Tensor, reference: torch.Tensor) -> None:
    mine, reference = mine.cpu(), reference.cpu()
    if mine.is_floating_point():
        mine, reference = mine.view(torch.uint8), reference.view(torch.uint8)
    assert torch.equal(mine, reference), name


def assert_parts_of(mine: RowParts, y: torch.Tensor, h: torch.Tensor, rows: int) -> None:
    """The first rows of mine are bit for bit what the definition says of y and h."""
    reference = row_stats_torch(y, h)
    assert torch.equal(float_bits(mine.best[:rows]), float_bits(reference.peak[:rows].abs()))
    assert torch.equal(mine.part[:rows].long(), reference.channel[:rows].long() // mine.y_part_width)
    parts = [float_bits(part.float().abs()).amax(1) for part in h[:rows].split(mine.h_part_width, 1)]
    assert torch.equal(float_bits(mine.in_parts[:, :rows]), torch.stack(parts))
    finite = reference.nonfinite[:rows] == 0
    # A row's float32 squares are added in another order.
    assert torch.allclose(mine.sqnorm[:rows][finite], reference.sqnorm[:rows][finite], rtol=1e-5)
    assert mine.y.shape == y.shape and mine.h.shape == h.shape


def assert_schedule(routing: Plan) -> None:
    """The schedule is, to the last tile, what the definition says of the plan's order and offsets."""
    schedule, slots = routing.schedule, len(routing.order)
    assert torch.equal(routing.order[schedule.row.long()].cpu(), torch.arange(slots))
    used = [
        [expert, first, end, number]
        for expert, (start, end) in enumerate(pairwise(routing.offsets.tolist()))
        for number, first in enumerate(range(start, end, schedule.rows))
    ]
    unused = tiles.max_tiles(slots, routing.num_experts, schedule.rows) - len(used)
    assert schedule.tiles.tolist() == used + unused * [[-1, 0, 0, 0]] and schedule.count.tolist() == [len(used)]
    assert schedule.arrived.tolist() == routing.num_experts * [[0, 0, 0]]


def check_update(update, found: RowParts, y: torch.Tensor, h: torch.Tensor, routing: Plan, gates: torch.Tensor) -> None:
    """Twice, so that the second finds what the first kept: what the definition says of y and h."""
    rows, experts = make_rows(len(gates), 3), routing.num_experts
    mine, reference = BankStats.empty(experts, gates.device), BankStats.empty(experts)
    plain = Plan(routing.order.cpu(), routing.offsets.cpu(), routing.top_k)
    for _ in range(2):
        update(mine, found, routing, gates, rows.to(gates.device))
        update_torch(reference, row_stats_torch(y.cpu(), h.cpu()), plain, gates.cpu(), rows)
    for name in ("counts", "outliers", "first_outliers", "in_max"):
        assert torch.equal(getattr(mine, name).cpu(), getattr(reference, name)), name
    assert torch.allclose(mine.sums.cpu(), reference.sums, rtol=1e-5)  # float32 squares, added in another order


def special_rows(width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(42, width): ties, zeros, infinities, NaNs of every payload, subnormals and the limits of narrower types."""
    y = (torch.randn(42, width, generator=generator) * 10 ** torch.linspace(-8, 5, 42)[:, None]).to(dtype)
    y[1] = 0
    y[2] = -0.0
    y[3] = y[3].abs().amax()  # all equal: the first channel
    for row, special in enumerate((torch.inf, -torch.inf, torch.nan, 448.0, -449.0, 65504.0, 1e-40), start=4):
        y[row, torch.randint(width, (2,), generator=generator)] = special
    y[12].view(torch.int32 if dtype == torch.float32 else torch.int16).fill_(-1)  # NaN, all bits set
    y[13, 0], y[13, -1] = -torch.inf, torch.nan
    y[14] = y[14].abs().amax() * torch.where(torch.arange(width) % 3 == 2, 1, -1)  # equal but for the sign
    return y[torch.randperm(len(y), generator=generator)]


def random_rows(slots: int, generator: torch.Generator, values: int, dtype=torch.float32):
    """(y, h) whose largest elements are of few distinct values, so that most records tie, with some NaN and Inf, some
    beyond float8 and float16, and some rows that have their largest four times. Norms are exact (torch's square root of
    float32 on a CPU can be off by its last bit)."""

    def draw(*choices):
        return torch.tensor(choices)[torch.randint(len(choices), (slots,), generator=generator)]

    def rows(width, channels, peak):
        x = torch.zeros(slots, width)
        x[:, channels] = torch.where(draw(0, 1) > 0, peak, 0)[:, None]
        x[torch.arange(slots), draw(*channels)] = peak * torch.where(draw(0, 1) > 0, 1.0, -1.0)
        return x.to(dtype)

    peaks = [float(v) for v in range(-values, values)]
    special = draw(torch.nan, torch.inf, -torch.inf, 512.0, 131072.0 if dtype != torch.float16 else 60000.0)
    peak = torch.where(draw(*19 * [0], 1) > 0, special, draw(*peaks, -0.0))
    return rows(20, (0, 1, 2, 19), peak), rows(300, (0, 1, 130, 299), draw(*peaks, torch.nan))


def assert_same_state(mine: BankStats, reference: BankStats) -> None:
    for field in fields(BankStats):
        a, b = getattr(mine, field.name), getattr(reference, field.name)
        if a is not None and a.dtype == torch.float64:
            assert torch.allclose(a.cpu(), b.cpu(), rtol=1e-12, atol=0), field.name
        elif a is not None:
            assert torch.equal(a.cpu(), b.cpu()), field.name


def check_update_of_special_rows(update, device: torch.device, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    y, h = (special_rows(n, dtype, generator) for n in (width, 341 - width))
    routing = plan_torch(torch.arange(42, device=device)[:, None] % 2, 2)
    y, h = y.to(device), h.to(device)
    check_update(update, row_parts(y, h), y, h, routing, torch.ones(42, 1, device=device))
