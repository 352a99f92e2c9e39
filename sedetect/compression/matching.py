"""Check by samples of the weights that the experts of one model are those of another.

A sample is the same few rows and columns of an expert's matrices. Rounding moves a weight little and at random, so that
the sample of a quantized expert has a large cosine with that of its own expert, and a small one with all others:
2 bits, round to nearest, leave more than 0.5; random weights have about 0.02.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from sedetect.analysis.matrices import expert_matrices
from sedetect.errors import SedetectError
from sedetect.models.banks import find_banks
from sedetect.stats.place import BankId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Samples = Mapping[BankId, torch.Tensor]
"""Per bank of routed experts: one sample per expert (E, N) float32."""
_ROWS, _COLUMNS = 16, 128  # of each matrix
_ALIKE = 0.1
_NEARER = 0.05  # margin of cosine by which another expert must be nearer than its own


def sample_experts(model: "PreTrainedModel") -> dict[BankId, torch.Tensor]:
    """The samples of a model's routed experts, without banks whose weights cannot be read one by one."""
    samples = {}
    for bank in find_banks(model):
        if not bank.id.routed:
            continue
        try:
            matrices = expert_matrices(model, bank).values()
        except SedetectError:
            continue
        parts = [m[:, :: -(-m.shape[1] // _ROWS), :: -(-m.shape[2] // _COLUMNS)].flatten(1) for m in matrices]
        samples[bank.id] = torch.cat(parts, 1).float().cpu()
    return samples


def mismatched_experts(base: Samples, made: Samples) -> list[str]:
    """A sentence for every layer in which experts hold the weights of another expert, or of no expert.

    Nothing is said where no expert of any layer resembles its own: a quantizer that rotates weights leaves that, and
    the logits tell whether the model is the same.
    """
    lines, alike = [], False
    for bank, samples in made.items():
        if bank not in base:
            continue
        cosine = nn.functional.normalize(samples, dim=1) @ nn.functional.normalize(base[bank], dim=1).T
        own, (nearest, places) = cosine.diagonal(), cosine.max(1)
        moved = (nearest > own + _NEARER) & (nearest > _ALIKE)
        strange = ~(nearest > _ALIKE)  # NaN too
        alike |= bool((own > _ALIKE).any())
        where = f"{'' if bank.stack == 'decoder' else bank.stack + '.'}L{bank.layer}"
        if moved.any():
            e = int(moved.nonzero()[0])
            lines.append(
                f"{where}: {int(moved.sum())} experts hold the weights of others, first {where}E{e} those of "
                f"{where}E{int(places[e])} in the base"
            )
        if strange.any():
            e = int(strange.nonzero()[0])
            lines.append(
                f"{where}: {int(strange.sum())} of {len(strange)} experts hold weights unlike any of the base's, first "
                f"{where}E{e}; they may have been initialized at random"
            )
    return lines if alike else []
