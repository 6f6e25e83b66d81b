"""Images and targets of a `DataIndex`, as tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from boxteacher.data.images import read_image
from boxteacher.data.index import DataIndex
from boxteacher.data.masks import decode_masks
from boxteacher.errors import InputError


class InstanceDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """The images of an index with their objects, crowds left out.

    An item is the image, float32 (3, H, W) RGB in [0, 1], and a dict of `boxes` float32 (N, 4) as x0, y0,
    x1, y1 in pixels of that image, `labels` int64 (N,) in 0 … C−1, `annotation_ids` int64 (N,), `image_id`,
    and `ignored_bottom_rows` in rows of that image. If the index has masks, there are `masks` bool (N, H, W)
    too, `has_mask` bool (N,) in images where only some objects have one, and `mask_confidence` float32 (N,)
    if the index has it. All tensors are plain ones.

    Args:
        index: images and objects of the data set.
        transform: function of a `tv_tensors.Image` and its dict of `boxes`, `labels` and so on that returns
            both.
        ignored_bottom_rows: number of rows at the bottom of each image that do not show the scene,
            such as a caption.

    Raises:
        InputError: `ignored_bottom_rows` is negative, or as large as the height of an image.
    """

    def __init__(
        self,
        index: DataIndex,
        *,
        transform: Callable[[Any, dict[str, Any]], tuple[Tensor, dict[str, Any]]] | None = None,
        ignored_bottom_rows: int = 0,
    ) -> None:
        shortest = int(index.sizes[:, 0].argmin())
        height = int(index.sizes[shortest, 0])
        if not 0 <= ignored_bottom_rows < height:
            raise InputError(
                f"{index.image_path(shortest)}: ignored_bottom_rows={ignored_bottom_rows} is not in "
                f"0..{height - 1}; change it"
            )
        self.index = index
        self.transform = transform
        self.ignored_bottom_rows = ignored_bottom_rows

    def __len__(self) -> int:
        """Number of images, those without boxes included."""
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, dict[str, Any]]:
        """Reads one image and its target."""
        index, i = self.index, range(len(self))[item]
        height, width = map(int, index.sizes[i])
        start, end = index.starts[i : i + 2]
        objects = start + np.flatnonzero(~index.crowd[start:end])  # (N,) positions among all M objects
        boxes = torch.from_numpy(index.boxes[objects])  # (N, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(index.labels[objects]),  # (N,)
            "annotation_ids": torch.from_numpy(index.annotation_ids[objects]),  # (N,)
        }
        if index.masks is not None:
            counts = [index.masks[k] for k in objects]
            has_mask = torch.tensor([each is not None for each in counts], dtype=torch.bool)  # (N,)
            masks = torch.zeros((len(counts), height, width), dtype=torch.bool)
            masks[has_mask] = decode_masks([each for each in counts if each is not None], height, width)
            target["masks"] = tv_tensors.Mask(masks)
            if not has_mask.all():
                target["has_mask"] = has_mask
            if index.mask_confidence is not None:
                target["mask_confidence"] = torch.from_numpy(index.mask_confidence[objects])  # (N,)
        image: Tensor = tv_tensors.Image(read_image(index.image_path(i), (height, width)))
        if self.transform is not None:
            image, target = self.transform(image, target)
        plain: dict[str, Any] = {key: value.as_subclass(Tensor) for key, value in target.items()}
        plain = _without_empty_boxes(plain)
        plain["image_id"] = int(index.image_ids[i])
        plain["ignored_bottom_rows"] = self.ignored_bottom_rows * image.shape[-2] // height
        return image.as_subclass(Tensor), plain


def _without_empty_boxes(target: dict[str, Tensor]) -> dict[str, Any]:
    """The target without boxes that a transform left no area, as rounding may with the smallest."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)  # (N,) each
    kept = (x1 > x0) & (y1 > y0)  # (N,)
    return target if kept.all() else {key: values[kept] for key, values in target.items()}


def collate(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Items of a batch as a list of images, which may differ in size, and a list of targets."""
    return [image for image, _ in batch], [target for _, target in batch]
