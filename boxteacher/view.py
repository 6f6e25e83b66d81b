"""The teacher's images: those of the batch, or resized, and the way back for boxes and masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.errors import InputError
from boxteacher.grid import MaskGrid, mask_grid, upsample_aligned
from boxteacher.validation import check_whole


class TeacherView:
    """The images of a batch at the teacher's scale.

    Args:
        images: (3, H_i, W_i) each, the student's.
        size: shortest side and maximum longest side in pixels; None leaves the images as they are.

    Attributes:
        images: (3, H'_i, W'_i) each, for the teacher.
    """

    def __init__(self, images: Sequence[Tensor], size: tuple[int, int] | None) -> None:
        self.images = list(images) if size is None else [_resized(image, *size) for image in images]
        self._originals = list(images)
        self._is_resized = size is not None

    def boxes_of_images(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Boxes (K, 4) in pixels of the teacher's images (K,) as boxes in pixels of the student's."""
        return boxes * self._scale()[image_index] if self._is_resized else boxes

    def boxes_of_view(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Boxes (K, 4) in pixels of the student's images (K,) as boxes in pixels of the teacher's."""
        return boxes / self._scale()[image_index] if self._is_resized else boxes

    def _scale(self) -> Tensor:
        """Student's pixels per teacher's pixel (B, 4), of x, y, x, y."""
        return (_sizes(self._originals) / _sizes(self.images)).flip(1).repeat(1, 2)

    def mask_grid(self, mask_stride: int, size_divisor: int) -> MaskGrid:
        """The mask grid of the teacher's images."""
        return mask_grid(self.images, mask_stride, size_divisor)

    def masks_at_pixels(
        self, probabilities: Tensor, image_index: Tensor, mask_stride: int, padded_size: tuple[int, int]
    ) -> Tensor:
        """Masks at every pixel of the student's padded batch; 0 outside their image.

        Args:
            probabilities: (P, h', w') in [0, 1] on the mask grid of the teacher's images.
            image_index: (P,) int64.
            mask_stride: pixels per cell of that grid.
            padded_size: height and width in pixels of the student's padded batch.

        Returns:
            (P, H, W) in [0, 1].
        """
        pixels = upsample_aligned(probabilities[:, None], mask_stride)[:, 0]  # (P, H', W')
        height, width = padded_size
        row = torch.arange(height, device=pixels.device)
        column = torch.arange(width, device=pixels.device)
        sizes = _sizes(self._originals)[image_index]  # (P, 2)
        inside = (row < sizes[:, :1])[:, :, None] & (column < sizes[:, 1:])[:, None, :]  # (P, H, W)
        if not self._is_resized:
            more_rows, more_columns = height - pixels.shape[1], width - pixels.shape[2]
            return F.pad(pixels, (0, more_columns, 0, more_rows)) * inside
        scaled = _sizes(self.images)[image_index]  # (P, 2)
        top, down = _cell_and_weight(row, sizes[:, 0], scaled[:, 0])  # (P, H) each
        left, right = _cell_and_weight(column, sizes[:, 1], scaled[:, 1])  # (P, W) each
        mask = torch.arange(len(pixels), device=pixels.device)[:, None]  # (P, 1)
        below = (top + 1).clamp(max=pixels.shape[1] - 1)
        beside = (left + 1).clamp(max=pixels.shape[2] - 1)
        rows = pixels[mask, top].lerp_(pixels[mask, below], down[:, :, None])  # (P, H, W')
        left, beside = (each[:, None].expand(-1, height, -1) for each in (left, beside))
        return rows.gather(2, left).lerp_(rows.gather(2, beside), right[:, None]) * inside


def _sizes(images: Sequence[Tensor]) -> Tensor:
    """Heights and widths (B, 2)."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    return sizes.to(images[0].device, non_blocking=True)


def _cell_and_weight(pixel: Tensor, size: Tensor, view_size: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's pixel at or before each of the student's, and the weight of the one after it, in [0, 1).

    Where nothing is resized the weights are exactly 0. `grid_sample`, whose coordinates are fractions of the
    map's size, rounds them, and so moves probabilities across the threshold of a mask.

    Args:
        pixel: (N,) of the student's images, on one axis.
        size: (P,) of the student's images.
        view_size: (P,) of the teacher's images, whose outermost pixels stand for all beyond them.

    Returns:
        (P, N) int64 and (P, N).
    """
    position = (pixel + 0.5) * (view_size / size)[:, None] - 0.5  # (P, N) in the teacher's pixels
    position = position.clamp(min=0).minimum(view_size[:, None] - 1)
    cell = position.floor()
    return cell.long(), position - cell


def check_image_size(size: object) -> None:
    """Raises InputError unless `size` is None or a shortest and a longest side in pixels."""
    if size is None:
        return
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise InputError(f"image_size is {size!r}: give the shortest and the longest side in pixels")
    for pixels in size:
        check_whole("image_size", pixels, minimum=1)
    if size[0] > size[1]:
        raise InputError(f"image_size is {size!r}: give the shortest side first")


def _resized(image: Tensor, shortest: int, longest: int) -> Tensor:
    height, width = image.shape[-2:]
    scale = shortest / min(height, width)
    if scale * max(height, width) > longest:
        scale = longest / max(height, width)
    size = [max(1, int(side * scale + 0.5)) for side in (height, width)]
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
