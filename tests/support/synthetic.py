"""Statistics of models that do not exist, for what no model that fits a test has."""

import torch

from sedetect.kernels.records import COLUMN, float_bits
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
