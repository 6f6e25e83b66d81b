"""Renders a data set of many small touching objects of one class: cells of one color on a mottled ground.

    python -m tests.benchmarks.cells DIR

80 training and 20 validation images of 256 × 256 pixels in COCO format, about 50 objects each, 8 to 30
pixels in diameter.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_utils

_SIZE = 256
_TRIES = 60
_MINIMUM_VISIBLE = 0.6
_SPLITS = {"train": 80, "val": 20}

Array = NDArray[np.float64]


def write_cells(root: Path) -> None:
    """Writes both splits; the same pixels for the same numpy."""
    (root / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate(_SPLITS.items()):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            pixels, masks = _render(np.random.default_rng([number, i]))
            name = f"{i:04d}.png"
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": i + 1, "file_name": name, "width": _SIZE, "height": _SIZE})
            annotations += [_annotation(mask, i + 1, len(annotations) + k) for k, mask in enumerate(masks, 1)]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "cell"}],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _annotation(mask: NDArray[np.bool_], image_id: int, identity: int) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "id": identity,
        "image_id": image_id,
        "category_id": 1,
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
    }


def _render(rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """An image, uint8 (H, W, 3), and the visible part, bool (H, W), of each cell."""
    y, x = np.indices((_SIZE, _SIZE)).astype(float)
    ground, cell = rng.uniform(150, 220, 3), rng.uniform(60, 150, 3)
    pixels = ground + 14 * _mottle(rng, 16)[..., None] + 8 * _mottle(rng, 4)[..., None]  # (H, W, 3)
    free = np.ones((_SIZE, _SIZE), dtype=bool)
    masks = []
    for _ in range(_TRIES):
        whole, distance = _blob(rng, x, y)
        visible = whole & free
        if visible.sum() < _MINIMUM_VISIBLE * whole.sum():
            continue
        # A darker rim tells cells that touch from one another, as a membrane does.
        shade = rng.normal(0, 10) - 25 * distance**4 + 6 * _mottle(rng, 4)  # (H, W)
        pixels[visible] = (cell + shade[..., None])[visible]
        free &= ~visible
        masks.append(visible)
    return (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8), masks


def _blob(rng: np.random.Generator, x: Array, y: Array) -> tuple[NDArray[np.bool_], Array]:
    """A wavy ellipse's mask (H, W), and the distance (H, W) from its center, 1 at its rim."""
    angle, radius = rng.uniform(0, np.pi), rng.uniform(7, 15)
    dx, dy = x - rng.uniform(0, _SIZE), y - rng.uniform(0, _SIZE)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / (radius * rng.uniform(0.6, 1))
    direction = np.arctan2(v, u)
    rim = 1 + 0.12 * np.sin(3 * direction + rng.uniform(0, 6)) + 0.08 * np.sin(5 * direction)
    distance = np.hypot(u, v) / rim
    return distance <= 1, distance.clip(0, 1)


def _mottle(rng: np.random.Generator, cell: int) -> Array:
    """Noise (H, W) of blotches `cell` pixels wide."""
    coarse = rng.uniform(-1, 1, (_SIZE // cell, _SIZE // cell))
    return coarse.repeat(cell, 0).repeat(cell, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, metavar="DIR")
    write_cells(parser.parse_args().output)
