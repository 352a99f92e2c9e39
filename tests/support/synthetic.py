"""Statistics of models that do not exist, for what no model that fits a test has."""

import torch

from sedetect.kernels.records import COLUMN, COUNTS, SUMS, float_bits
from sedetect.ranking.result import Ranking
from sedetect.ranking.rule import rank
from sedetect.stats.bank import BankStats
from sedetect.stats.model import BankInfo, Header, ModelStats, Source
from sedetect.stats.place import BankId


def synthetic_stats(layers: int, experts: int, *, model: str = "synthetic", domain: str = "text", seed: int = 0):
    """ModelStats of layers x experts routed experts with log-normal values and Poisson rows, every slot of every list
    filled, and one super expert, L1E<3>, that fires on first tokens."""
    generator = torch.Generator().manual_seed(seed)
    banks, described = {}, {}
    for layer in range(layers):
        state = BankStats.empty(experts)
        rows = torch.poisson(torch.full((experts,), 400.0), generator=generator).long()
        state.counts[:, 0], state.counts[:, 1] = rows, 8
        state.sums[:] = torch.rand(state.sums.shape, generator=generator, dtype=torch.float64)
        for name in ("outliers", "first_outliers", "in_max"):
            records = getattr(state, name)
            values = (torch.randn(records.shape[:2], generator=generator) * 0.5 + 2).exp()
            if name == "first_outliers" and layer == 1:
                values[3] = 700.0
                state.sums[3, 1] = 8 * 0.9
            records[..., COLUMN["value"]] = float_bits(values.sort(1, descending=True).values)
            for column, most in (("sign", 2), ("channel", 2048), ("sequence", 16), ("token_id", 50000)):
                records[..., COLUMN[column]] = torch.randint(most, records.shape[:2], generator=generator)
            if name == "outliers":
                records[..., COLUMN["position"]] = torch.randint(1, 512, records.shape[:2], generator=generator)
        bank = BankId("decoder", layer, "routed")
        banks[bank], described[str(bank)] = state, BankInfo(f"model.layers.{layer}.mlp.experts", 8, ["cpu"])
    header = Header(
        model=model,
        digest="0123456789abcdef",
        dtype="bfloat16",
        layers={"decoder": layers},
        banks=described,
        sources={"source": Source([[0, 16]], {"domain": domain, "corpus": "synthetic", "window": 512})},
        tokens=8192,
        sequences=16,
        window=512,
        versions={"sedetect": "0"},
    )
    return ModelStats(banks, header)


ROWS, FIRST_ROWS = COUNTS.index("rows"), COUNTS.index("first_rows")
GATE_SUM, GATE_FIRST_SUM = SUMS.index("gate_sum"), SUMS.index("gate_first_sum")


def write(records: torch.Tensor, expert: int, **parts: float) -> None:
    """Put a record into an expert's first slot; value and gate are floats."""
    for name, x in parts.items():
        records[expert, 0, COLUMN[name]] = float_bits(torch.tensor([x])).item() if name in ("value", "gate") else x


def bank(rest, first=None, gates=None) -> BankStats:
    """A bank whose experts reach rest[e] on 100 other rows (None: saw none) with gate_sum 20 there.

    first: {expert: value} on 10 first tokens; gates: {expert: mean routing weight on them}, 0.25 where not given.
    """
    state = BankStats.empty(len(rest))
    for e, value in enumerate(rest):
        if value is not None:
            write(state.outliers, e, value=value, gate=0.2)
            state.counts[e, ROWS] += 100
            state.sums[e, GATE_SUM] += 20
    for e, value in (first or {}).items():
        write(state.first_outliers, e, value=value, gate=0.5)
        gate = 10 * (gates or {}).get(e, 0.25)
        state.counts[e, [ROWS, FIRST_ROWS]] += 10
        state.sums[e, [GATE_SUM, GATE_FIRST_SUM]] += gate
    return state


def model(banks: dict[tuple, BankStats], layers: int | dict[str, int], top_k: int = 4) -> ModelStats:
    """Statistics of banks keyed (layer, kind) or (stack, layer, kind)."""
    named = {BankId(*(key if len(key) == 3 else ("decoder", *key))): state for key, state in banks.items()}
    known = {str(b): BankInfo(module=str(b), top_k=top_k if b.routed else 1) for b in named}
    return ModelStats(named, Header(layers=layers if isinstance(layers, dict) else {"decoder": layers}, banks=known))


def one_layer(values, **arguments) -> Ranking:
    """The ranking of a model with one layer, which is inside L: round(0.75) = 1."""
    return rank(model({(0, "routed"): bank(values)}, 1), **arguments)
