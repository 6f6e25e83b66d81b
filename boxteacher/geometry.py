"""The canvas that a batch of images is padded to, and the mask grid on it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def canvas_size(images: Sequence[Tensor], size_divisor: int) -> tuple[int, int]:
    """Height and width, multiples of `size_divisor`, of the smallest canvas that holds every image."""
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    return -(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor


def pad_images(images: Sequence[Tensor], size_divisor: int) -> Tensor:
    """Images (C, H_i, W_i), each padded with zeros at the right and bottom, as one batch (B, C, H, W)."""
    height, width = canvas_size(images, size_divisor)
    return torch.stack(
        [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    )


def grid_coordinates(height: int, width: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel coordinates of the grid's rows (h,) and columns (w,): `stride // 2`, then every `stride`."""
    rows = torch.arange(stride // 2, height, stride, device=device)  # (h,)
    columns = torch.arange(stride // 2, width, stride, device=device)  # (w,)
    return rows, columns
