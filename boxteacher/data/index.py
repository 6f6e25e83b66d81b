"""What a data set is in memory, whatever format it was read from."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from boxteacher.data.problems import Problem


@dataclass(frozen=True, eq=False)
class DataIndex:
    """The I images and M objects of a data set in flat arrays, cheap to hand to DataLoader workers.

    The objects of image i are `starts[i]` up to `starts[i + 1]`, in the order of the annotations.

    Attributes:
        images: folder of the image files.
        annotations: file, or folder, that the objects were read from.
        class_names: name of each label.
        category_ids: the data set's own id of each label; COCO's are sparse.
        image_ids: (I,) int64.
        file_names: of the I images, under `images`.
        sizes: (I, 2) int64, height and width of the stored images in pixels.
        starts: (I + 1,) int64.
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels, inside the image and with an area.
        labels: (M,) int64 in 0 … C−1.
        annotation_ids: (M,) int64.
        crowd: (M,) bool, groups that evaluation ignores and training is not shown.
        area: (M,) float64 in pixels, of the mask if the annotations tell it, else of the box.
        masks: counts of a compressed RLE (see `encode_mask`) of each object, None for one without a mask;
            None altogether if masks were not read, or no object but crowds has one.
        is_coco: whether files are named as in COCO's own release.
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

    def __len__(self) -> int:
        """Number of images, those without objects included."""
        return len(self.file_names)

    def image_path(self, i: int) -> Path:
        """File of image i."""
        return self.images / self.file_names[i]

    def max_boxes(self) -> tuple[int, Path]:
        """Number of boxes, crowds left out, of the image that has most, and that image's file."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])  # (M + 1,)
        counts = np.diff(before[self.starts])  # (I,)
        fullest = int(counts.argmax())
        return int(counts[fullest]), self.image_path(fullest)


class IndexedImage(NamedTuple):
    """An image as a format's reader found it."""

    image_id: int
    file_name: str
    size: tuple[int, int]  # height, width in pixels


class IndexedObject(NamedTuple):
    """An object as a format's reader found it."""

    image: int  # position among the images
    box: Sequence[float]  # as `clip_box` returns it
    label: int
    annotation_id: int
    crowd: bool
    area: float  # in pixels; NaN if the annotations do not tell it
    mask: bytes | None  # counts of a compressed RLE


def clip_box(box: Sequence[float], height: int, width: int) -> Sequence[float] | None:
    """Clip x0, y0, x1, y1 to the image and round them to float32; None if no area is left."""
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
    """The index of what a reader found, objects in any order.

    `problems` gets one more where there is nothing to learn from and no error says why.
    """
    objects = sorted(found_objects, key=lambda each: each.image)  # stable: as in the file within an image
    owners = [each.image for each in objects]
    boxes = np.array([tuple(each.box) for each in objects], dtype=np.float32).reshape(-1, 4)  # (M, 4)
    area = np.array([each.area for each in objects], dtype=np.float64)  # (M,)
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
        area=np.where(np.isnan(area), (boxes[:, 2:] - boxes[:, :2]).prod(1), area),
        masks=[each.mask for each in objects] if has_masks else None,
    )
    if index.crowd.all() and not any(problem.severity == "error" for problem in problems):
        what = "no annotation is a box inside its image that is not a crowd"
        problems.append(Problem(annotations, "", what, "give at least one box"))
    return index
