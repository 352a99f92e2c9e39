"""Modality of a token: text, image, video or audio, by the processor's token types or the model's placeholder ids."""

from collections.abc import Iterable
from typing import Any

import torch

from sedetect.kernels.rows import Rows

# In the order of a processor's mm_token_type_ids.
MODALITIES = ("text", "image", "video", "audio")
_NAMES = ("{}_token_id", "{}_token_index")
_OTHER_NAMES = {"image": ("media_placeholder_token_id",)}  # Kimi's


def placeholders(config: Any) -> dict[str, int]:
    """Of a model's config, the token id in whose place each modality but text stands; none of a model of text alone."""
    found = {}
    for modality in MODALITIES[1:]:
        names = (*(name.format(modality) for name in _NAMES), *_OTHER_NAMES.get(modality, ()))
        ids = (getattr(config, name, None) for name in names)
        token = next((token for token in ids if isinstance(token, int)), None)
        if token is not None:
            found[modality] = token
    return found


def modality_of(tokens: torch.Tensor, types: torch.Tensor | None, ids: dict[str, int]) -> torch.Tensor:
    """(B, L) int64: each token's number in MODALITIES, -1 of one given as an embedding without its type.

    tokens: (B, L) ids, -1 for embeddings. types: mm_token_type_ids of the same shape, where there are some.
    """
    if types is not None:
        return types
    found = torch.where(tokens < 0, -1, 0)
    for modality, token in ids.items():
        found = torch.where(tokens == token, MODALITIES.index(modality), found)
    return found


def by_modality(
    rows: Rows, modality: torch.Tensor, before: torch.Tensor | None, modalities: Iterable[str]
) -> tuple[Rows, ...]:
    """The rows of each modality, with the first tokens of its spans: unbroken runs of it in one sequence.

    rows: of T = B * L tokens. modality: (B, L). before: (B,) of the token before each row, where there is one.
    """
    earlier = torch.full_like(modality[:, :1], -1) if before is None else before[:, None]
    begins = (modality != torch.cat((earlier, modality[:, :-1]), 1)).reshape(-1) | rows.first
    parts = []
    for name in modalities:
        counted = rows.counted & (modality.reshape(-1) == MODALITIES.index(name))
        first = counted & (rows.first if name == "text" else begins)
        parts.append(Rows(counted, first, rows.sequence, rows.position, rows.token_id, source=rows.source))
    return tuple(parts)
