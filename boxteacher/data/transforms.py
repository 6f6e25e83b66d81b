"""Resizing and flipping that move an image, its boxes and its masks together."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class ResizeLongestSide(nn.Module):
    """Scale an image and its target so that the longest side is a random whole number of pixels.

    The aspect ratio stays, up to rounding each side to at least 1. A plain module rather than a
    `v2.Transform`, whose hooks were renamed between the releases of torchvision that are supported.

    Args:
        low: the smallest longest side in pixels, at least 1.
        high: the greatest, inclusive; equal to `low` for a fixed size.

    Raises:
        ValueError: not 1 <= low <= high.
    """

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        if not 1 <= low <= high:
            raise ValueError(f"low={low}, high={high}: the longest side needs 1 <= low <= high")
        self.low = low
        self.high = high

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize a float image (3, H, W) in [0, 1] and each `BoundingBoxes` and `Mask` in its target."""
        height, width = image.shape[-2:]
        # torch's generator, so that the seeds of DataLoader workers govern the draw.
        scale = int(torch.randint(self.low, self.high + 1, ())) / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        # clamp: interpolation weights may add up to a rounding error more than one.
        resized = F.resize(image, size, antialias=True).clamp(0, 1)
        return tv_tensors.Image(resized), {key: _resize_entry(entry, size) for key, entry in target.items()}


def _resize_entry(entry: Any, size: list[int]) -> Any:
    if isinstance(entry, tv_tensors.BoundingBoxes):
        return F.clamp_bounding_boxes(F.resize(entry, size))
    if isinstance(entry, tv_tensors.Mask):
        # As an image, because torchvision resizes a Mask with the older "nearest", which lies up to half a
        # pixel off the grid of the bilinear image.
        plain = entry.as_subclass(Tensor)
        exact = F.resize(plain, size, interpolation=v2.InterpolationMode.NEAREST_EXACT, antialias=False)
        return tv_tensors.Mask(exact)
    return entry


def training_transform(image_size: int) -> v2.Transform:
    """Longest side drawn from 0.8 `image_size` to `image_size` pixels, flipped left-right half the time."""
    return v2.Compose(
        [ResizeLongestSide(max(1, image_size * 4 // 5), image_size), v2.RandomHorizontalFlip(0.5)]
    )


def evaluation_transform(image_size: int) -> v2.Transform:
    """Longest side of `image_size` pixels, with nothing random."""
    return v2.Compose([ResizeLongestSide(image_size, image_size)])
