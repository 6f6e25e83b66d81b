"""Boxes, colors and annotated masks on the mask grid: what the losses compare a predicted mask with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.grid import MaskGrid, neighbor_offsets, shifted
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
        masks: (T, h, w) bool, or in [0, 1] if a target has such masks; 0 where there is none.
        mask_confidence: (T,) in [0, 1], 1 for annotated masks, 0 where there is none.
        valid: (B, h, w) bool, cells inside the image without its ignored bottom rows and boxes.
        ignored: (B, h, w) bool, cells in the images' ignore boxes; None if there are none.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    extents: Tensor
    box_masks: Tensor
    masks: Tensor
    mask_confidence: Tensor
    valid: Tensor
    ignored: Tensor | None = None


def grid_targets(images: Sequence[Tensor], targets: Sequence[Target], grid: MaskGrid) -> GridTargets:
    """Lays a batch's targets end to end on its mask grid.

    Args:
        images: (3, H_i, W_i) each; only their sizes count.
        targets: one per image.
        grid: of the batch.
    """
    boxes, labels, image_index = flat_targets(targets)
    rows, columns = grid.coordinates(boxes.device)
    masks, mask_confidence = _own_masks(targets, grid)
    bottom_rows = [target.get("ignored_bottom_rows", 0) for target in targets]
    valid = cells_inside(images, grid, bottom_rows)  # (B, h, w)
    ignored = None
    if any(len(target.get("ignore_boxes", ())) for target in targets):
        regions = [target.get("ignore_boxes", boxes[:0]) for target in targets]
        ignored = torch.stack([box_masks(each, rows, columns).any(0) for each in regions])  # (B, h, w)
        valid = valid & ~ignored
    return GridTargets(
        boxes=boxes,
        labels=labels,
        image_index=image_index,
        extents=box_extents(boxes, rows, columns),
        box_masks=box_masks(boxes, rows, columns),
        masks=masks,
        mask_confidence=mask_confidence,
        valid=valid,
        ignored=ignored,
    )


def flat_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (T, 4), labels (T,) and image index (T,) int64 of a batch's targets laid end to end."""
    boxes = torch.cat([target["boxes"] for target in targets])  # (T, 4)
    labels = torch.cat([target["labels"] for target in targets])  # (T,)
    image_index = torch.cat(
        [torch.full((len(target["boxes"]),), i, device=boxes.device) for i, target in enumerate(targets)]
    )  # (T,)
    return boxes, labels, image_index


def box_extents(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The cells of each box: those whose pixel the box touches.

    Args:
        boxes: (T, 4) `x0, y0, x1, y1` in pixels.
        rows: (h,) pixel row of each grid row.
        columns: (w,) pixel column of each grid column.

    Returns:
        (T, 4) int64, first row, first column, end row, end column, the ends exclusive; first and end are
        equal for a box that lies between two rows, or columns, of the grid's pixels.
    """
    x0, y0, x1, y1 = boxes.floor().unsqueeze(-1).unbind(1)  # (T, 1) each
    first = torch.stack([(rows < y0).sum(1), (columns < x0).sum(1)], 1)  # (T, 2)
    end = torch.stack([(rows <= y1).sum(1), (columns <= x1).sum(1)], 1)  # (T, 2)
    return torch.cat([first, end.maximum(first)], 1)


def box_masks(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cells that lie in each box, (T, h, w) bool; arguments as for `box_extents`."""
    extents = box_extents(boxes, rows, columns)
    top, left, bottom, right = extents.unsqueeze(-1).unbind(1)  # (T, 1) each
    row = torch.arange(len(rows), device=rows.device)  # (h,)
    column = torch.arange(len(columns), device=columns.device)  # (w,)
    inside_rows = (row >= top) & (row < bottom)  # (T, h)
    inside_columns = (column >= left) & (column < right)  # (T, w)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def cells_inside(
    images: Sequence[Tensor], grid: MaskGrid, ignored_bottom_rows: Sequence[int] | None = None
) -> Tensor:
    """Cells of the grid that lie in each image, not in its padding or its ignored rows: (B, h, w) bool."""
    rows, columns = grid.coordinates(images[0].device)
    ignored_bottom_rows = [0] * len(images) if ignored_bottom_rows is None else ignored_bottom_rows
    return torch.stack(
        [
            (rows < image.shape[-2] - ignored)[:, None] & (columns < image.shape[-1])
            for image, ignored in zip(images, ignored_bottom_rows, strict=True)
        ]
    )


def may_lack_masks(targets: Sequence[Target]) -> bool:
    """Whether a target may have no mask of its own; it says no only where that costs no synchronization."""
    for target in targets:
        if len(target["boxes"]) == 0:
            continue
        flags = [target[key] for key in ("has_mask", "mask_confidence") if key in target]  # (N,) each
        if "masks" not in target or not all(each.device.type == "cpu" and (each > 0).all() for each in flags):
            return True
    return False


def _own_masks(targets: Sequence[Target], grid: MaskGrid) -> tuple[Tensor, Tensor]:
    """The targets' masks on the grid (T, h, w), and their confidence (T,); 0 where there is none."""
    masks, confidences = [], []
    for target in targets:
        boxes = target["boxes"]  # (N, 4)
        if "masks" in target:
            confidence = target.get("mask_confidence", torch.ones(len(boxes), device=boxes.device))  # (N,)
            has_mask = target.get("has_mask", torch.ones_like(confidence, dtype=torch.bool))  # (N,)
            confidence = torch.where(has_mask, confidence, 0.0)
            sampled = grid.sample(target["masks"])  # (N, h, w)
            sampled = sampled if sampled.is_floating_point() else sampled.bool()
            masks.append(sampled.masked_fill((confidence == 0)[:, None, None], 0))
            confidences.append(confidence)
        else:
            masks.append(torch.zeros(len(boxes), *grid.shape, dtype=torch.bool, device=boxes.device))
            confidences.append(torch.zeros(len(boxes), device=boxes.device))
    return torch.cat(masks), torch.cat(confidences)


def color_similarity(images: Sequence[Tensor], valid: Tensor, grid: MaskGrid) -> Tensor:
    """Similarity of each cell's color to its neighbors': exp(−½ ‖ΔLab‖) (BoxInst, CVPR 2021, Eq. 5).

    The images are average-pooled to the grid and rounded down to bytes before they are taken to CIE Lab.

    Args:
        images: (3, H_i, W_i) each, RGB in [0, 1].
        valid: (B, h, w) bool; a neighbor that is not valid, or outside, has similarity 0.
        grid: of the batch.

    Returns:
        (B, 8, h, w) in [0, 1], neighbors in row-major order without the center.
    """
    with full_precision(valid.device):
        batch = grid.pad(images)  # (B, 3, H, W)
        pooled = F.avg_pool2d(batch.float() * 255, grid.stride).floor()  # (B, 3, h, w)
        lab = rgb_to_lab(pooled / 255)  # (B, 3, h, w)
    valid_float = valid.float()
    similarities = []
    for offset in neighbor_offsets():
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
