"""Instances from a COCO JSON file: checked once, up front, then served as tensors."""

import json
import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from boxteacher.data.images import check_images, decode_masks, encode_mask, read_image
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Target = dict[str, Any]
T = TypeVar("T")


class CocoInstances(Dataset[tuple[Tensor, Target]]):
    """The images of a COCO JSON file with their boxes, and with their masks only if asked.

    What is wrong with the file or its images is found at once, before any training. Crowds are left out,
    images without boxes kept, and boxes clipped to their image, or dropped with a warning if outside it.

    An item is the image, float32 (3, H, W) RGB in [0, 1], and a dict of `boxes` float32 (N, 4) as x0, y0,
    x1, y1 in pixels of that image, `labels` int64 (N,) in 0..C-1, `image_id`, `ignored_bottom_rows` in rows
    of that image, and with `read_masks` also `masks` bool (N, H, W). All tensors are plain ones.

    Attributes:
        category_ids: COCO category id of each label.
        class_names: name of each label.
        image_ids: COCO id of each image.
        file_names: name of each image, under the folder of images.
        sizes: (height, width) in pixels of each stored image.

    Args:
        images: folder of the image files.
        annotations: the COCO JSON file.
        read_masks: also serve masks. Otherwise `segmentation` is never looked at.
        transform: called with a `tv_tensors.Image` and a dict of `boxes`, `labels` and perhaps `masks`,
            and returns both.
        ignored_bottom_rows: rows at the bottom of each stored image that say nothing about instances
            (a caption, say); at least 0 and less than the height of every image.
        category_ids: fixes which category each label is, for a model trained on another file. Without it
            the labels follow the sorted ids of the file.

    Raises:
        InputError: the file, a record in it or an image cannot be used.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        read_masks: bool = False,
        transform: Callable[[Any, Target], tuple[Tensor, Target]] | None = None,
        ignored_bottom_rows: int = 0,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.images = images
        self.transform = transform
        self.ignored_bottom_rows = ignored_bottom_rows
        content = _read_json(annotations)
        names = _category_names(_records(annotations, content, "categories"))
        self.category_ids = sorted(names) if category_ids is None else list(category_ids)
        self.class_names = [names.get(category, f"category {category}") for category in self.category_ids]
        self._read_images(annotations, _records(annotations, content, "images"))
        self._read_annotations(annotations, _records(annotations, content, "annotations"), names, read_masks)
        if not images.is_dir():
            raise InputError(f"{images}: no such folder; give the folder of the images of {annotations}")
        check_images([images / name for name in self.file_names], self.sizes)

    def _read_images(self, annotations: Path, records: "Iterator[_Record]") -> None:
        self.image_ids: list[int] = []
        self.file_names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        seen: set[int] = set()
        for record in records:
            self.image_ids.append(record.new_id(seen))
            height, width = record.field("height", int), record.field("width", int)
            if min(height, width) < 1:
                raise record.error(f"width {width} and height {height} must be at least 1; correct them")
            if not 0 <= self.ignored_bottom_rows < height:
                rows = self.ignored_bottom_rows
                raise record.error(f"ignored_bottom_rows={rows} is not in 0..{height - 1}; change it")
            self.file_names.append(record.field("file_name", str))
            self.sizes.append((height, width))
        if not self.image_ids:
            raise InputError(f"{annotations}: 'images' is empty; give a file with at least one image")

    def _read_annotations(
        self, annotations: Path, records: "Iterator[_Record]", names: dict[int, str], read_masks: bool
    ) -> None:
        index_of = {identity: index for index, identity in enumerate(self.image_ids)}
        label_of = {category: label for label, category in enumerate(self.category_ids) if category in names}
        seen: set[int] = set()
        used, owners, labels, rows = [], [], [], []
        for record in records:
            record.new_id(seen)
            image = record.field("image_id", int)
            if image not in index_of:
                raise record.error(f"image_id {image} is not among the images; add the image or remove this")
            category = record.field("category_id", int)
            if category not in label_of:
                raise record.error(
                    f"category_id {category} is not among the categories {reprlib.repr(sorted(label_of))}; "
                    "add it to them or remove this annotation"
                )
            if record.content.get("iscrowd") == 1:
                continue
            rows.append(_finite_box(record))
            used.append(record)
            owners.append(index_of[image])
            labels.append(label_of[category])
        sizes = np.array(self.sizes, dtype=np.float64)[owners].reshape(-1, 2)
        boxes, kept = _clip(np.array(rows, dtype=np.float64).reshape(-1, 4), sizes)
        if not kept.any():
            raise InputError(
                f"{annotations}: none of the {len(seen)} annotations is a box inside its image that is not a "
                "crowd; give a file with at least one box"
            )
        if not kept.all():
            first = used[int(np.argmin(kept))]
            logger.warning(
                f"{annotations}: dropped {np.count_nonzero(~kept)} of {len(kept)} boxes that have no area "
                f"inside their image, such as annotation {first.content['id']}, bbox {first.content['bbox']}"
            )
        # Flat arrays in the order of the images: cheap to hand to DataLoader workers.
        order = np.argsort(np.array(owners), kind="stable")
        order = order[kept[order]]
        self._boxes = boxes[order]  # float32 (M, 4)
        self._labels = np.array(labels, dtype=np.int64)[order]  # (M,)
        self._starts = np.searchsorted(np.array(owners)[order], np.arange(len(self.image_ids) + 1))
        self._counts: list[bytes] | None = None
        if read_masks:
            self._counts = [_encode(used[k], *self.sizes[owners[k]]) for k in order]

    def __len__(self) -> int:
        """Return the number of images, those without boxes included."""
        return len(self.image_ids)

    def most_boxes(self) -> tuple[int, Path]:
        """The number of boxes of the image that has most, and that image's file."""
        counts = np.diff(self._starts)
        fullest = int(counts.argmax())
        return int(counts[fullest]), self.images / self.file_names[fullest]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read one image and its target."""
        index = range(len(self))[index]
        height, width = self.sizes[index]
        span = slice(self._starts[index], self._starts[index + 1])
        boxes = torch.from_numpy(self._boxes[span].copy())  # (N, 4)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(self._labels[span].copy()),  # (N,)
        }
        if self._counts is not None:
            target["masks"] = tv_tensors.Mask(decode_masks(self._counts[span], height, width))
        image: Tensor = tv_tensors.Image(read_image(self.images / self.file_names[index]))
        if self.transform is not None:
            image, target = self.transform(image, target)
        plain: Target = {key: value.as_subclass(Tensor) for key, value in target.items()}
        plain["image_id"] = self.image_ids[index]
        plain["ignored_bottom_rows"] = self.ignored_bottom_rows * image.shape[-2] // height
        return image.as_subclass(Tensor), plain


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Batch items as lists, because the images differ in size."""
    return [image for image, _ in batch], [target for _, target in batch]


class _Record:
    """A record of the JSON file that can name itself in an error."""

    def __init__(self, file: Path, group: str, index: int, content: Any) -> None:
        self.file, self.group, self.index = file, group, index
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}

    def error(self, message: str) -> InputError:
        identity = reprlib.repr(self.content.get("id", "missing"))
        return InputError(f"{self.file}: {self.group}[{self.index}] (id {identity}): {message}")

    def new_id(self, seen: set[int]) -> int:
        identity = self.field("id", int)
        if identity in seen:
            raise self.error("another record has the same id; give each its own")
        seen.add(identity)
        return identity

    def field(self, key: str, kind: type[T]) -> T:
        value = self.content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = reprlib.repr(value) if key in self.content else "missing"
            raise self.error(f"{key!r} is {found}, but COCO has a {kind.__name__} there; correct the record")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a COCO JSON file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give a COCO JSON file") from error
    return content if isinstance(content, dict) else {}


def _records(path: Path, content: dict[str, Any], group: str) -> Iterator[_Record]:
    if not isinstance(content.get(group), list):
        raise InputError(f"{path}: no list {group!r} at its top level; give a COCO JSON file of instances")
    return (_Record(path, group, index, record) for index, record in enumerate(content[group]))


def _category_names(records: Iterator[_Record]) -> dict[int, str]:
    seen: set[int] = set()
    return {record.new_id(seen): record.field("name", str) for record in records}


def _finite_box(record: _Record) -> list[float]:
    box: list[float] = record.field("bbox", list)
    if len(box) != 4 or not all(type(value) in (int, float) for value in box):
        raise record.error(f"bbox {reprlib.repr(box)} must be four numbers, x, y, width, height; correct it")
    if not all(abs(value) < math.inf for value in box):
        raise record.error(f"bbox {box} has a coordinate that is NaN or infinite; correct or remove it")
    return box


def _clip(rows: Floats, sizes: Floats) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Clip x, y, width, height to (height, width); return corners, and which boxes have an area left."""
    corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1)
    boxes = corners.clip(0, sizes[:, [1, 0, 1, 0]]).astype(np.float32)  # (M, 4)
    return boxes, np.logical_and(boxes[:, 2] > boxes[:, 0], boxes[:, 3] > boxes[:, 1])


def _encode(record: _Record, height: int, width: int) -> bytes:
    segmentation = record.content.get("segmentation")
    if not segmentation:
        raise record.error("no 'segmentation', but mask supervision needs masks; add it")
    try:
        return encode_mask(segmentation, height, width)
    except ValueError as error:
        raise record.error(f"segmentation is no mask ({error}); correct it or go without masks") from error
