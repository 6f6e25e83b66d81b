"""The neighbours of a grid cell: which they are, and how to line them up with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

Offset = tuple[int, int]
"""Rows down and columns right from a cell to its neighbour."""


def neighbour_offsets(kernel_size: int = 3, dilation: int = 2) -> list[Offset]:
    """Offsets of a window's cells in row-major order without the centre.

    Offset k and offset −1 − k are opposite, so the first half names every unordered pair once.
    """
    reach = kernel_size // 2
    steps = [dilation * step for step in range(-reach, reach + 1)]
    return [(down, right) for down in steps for right in steps if (down, right) != (0, 0)]


def shifted(grid: Tensor, offset: Offset) -> Tensor:
    """The value (…, h, w) of each cell's neighbour at `offset`; 0 where that lies outside."""
    down, right = offset
    if abs(down) >= grid.shape[-2] or abs(right) >= grid.shape[-1]:
        return torch.zeros_like(grid)
    return F.pad(grid, (-right, right, -down, down))


def pair_slices(offset: Offset) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Two windows of a grid whose cells, taken together in order, are all pairs (cell, cell at `offset`)."""
    return (
        (_slice(-offset[0]), _slice(-offset[1])),
        (_slice(offset[0]), _slice(offset[1])),
    )


def _slice(step: int) -> slice:
    return slice(step, None) if step >= 0 else slice(None, step)
