"""Rows of a vision tower: which patch of which image or video a row is.

A tower gets all patches of a forward at once, as the processor lays them out, and their grids say how many each image
has. The position is the patch's number in its image or video; the token id is that of the placeholder. A patch is in
no sequence of tokens, and none is a first token.
"""

from collections.abc import Mapping
from typing import Any

import torch

from sedetect.kernels.rows import Rows

_GIVEN = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
TOWERS = ("vision", "visual")  # the stacks


def patch_rows(
    arguments: Mapping[str, Any], placeholders: dict[str, int], source: int, modalities: tuple[str, ...]
) -> dict[int, Rows]:
    """By number of patches, the rows of the images and of the videos that a forward is given.

    Empty where the model is not told how many patches each image has, or where images have as many as videos.

    Args:
        arguments: of the forward, by name: pixels (T, values) of T patches, and grids (N, 3) whose products add
            up to T.
        placeholders: the token of each modality.
        modalities: those told apart.
    """
    found: dict[int, Rows] = {}
    for modality, names in _GIVEN.items():
        pixels, grids = (arguments.get(name) for name in names)
        if not isinstance(pixels, torch.Tensor) or pixels.dim() != 2 or not isinstance(grids, torch.Tensor):
            continue
        if len(pixels) in found:
            return {}
        found[len(pixels)] = _rows(len(pixels), grids.to(pixels.device), modality, placeholders, source, modalities)
    return found


def _rows(
    patches: int,
    grids: torch.Tensor,
    modality: str,
    placeholders: dict[str, int],
    source: int,
    modalities: tuple[str, ...],
) -> Rows:
    ends = grids.to(torch.int64).prod(1).cumsum(0)
    number = torch.arange(patches, device=grids.device)
    image = torch.searchsorted(ends, number, right=True)
    starts = torch.cat((torch.zeros_like(ends[:1]), ends))
    everything = torch.ones(patches, dtype=torch.bool, device=grids.device)
    unknown = torch.full_like(number, -1)
    token = torch.full_like(number, placeholders.get(modality, -1))
    rows = Rows(everything, ~everything, unknown, number - starts[image], token, source=source)
    rows.parts = tuple(
        Rows(everything if name == modality else ~everything, *rows.tensors()[1:], source=source) for name in modalities
    )
    return rows
