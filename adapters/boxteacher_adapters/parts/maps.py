"""Feature maps and masks: levels laid end to end, boxes around masks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, D, h_i, w_i) of several levels, with their cells laid end to end: (B, Σ h_i · w_i, D)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)


def projection_boxes(rows: Tensor, columns: Tensor) -> Tensor:
    """Boxes (…, 4) `x0, y0, x1, y1` in cells around masks, from their projections; 0 for an empty mask.

    Args:
        rows: (…, h) bool, rows with a cell in the mask.
        columns: (…, w) bool, columns with a cell in the mask.
    """
    (y0, y1), (x0, x1) = _span(rows), _span(columns)
    return torch.stack([x0, y0, x1, y1], -1).float()


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes (K, 4) `x0, y0, x1, y1` in cells around masks (K, h, w) bool; 0 for an empty mask."""
    return projection_boxes(masks.any(2), masks.any(1))


def mask_boxes_in_images(masks: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """Boxes (K, 4) in pixels around masks (K, h, w) bool, without the padding; 0 for an empty mask.

    Args:
        masks: on a grid over the padded batch.
        sizes: (K, 2) height and width in pixels of each mask's image.
        stride: pixels per cell.
    """
    rows = torch.arange(masks.shape[1], device=masks.device) * stride < sizes[:, :1]  # (K, h)
    columns = torch.arange(masks.shape[2], device=masks.device) * stride < sizes[:, 1:]  # (K, w)
    boxes = mask_boxes(masks & rows[:, :, None] & columns[:, None]) * stride
    return boxes.minimum(sizes.flip(1).repeat(1, 2))


def _span(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First cell and end cell (…) of those that are occupied (…, n); 0 and 0 if none is."""
    length = occupied.shape[-1]
    first = occupied.int().argmax(-1)
    end = length - occupied.flip(-1).int().argmax(-1)
    return first, torch.where(occupied.any(-1), end, 0)
