"""Resizing and flipping that move an image, its boxes and its masks together."""

from collections.abc import Sequence
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
        low: minimum of the longest side in pixels, at least 1.
        high: maximum, inclusive; equal to `low` for a fixed size.

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
        # torch's generator, so that the seeds of DataLoader workers govern the size.
        longest = int(torch.randint(self.low, self.high + 1, ()))
        return _resize(image, target, longest / max(image.shape[-2:]))


class ResizeShortestSide(nn.Module):
    """Scale an image and its target so that the shortest side is sampled from a list, as in COCO's schedules.

    Where that would make the longest side too long, the longest side is `longest`. For the rest as
    `ResizeLongestSide`; torchvision's `RandomShortestSize` would move masks by up to half a pixel.

    Args:
        sizes: lengths of the shortest side in pixels, at least 1 each.
        longest: maximum of the longest side in pixels, at least 1.

    Raises:
        ValueError: no sizes, or one of the numbers is less than 1.
    """

    def __init__(self, sizes: Sequence[int], longest: int) -> None:
        super().__init__()
        if not sizes or min(*sizes, longest) < 1:
            raise ValueError(f"sizes={tuple(sizes)}, longest={longest}: give sizes of at least 1 pixel")
        self.sizes = tuple(sizes)
        self.longest = longest

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize a float image (3, H, W) in [0, 1] and each `BoundingBoxes` and `Mask` in its target."""
        shortest = self.sizes[int(torch.randint(len(self.sizes), ()))]
        scale = min(shortest / min(image.shape[-2:]), self.longest / max(image.shape[-2:]))
        return _resize(image, target, scale)


def _resize(image: Tensor, target: dict[str, Any], scale: float) -> tuple[Tensor, dict[str, Any]]:
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
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


def training_transform(image_size: int, shortest_side: Sequence[int] = ()) -> v2.Transform:
    """An image of a random size, flipped left-right half the time.

    Args:
        image_size: maximum of the longest side in pixels, which is sampled from 0.8 of that upwards.
        shortest_side: lengths that the shortest side is sampled from instead, if any are given; the longest
            is still at most `image_size`.
    """
    resize = (
        ResizeShortestSide(shortest_side, image_size)
        if shortest_side
        else ResizeLongestSide(max(1, image_size * 4 // 5), image_size)
    )
    return v2.Compose([resize, v2.RandomHorizontalFlip(0.5)])


def evaluation_transform(image_size: int, shortest_side: int | None = None) -> v2.Transform:
    """An image of a fixed size: its longest side `image_size` pixels.

    With `shortest_side`, its shortest side that many pixels, or fewer where the longest would be longer than
    `image_size`.
    """
    if shortest_side is not None:
        return v2.Compose([ResizeShortestSide([shortest_side], image_size)])
    return v2.Compose([ResizeLongestSide(image_size, image_size)])
