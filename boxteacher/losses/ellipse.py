"""Ellipse loss: what a mask is before colors and teacher have said more, a filled ellipse."""

import torch
from torch import Tensor

from boxteacher.grid import MaskGrid
from boxteacher.losses.dice import dice_loss


def ellipse_loss(mask_logits: Tensor, boxes: Tensor, grid: MaskGrid) -> Tensor:
    """Dice between a mask and the ellipse inscribed in its box.

    An outline has the projections of a filled mask, and no neighbors of similar color within its edge, so the
    losses of boxes and colors do not tell the two apart. Masks that begin filled stay filled.

    Args:
        mask_logits: (M, h, w).
        boxes: (M, 4) in pixels, of each mask's target.
        grid: mask grid of the batch.

    Returns:
        (M,) in [0, 1].
    """
    x0, y0, x1, y1 = boxes.float()[:, :, None].unbind(1)  # (M, 1) each
    rows, columns = grid.coordinates(boxes.device)
    across = (columns + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)  # (M, w), −1 … 1 inside the box
    down = (rows + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)  # (M, h)
    ellipses = across.square()[:, None] + down.square()[:, :, None] <= 1  # (M, h, w)
    return dice_loss(mask_logits.float().sigmoid(), ellipses.to(torch.float32))
