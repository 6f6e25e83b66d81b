"""Resizing and flipping of images together with their boxes and masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class ResizeLongestSide(nn.Module):
    """Resizes an image and its target to a longest side that is sampled uniformly.

    The aspect ratio is kept, up to rounding each side to at least 1. It is a plain module, because the hooks
    of `v2.Transform` were renamed between supported releases of torchvision.

    Args:
        low: minimum of the longest side in pixels, at least 1.
        high: maximum of the longest side, inclusive; equal to `low` for a fixed size.

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
        """Resizes a float image (3, H, W) in [0, 1] and each `BoundingBoxes` and `Mask` in its target."""
        # torch's generator, which the seeds of DataLoader workers set.
        longest = self.low
        if self.high > self.low:  # a fixed size leaves the generator as it is
            longest = int(torch.randint(self.low, self.high + 1, ()))
        return _resize(image, target, longest / max(image.shape[-2:]))


class ResizeShortestSide(nn.Module):
    """Resizes an image and its target to a shortest side that is sampled from a list, as in COCO's schedules.

    If the longest side would exceed `longest`, it becomes `longest` instead. torchvision's
    `RandomShortestSize` would shift masks by up to half a pixel.

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
        """Resizes a float image (3, H, W) in [0, 1] and each `BoundingBoxes` and `Mask` in its target."""
        shortest = self.sizes[0]
        if len(self.sizes) > 1:  # a fixed size leaves the generator as it is
            shortest = self.sizes[int(torch.randint(len(self.sizes), ()))]
        scale = min(shortest / min(image.shape[-2:]), self.longest / max(image.shape[-2:]))
        return _resize(image, target, scale)


def _resize(image: Tensor, target: dict[str, Any], scale: float) -> tuple[Tensor, dict[str, Any]]:
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    # clamp: the sum of interpolation weights may exceed 1 by a rounding error.
    resized = F.resize(image, size, antialias=True).clamp(0, 1)
    return tv_tensors.Image(resized), {key: _resize_entry(entry, size) for key, entry in target.items()}


def _resize_entry(entry: Any, size: list[int]) -> Any:
    if isinstance(entry, tv_tensors.BoundingBoxes):
        return F.clamp_bounding_boxes(F.resize(entry, size))
    if isinstance(entry, tv_tensors.Mask):
        # As an image, because torchvision resizes a Mask with the older "nearest", which shifts it by up to
        # half a pixel against the bilinear image.
        plain = entry.as_subclass(Tensor)
        exact = F.resize(plain, size, interpolation=v2.InterpolationMode.NEAREST_EXACT, antialias=False)
        return tv_tensors.Mask(exact)
    return entry


def training_transform(image_size: int, shortest_side: Sequence[int] = ()) -> v2.Transform:
    """The transform of training images: a random size, and a horizontal flip with probability ½.

    Args:
        image_size: maximum of the longest side in pixels, which is sampled from 80 % to 100 % of it.
        shortest_side: lengths that the shortest side is sampled from instead, if given; the longest side is
            still at most `image_size`.
    """
    resize = (
        ResizeShortestSide(shortest_side, image_size)
        if shortest_side
        else ResizeLongestSide(max(1, image_size * 4 // 5), image_size)
    )
    return v2.Compose([resize, v2.RandomHorizontalFlip(0.5)])


def evaluation_transform(image_size: int, shortest_side: int | None = None) -> v2.Transform:
    """The transform of images in evaluation: a fixed size.

    Args:
        image_size: length of the longest side in pixels, or its maximum if `shortest_side` is given.
        shortest_side: length of the shortest side in pixels.
    """
    if shortest_side is not None:
        return v2.Compose([ResizeShortestSide([shortest_side], image_size)])
    return v2.Compose([ResizeLongestSide(image_size, image_size)])
