"""Boxes, colours and drawn masks on the mask grid: what the losses compare a predicted mask with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.geometry import canvas_size, grid_coordinates, pad_images
from boxteacher.neighbours import neighbour_offsets, shifted
from boxteacher.precision import full_precision
from boxteacher.protocol import Target


@dataclass(frozen=True)
class GridTargets:
    """The targets of a batch, laid end to end, on the mask grid (h, w).

    Attributes:
        boxes: (T, 4) in pixels.
        labels: (T,) int64.
        image_index: (T,) int64.
        extents: (T, 4) int64, the cells of `box_masks`: first row, first column, end row, end column, the
            ends exclusive.
        box_masks: (T, h, w) bool, inside of the box.
        masks: (T, h, w) bool, masks that were drawn; empty where none was.
        has_mask: (T,) bool, whether there is one.
        inside: (B, h, w) bool, cells that lie in the image, not in its padding.
        valid: (B, h, w) bool, cells inside but for the image's ignored bottom rows.
        most_boxes: the number of boxes of the image that has most.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    extents: Tensor
    box_masks: Tensor
    masks: Tensor
    has_mask: Tensor
    inside: Tensor
    valid: Tensor
    most_boxes: int


def grid_targets(
    images: Sequence[Tensor], targets: Sequence[Target], mask_stride: int, size_divisor: int
) -> GridTargets:
    """Lays a batch's targets end to end on its mask grid.

    Args:
        images: (3, H_i, W_i) each; only their sizes count.
        targets: one per image.
        mask_stride: pixels per grid cell.
        size_divisor: the canvas's sides are multiples of this.
    """
    device = images[0].device
    height, width = canvas_size(images, size_divisor)
    counts = [len(target["boxes"]) for target in targets]
    boxes = torch.cat([target["boxes"] for target in targets])  # (T, 4)
    labels = torch.cat([target["labels"] for target in targets])  # (T,)
    image_index = torch.cat(
        [torch.full((count,), i, device=device) for i, count in enumerate(counts)]
    )  # (T,)
    rows, columns = grid_coordinates(height, width, mask_stride, device)
    ignored = [target.get("ignored_bottom_rows", 0) for target in targets]
    masks, has_mask = _drawn_masks(images, targets, mask_stride, (len(rows), len(columns)))
    return GridTargets(
        boxes=boxes,
        labels=labels,
        image_index=image_index,
        extents=box_extents(boxes, rows, columns),
        box_masks=box_masks(boxes, rows, columns),
        masks=masks,
        has_mask=has_mask,
        inside=_cells_inside(images, [0] * len(images), rows, columns),
        valid=_cells_inside(images, ignored, rows, columns),
        most_boxes=max(counts),
    )


def box_extents(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The cells of each box: those whose pixel is one that the box touches.

    Args:
        boxes: (T, 4) `x0, y0, x1, y1` in pixels.
        rows: (h,) pixel row of each grid row.
        columns: (w,) pixel column of each grid column.

    Returns:
        (T, 4) int64, first row, first column, end row, end column, the ends exclusive; both alike for a box
        that lies between the rows, or columns, of pixels.
    """
    x0, y0, x1, y1 = boxes.floor().unsqueeze(-1).unbind(1)  # (T, 1) each
    first = torch.stack([(rows < y0).sum(1), (columns < x0).sum(1)], 1)  # (T, 2)
    end = torch.stack([(rows <= y1).sum(1), (columns <= x1).sum(1)], 1)  # (T, 2)
    return torch.cat([first, end.maximum(first)], 1)


def box_masks(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Which cells lie in each box, (T, h, w) bool; arguments as for `box_extents`."""
    extents = box_extents(boxes, rows, columns)
    top, left, bottom, right = extents.unsqueeze(-1).unbind(1)  # (T, 1) each
    row = torch.arange(len(rows), device=rows.device)  # (h,)
    column = torch.arange(len(columns), device=columns.device)  # (w,)
    inside_rows = (row >= top) & (row < bottom)  # (T, h)
    inside_columns = (column >= left) & (column < right)  # (T, w)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def _cells_inside(
    images: Sequence[Tensor], ignored_bottom_rows: Sequence[int], rows: Tensor, columns: Tensor
) -> Tensor:
    return torch.stack(
        [
            (rows < image.shape[-2] - ignored)[:, None] & (columns < image.shape[-1])
            for image, ignored in zip(images, ignored_bottom_rows, strict=True)
        ]
    )  # (B, h, w)


def _drawn_masks(
    images: Sequence[Tensor], targets: Sequence[Target], stride: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Drawn masks sampled on the grid (T, h, w) bool, and which targets have one (T,) bool."""
    masks, has_mask = [], []
    for image, target in zip(images, targets, strict=True):
        count = len(target["boxes"])
        on_grid = torch.zeros(count, *grid, dtype=torch.bool, device=image.device)  # (N, h, w)
        drawn = torch.zeros(count, dtype=torch.bool, device=image.device)  # (N,)
        if "masks" in target:
            sampled = target["masks"][:, stride // 2 :: stride, stride // 2 :: stride]
            on_grid[:, : sampled.shape[1], : sampled.shape[2]] = sampled.bool()
            drawn = target["has_mask"] if "has_mask" in target else torch.ones_like(drawn)
        masks.append(on_grid)
        has_mask.append(drawn)
    return torch.cat(masks), torch.cat(has_mask)


def color_similarity(
    images: Sequence[Tensor],
    valid: Tensor,
    mask_stride: int,
    size_divisor: int,
    kernel_size: int = 3,
    dilation: int = 2,
) -> Tensor:
    """How alike each cell's colour is to its neighbours': exp(−½ ‖ΔLab‖) (BoxInst, CVPR 2021, Eq. 5).

    The images are average-pooled to the grid and rounded down to bytes before they are taken to CIE Lab.

    Args:
        images: (3, H_i, W_i) each, RGB in [0, 1].
        valid: (B, h, w) bool; a neighbour that is not valid, or outside, has similarity 0.
        mask_stride: pixels per grid cell.
        size_divisor: the canvas's sides are multiples of this.
        kernel_size: side of the window of neighbours, odd.
        dilation: cells between neighbours in the window.

    Returns:
        (B, kernel_size² − 1, h, w) in [0, 1], neighbours in row-major order without the centre.
    """
    with full_precision(valid.device):
        canvas = pad_images(images, size_divisor)  # (B, 3, H, W)
        pooled = F.avg_pool2d(canvas.float() * 255, mask_stride).floor()  # (B, 3, h, w)
        lab = rgb_to_lab(pooled / 255)  # (B, 3, h, w)
    valid_float = valid.float()
    similarities = []
    for offset in neighbour_offsets(kernel_size, dilation):
        difference = (lab - shifted(lab, offset)).square().sum(1).sqrt()  # (B, h, w)
        similarities.append(torch.exp(-0.5 * difference) * shifted(valid_float, offset))
    return torch.stack(similarities, 1)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1], (B, 3, H, W), to CIE Lab under D65 (IEC 61966-2-1, CIE 15): L in [0, 100]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(1)
    xyz = torch.stack([r * red + g * green + b * blue for r, g, b in _RGB_TO_XYZ_OVER_WHITE], 1)
    compressed = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = compressed.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


_RGB_TO_XYZ_OVER_WHITE = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
