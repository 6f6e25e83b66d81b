"""Masks drawn in boxes, laid onto the mask grid."""

import torch
from torch import Tensor

OUTSIDE = -10.0
"""Mask logit of the cells that a pasted mask does not reach."""


def paste_on_grid(
    logits: Tensor, boxes: Tensor, reach: Tensor, canvas: tuple[int, int], stride: int
) -> Tensor:
    """Bilinear pasting of box-aligned logits, differentiable in `logits`.

    A box's sides are the outer sides of its map; the outermost values go on from half a cell before them to
    the end of `reach`. Grid cells whose pixel lies beyond that are `OUTSIDE`.

    Args:
        logits: (M, r, r) that fill the boxes.
        boxes: (M, 4) `x0, y0, x1, y1` in pixels.
        reach: (M, 4) in pixels, round the boxes or the same.
        canvas: height and width in pixels, multiples of `stride`.
        stride: of the mask grid; cell (i, j) stands for the pixel (i · stride + stride // 2, …).

    Returns:
        (M, h, w) on the mask grid.
    """
    size = logits.shape[-1]
    rows = _bilinear(boxes[:, 1::2], reach[:, 1::2], canvas[0], stride, size)  # (M, h, r)
    columns = _bilinear(boxes[:, 0::2], reach[:, 0::2], canvas[1], stride, size)  # (M, w, r)
    pasted = rows @ logits.to(boxes.dtype) @ columns.transpose(1, 2)  # (M, h, w)
    inside = (rows.sum(2)[:, :, None] * columns.sum(2)[:, None]) > 0
    return torch.where(inside, pasted, OUTSIDE)


def _bilinear(span: Tensor, reach: Tensor, length: int, stride: int, size: int) -> Tensor:
    """Weights (M, n, size) of a map's cells at the grid's pixels along one axis; 0 beyond `reach`.

    Args:
        span: (M, 2) start and end of the map in pixels.
        reach: (M, 2) likewise.
        length: of the canvas in pixels.
        stride: of the mask grid.
        size: of the map in cells.
    """
    pixel = torch.arange(stride // 2, length, stride, device=span.device) + 0.5  # (n,) the pixel's middle
    start, end = span.split(1, 1)  # (M, 1) each
    place = (pixel - start) / (end - start).clamp(min=1e-6) * size - 0.5  # (M, n) in cells of the map
    inside = (pixel >= reach[:, :1]) & (pixel <= reach[:, 1:])  # (M, n)
    nearest = torch.arange(size, device=span.device)
    weights = (1 - (place.clamp(0, size - 1)[..., None] - nearest).abs()).clamp(min=0)  # (M, n, size)
    return weights * inside[..., None]
