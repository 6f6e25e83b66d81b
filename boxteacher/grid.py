"""The mask grid: where its cells lie on a padded batch, their neighbors, and maps enlarged onto it.

Images of a batch are padded at the right and bottom to a common size, whose sides are multiples of a
model's `size_divisor`. The mask grid lies on that padded batch at the model's `mask_stride`: cell (row,
column) stands for the pixel (row · stride + stride // 2, column · stride + stride // 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Offset = tuple[int, int]
"""Rows down and columns right from a cell to its neighbor."""

NEIGHBOR_DILATION = 2
"""Cells from a cell to the next neighbor on either axis (BoxInst, CVPR 2021, Sec. 3.2)."""


@dataclass(frozen=True)
class MaskGrid:
    """The mask grid of a batch.

    Attributes:
        stride: pixels per cell.
        height: h, in cells.
        width: w, in cells.
    """

    stride: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """h and w."""
        return self.height, self.width

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width in pixels of the padded batch."""
        return self.height * self.stride, self.width * self.stride

    def coordinates(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The pixel row (h,) of each row of cells, and the pixel column (w,) of each column, int64."""
        return grid_coordinates(*self.padded_size, self.stride, device)

    def pad(self, images: Sequence[Tensor]) -> Tensor:
        """Images (C, H_i, W_i), each padded with zeros at the right and bottom, as one batch (B, C, H, W)."""
        return _padded(images, *self.padded_size)

    def sample(self, masks: Tensor) -> Tensor:
        """Masks (N, H_i, W_i) of one image, at its pixels, on the grid (N, h, w); 0 in the padding."""
        sampled = masks[:, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]
        return F.pad(sampled, (0, self.width - sampled.shape[2], 0, self.height - sampled.shape[1]))


def mask_grid(images: Sequence[Tensor], mask_stride: int, size_divisor: int) -> MaskGrid:
    """The mask grid of images (3, H_i, W_i)."""
    height, width = padded_size(images, size_divisor)
    return MaskGrid(mask_stride, height // mask_stride, width // mask_stride)


def padded_size(images: Sequence[Tensor], size_divisor: int) -> tuple[int, int]:
    """The smallest height and width in pixels, multiples of `size_divisor`, that hold every image."""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    return -(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor


def pad_images(images: Sequence[Tensor], size_divisor: int) -> Tensor:
    """Images (C, H_i, W_i), each padded with zeros at the right and bottom, as one batch (B, C, H, W)."""
    return _padded(images, *padded_size(images, size_divisor))


def _padded(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    return torch.stack(
        [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    )


def grid_coordinates(height: int, width: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel coordinates of a grid's rows (h,) and columns (w,): `stride // 2`, then every `stride`.

    Args:
        height: of the padded batch in pixels.
        width: of the padded batch in pixels.
        stride: pixels per cell; it need not be that of the mask grid.
        device: of the result.
    """
    rows = torch.arange(stride // 2, height, stride, device=device)  # (h,)
    columns = torch.arange(stride // 2, width, stride, device=device)  # (w,)
    return rows, columns


def upsample_aligned(maps: Tensor, factor: int) -> Tensor:
    """Bilinear enlargement in which cell i of the input becomes cell `factor · i + factor // 2`.

    Beyond the outermost input cells their values are repeated. A cell that stands for the pixel in the middle
    of its square therefore still does when the factor is the grid's stride (CondInst, ECCV 2020).

    Args:
        maps: (N, C, h, w).
        factor: at least 1.

    Returns:
        (N, C, factor · h, factor · w).
    """
    if factor == 1:
        return maps
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, 1, 0, 1), mode="replicate")  # (N, C, h + 1, w + 1)
    size = (factor * height + 1, factor * width + 1)
    enlarged = F.interpolate(padded, size, mode="bilinear", align_corners=True)
    shift = factor // 2
    enlarged = F.pad(enlarged, (shift, 0, shift, 0), mode="replicate")
    return enlarged[..., : factor * height, : factor * width]


def neighbor_offsets() -> list[Offset]:
    """Offsets of the 8 neighbors in row-major order without the center.

    Offset k and offset −1 − k are opposite, so the last four name every unordered pair once.
    """
    steps = (-NEIGHBOR_DILATION, 0, NEIGHBOR_DILATION)
    return [(down, right) for down in steps for right in steps if (down, right) != (0, 0)]


def shifted(grid: Tensor, offset: Offset) -> Tensor:
    """The value (…, h, w) of each cell's neighbor at `offset`; 0 where that lies outside."""
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
