"""Masks drawn in boxes, laid onto the mask grid."""

import torch
from torch import Tensor

OUTSIDE = -10.0
"""Mask logit of the cells outside of a pasted box."""


def paste_on_grid(
    logits: Tensor, boxes: Tensor, canvas: tuple[int, int], stride: int, outside: float = OUTSIDE
) -> Tensor:
    """Bilinear pasting of box-aligned logits, differentiable in `logits`.

    A box's sides are the outer sides of its map; within half a cell of them the outermost values go on, and
    grid cells whose pixel lies outside of the box are `outside`.

    Args:
        logits: (M, r, r) that fill the boxes.
        boxes: (M, 4) `x0, y0, x1, y1` in pixels.
        canvas: height and width in pixels, multiples of `stride`.
        stride: of the mask grid; cell (i, j) stands for the pixel (i · stride + stride // 2, …).
        outside: logit outside of the box.

    Returns:
        (M, h, w) on the mask grid.
    """
    size = logits.shape[-1]
    rows = _bilinear(boxes[:, 1], boxes[:, 3], canvas[0], stride, size)  # (M, h, r)
    columns = _bilinear(boxes[:, 0], boxes[:, 2], canvas[1], stride, size)  # (M, w, r)
    pasted = rows @ logits.to(boxes.dtype) @ columns.transpose(1, 2)  # (M, h, w)
    inside = (rows.sum(2)[:, :, None] * columns.sum(2)[:, None]) > 0
    return torch.where(inside, pasted, outside)


def _bilinear(start: Tensor, end: Tensor, length: int, stride: int, size: int) -> Tensor:
    """Weights (M, n, size) of a map's cells at the grid's pixels along one axis; 0 outside of the box."""
    pixel = torch.arange(stride // 2, length, stride, device=start.device) + 0.5  # (n,) the pixel's middle
    extent = (end - start).clamp(min=1e-6)  # (M,)
    place = (pixel - start[:, None]) / extent[:, None] * size - 0.5  # (M, n) in cells of the map
    inside = (pixel >= start[:, None]) & (pixel <= end[:, None])
    nearest = torch.arange(size, device=start.device)
    weights = (1 - (place.clamp(0, size - 1)[..., None] - nearest).abs()).clamp(min=0)  # (M, n, size)
    return weights * inside[..., None]
