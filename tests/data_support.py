"""A small COCO data set on disk, which tests may change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from boxteacher.data import DataIndex, InstanceDataset, read_coco
from boxteacher.data.problems import Problem, raise_first_error
from boxteacher.errors import InputError

HEIGHT, WIDTH = 24, 40


def filled_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, background first."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation(identity: int, image: int, category: int, box: list[Any], segmentation: Any) -> dict[str, Any]:
    record = {"id": identity, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
    return {**record, "segmentation": segmentation}


def valid_content() -> dict[str, Any]:
    """Two images with sparse ids, the second without boxes, and all three kinds of segmentation."""
    return {
        "images": [
            {"id": 70, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 44, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            annotation(1, 70, 44, [4, 2, 10, 6], [[4, 2, 14, 2, 14, 8, 4, 8]]),
            annotation(2, 70, 3, [20, 5, 8, 9], uncompressed(filled_mask(20, 5, 28, 14))),
            annotation(5, 70, 44, [30, 0, 10, 24], compressed(filled_mask(30, 0, 40, 24))),
        ],
    }


class Folder:
    """The data set of `valid_content`; tests may change `content` and the files of `images`."""

    def __init__(self, root: Path) -> None:
        self.images, self.file = root / "images", root / "instances.json"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / "a.png")
        Image.fromarray(pixels).save(self.images / "b.jpg")
        self.pixels, self.content = pixels, valid_content()

    def read(self, **options: Any) -> tuple[DataIndex, list[Problem]]:
        self.file.write_text(json.dumps(self.content))
        return read_coco(self.images, self.file, **options)

    def index(self, **options: Any) -> DataIndex:
        index, problems = self.read(**options)
        raise_first_error(problems)
        return index

    def load(self, *, transform: Any = None, ignored_bottom_rows: int = 0, **options: Any) -> InstanceDataset:
        index = self.index(**options)
        return InstanceDataset(index, transform=transform, ignored_bottom_rows=ignored_bottom_rows)

    def failure(self, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.index(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)
