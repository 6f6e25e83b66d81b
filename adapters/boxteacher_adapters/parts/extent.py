"""Boxes round masks."""

import torch
from torch import Tensor


def mask_extent(rows: Tensor, columns: Tensor) -> Tensor:
    """Boxes (…, 4) `x0, y0, x1, y1` in cells round masks, given by their shadows; 0 for an empty mask.

    Args:
        rows: (…, h) bool, which rows have a cell in the mask.
        columns: (…, w) bool, likewise.
    """
    (y0, y1), (x0, x1) = _span(rows), _span(columns)
    return torch.stack([x0, y0, x1, y1], -1).float()


def _span(occupied: Tensor) -> tuple[Tensor, Tensor]:
    length = occupied.shape[-1]
    first = occupied.int().argmax(-1)
    end = length - occupied.flip(-1).int().argmax(-1)
    return first, torch.where(occupied.any(-1), end, 0)
