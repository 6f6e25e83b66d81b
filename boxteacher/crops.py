"""Square crops round boxes: maps of any stride are sampled into them, and masks are pasted back from them.

A crop has `CROP_SIZE` cells on each side and covers `CROP_CONTEXT` times its box, so that work and memory do
not depend on the size of an object. Coordinates are continuous: the pixel in row r covers r … r + 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, roi_align

from boxteacher.precision import full_precision

CROP_SIZE = 64
CROP_CONTEXT = 1.5
_FIRST_IN_BOX = math.ceil(CROP_SIZE * (1 - 1 / CROP_CONTEXT) / 2 - 0.5)  # cell on either axis


def crop_boxes(boxes: Tensor) -> Tensor:
    """The areas (N, 4) in pixels that the crops of boxes (N, 4) cover; a box counts as one pixel at least."""
    center_size = box_convert(boxes.float(), "xyxy", "cxcywh")  # (N, 4)
    center, size = center_size.split(2, dim=1)
    return box_convert(torch.cat([center, size.clamp(min=1) * CROP_CONTEXT], 1), "cxcywh", "xyxy")


def crop_images(images: Sequence[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
    """Colors round boxes (N, 4) of images (3, H_i, W_i): (N, 3, S, S), 0 outside the image."""
    areas = crop_boxes(boxes)
    crops = boxes.new_zeros(len(boxes), 3, CROP_SIZE, CROP_SIZE, dtype=torch.float32)
    for i, image in enumerate(images):
        mine = (image_index == i).nonzero()[:, 0]
        crops[mine] = roi_align(image[None].float(), [areas[mine]], CROP_SIZE, aligned=True)
    return crops


def crop_masks(masks: Tensor, boxes: Tensor, stride: int = 1) -> Tensor:
    """Values of masks (N, h, w) round their boxes (N, 4): (N, S, S), 0 outside the grid.

    Args:
        masks: float, on a mask grid, or at an image's pixels.
        boxes: in pixels.
        stride: pixels per cell of the grid; cell i stands for pixel i · stride + stride // 2.
    """
    # The middle of cell i is that of its pixel here, and (i + ½) · stride to roi_align.
    areas = crop_boxes(boxes) - (stride // 2 + 0.5 - stride / 2)
    regions = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None], areas], 1)  # (N, 5)
    return roi_align(masks[:, None].float(), regions, CROP_SIZE, 1 / stride, aligned=True)[:, 0]


def cells_in_box(device: torch.device) -> Tensor:
    """Cells (S, S) bool of any crop whose middles lie in its box."""
    inside = (cell_places(device) - 0.5).abs() * CROP_CONTEXT < 0.5  # (S,)
    return inside[:, None] & inside


def cells_in_image(boxes: Tensor, size: Tensor) -> Tensor:
    """Cells (N, S, S) bool of the crops of boxes (N, 4) that lie in images of height and width (N, 2)."""
    x0, y0, x1, y1 = crop_boxes(boxes)[:, :, None].unbind(1)  # (N, 1) each
    place = cell_places(boxes.device)  # (S,)
    x, y = x0 + (x1 - x0) * place, y0 + (y1 - y0) * place  # (N, S) each
    rows, columns = (y > 0) & (y < size[:, :1]), (x > 0) & (x < size[:, 1:])
    return rows[:, :, None] & columns[:, None, :]


def cell_places(device: torch.device) -> Tensor:
    """Middles (S,) of a crop's cells on either axis, in (0, 1)."""
    return (torch.arange(CROP_SIZE, device=device) + 0.5) / CROP_SIZE


def paste_crops(crops: Tensor, boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Crops' values, bilinear, at pixels of a grid: (N, h, w), 0 outside the box.

    The values of the outermost cells in the box are repeated to its sides.

    Args:
        crops: (N, S, S).
        boxes: (N, 4) in pixels.
        rows: (h,) pixel row of each row of the grid.
        columns: (w,) pixel column of each column.
    """
    x0, y0, x1, y1 = boxes.float()[:, :, None].unbind(1)  # (N, 1) each
    down = _interpolation(rows + 0.5, y0, y1)  # (N, h, S)
    across = _interpolation(columns + 0.5, x0, x1)  # (N, w, S)
    with full_precision(crops.device):
        return torch.bmm(torch.bmm(down, crops), across.transpose(1, 2))


def _interpolation(middle: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Linear weights (N, n, S) of a crop's cells at places (n,), 0 for places outside the box.

    Args:
        middle: of the pixels, (n,).
        start: of the box, (N, 1).
        end: of the box, (N, 1).
    """
    size = (end - start).clamp(min=1) * CROP_CONTEXT  # (N, 1)
    place = ((middle - (start + end) / 2) / size + 0.5) * CROP_SIZE - 0.5  # (N, n) in cells
    place = place.clamp(_FIRST_IN_BOX, CROP_SIZE - 1 - _FIRST_IN_BOX)
    weights = 1 - (place[:, :, None] - torch.arange(CROP_SIZE, device=middle.device)).abs()
    inside = (middle > start.floor()) & (middle < end.ceil())  # (N, n), pixels that the box overlaps
    return weights.clamp(min=0) * inside[:, :, None]
