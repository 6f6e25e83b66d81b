"""A data set in memory, the same for every annotation format."""

import math
import reprlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from boxteacher.data.masks import mask_area
from boxteacher.data.problems import Problem

_MANY_CROWDS = 0.1  # share of the objects; COCO has 1.3 %


@dataclass(frozen=True, eq=False)
class DataIndex:
    """The I images and M objects of a data set in flat arrays, which DataLoader workers receive at low cost.

    The objects of image i are `starts[i]` to `starts[i + 1] - 1`, in the order of the annotations.

    Attributes:
        images: folder of the image files.
        annotations: annotation file or folder.
        class_names: name of each label.
        category_ids: the data set's own id of each label; COCO's ids have gaps.
        image_ids: (I,) int64.
        file_names: paths of the I images as the disk has them, relative to `images`.
        sizes: (I, 2) int64, height and width in pixels of the images as annotated (see `read_image`).
        starts: (I + 1,) int64, position of each image's first object, then M.
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels, inside the image and with positive area.
        labels: (M,) int64 in 0 … C−1.
        annotation_ids: (M,) int64.
        crowd: (M,) bool, groups of objects, which training leaves out and evaluation ignores.
        area: (M,) float64 in pixels, as annotated, or else of the mask, or else of the box.
        masks: counts of a compressed RLE (see `encode_mask`) of each object, None for an object without mask;
            None if masks were not read, or only crowds have one.
        mask_confidence: (M,) float32 in [0, 1], how far each mask is to be trusted; None if all are
            annotated.
        is_coco: whether the files are named as in COCO's release.
    """

    images: Path
    annotations: Path
    class_names: list[str]
    category_ids: list[int]
    image_ids: NDArray[np.int64]
    file_names: list[str]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    masks: list[bytes | None] | None
    is_coco: bool = False
    mask_confidence: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of images, those without objects included."""
        return len(self.file_names)

    def image_path(self, i: int) -> Path:
        """File of image i."""
        return self.images / self.file_names[i]

    def max_boxes(self) -> tuple[int, Path]:
        """Maximum number of boxes per image, without crowds, and the file of that image."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])  # (M + 1,)
        counts = np.diff(before[self.starts])  # (I,)
        image = int(counts.argmax())
        return int(counts[image]), self.image_path(image)


class IndexedImage(NamedTuple):
    """An image, as a format's reader returns it."""

    image_id: int
    file_name: str
    size: tuple[int, int]  # height, width in pixels


class IndexedObject(NamedTuple):
    """An object, as a format's reader returns it."""

    image: int  # position among the images
    box: Sequence[float]  # as `clip_box` returns it
    label: int
    annotation_id: int
    crowd: bool
    area: float  # in pixels; NaN if not annotated
    mask: bytes | None  # counts of a compressed RLE


def clip_box(box: Sequence[float], height: int, width: int) -> Sequence[float] | None:
    """Clips x0, y0, x1, y1 to the image and rounds them to float32; None if no area is left."""
    x0, y0, x1, y1 = box
    x = min(max(x0, 0), width), min(max(x1, 0), width)
    y = min(max(y0, 0), height), min(max(y1, 0), height)
    clipped = array("f", (x[0], y[0], x[1], y[1]))
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


def build_index(
    images: Path,
    annotations: Path,
    found_images: Sequence[IndexedImage],
    found_objects: Sequence[IndexedObject],
    *,
    class_names: list[str],
    category_ids: list[int],
    problems: list[Problem],
) -> DataIndex:
    """Builds the index from a reader's images and objects, which may be in any order.

    If none of `problems` is an error, an error is added if no box is left to train on, and else warnings of
    what training and evaluation will lack: many crowds, classes without objects.
    """
    objects = sorted(found_objects, key=lambda each: each.image)  # stable: within an image as in the file
    owners = [each.image for each in objects]
    boxes = np.array([tuple(each.box) for each in objects], dtype=np.float32).reshape(-1, 4)  # (M, 4)
    area = np.array(
        [_area(each, *found_images[each.image].size) for each in objects], dtype=np.float64
    )  # (M,)
    has_masks = any(each.mask is not None and not each.crowd for each in objects)
    index = DataIndex(
        images=images,
        annotations=annotations,
        class_names=class_names,
        category_ids=category_ids,
        image_ids=np.array([each.image_id for each in found_images], dtype=np.int64),
        file_names=[each.file_name for each in found_images],
        sizes=np.array([each.size for each in found_images], dtype=np.int64).reshape(-1, 2),
        starts=np.searchsorted(owners, np.arange(len(found_images) + 1)),
        boxes=boxes,
        labels=np.array([each.label for each in objects], dtype=np.int64),
        annotation_ids=np.array([each.annotation_id for each in objects], dtype=np.int64),
        crowd=np.array([each.crowd for each in objects], dtype=np.bool_),
        area=area,
        masks=[each.mask for each in objects] if has_masks else None,
    )
    if not any(problem.severity == "error" for problem in problems):
        problems += _shortages(index)
    return index


def _area(found: IndexedObject, height: int, width: int) -> float:
    """Area in pixels: as annotated, or else of the mask, which COCO's is, or else of the box."""
    if not math.isnan(found.area):
        return found.area
    if found.mask is not None:
        return mask_area(found.mask, height, width)
    x0, y0, x1, y1 = found.box
    return (x1 - x0) * (y1 - y0)


def _shortages(index: DataIndex) -> Iterator[Problem]:
    crowds = int(index.crowd.sum())
    if crowds == len(index.crowd):
        what = "no annotation is a box inside its image that is not a crowd"
        yield Problem(index.annotations, "", what, "give at least one box")
        return
    if crowds > _MANY_CROWDS * len(index.crowd):
        what = f"{crowds} of {len(index.crowd)} objects are crowds: training leaves them out, AP ignores them"
        remedy = "set 'iscrowd' to 0 for each that is a single object"
        yield Problem(index.annotations, "", what, remedy, "warning")
    counts = np.bincount(index.labels[~index.crowd], minlength=len(index.class_names))  # (C,)
    absent = [name for name, count in zip(index.class_names, counts, strict=True) if not count]
    if absent:
        what = f"{len(absent)} of {len(counts)} classes have no object here: {reprlib.repr(absent)}"
        remedy = "none is learned from this file, and AP is the mean over the others"
        yield Problem(index.annotations, "", what, remedy, "warning")
