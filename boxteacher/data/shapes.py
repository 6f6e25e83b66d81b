"""The rendered demo data set: textured shapes that occlude one another, with exact masks.

Pixels are the same on every machine: they are computed from seeded uniform random numbers by sums, products,
quotients and square roots alone, whose rounding IEEE 754 defines.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from numpy.typing import NDArray
from PIL import Image

from boxteacher.errors import InputError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

CLASS_NAMES = ("disc", "triangle", "star", "cross")

_VERSION = 2
_MIN_SIZE = 32
_MIN_VISIBLE = 0.4
_CONTRAST = 200.0
_COLOR_TRIES = 24
_COS72 = (math.sqrt(5) - 1) / 4
_COS36 = (math.sqrt(5) + 1) / 4
_SIN72 = math.sqrt(10 + 2 * math.sqrt(5)) / 4
_SIN36 = math.sqrt(10 - 2 * math.sqrt(5)) / 4
# Outward normals of the lines that bound each shape.
_TRIANGLE = ((0.0, -1.0), (math.sqrt(3) / 2, 0.5), (-math.sqrt(3) / 2, 0.5))
_STAR = ((0.0, -1.0), (_SIN72, -_COS72), (-_SIN72, -_COS72), (_SIN36, _COS36), (-_SIN36, _COS36))


def write_shapes(
    root: str | Path, *, train: int = 300, val: int = 60, size: int = 128, seed: int = 0
) -> None:
    """Renders the data set into a new folder, in the first layout of `find_split`.

    Each image has one to four objects of four classes, of random colors, some partly occluded; boxes and
    masks are those of the visible parts. A folder that already holds the same data set is left as it is, and
    an interrupted call leaves no folder.

    Args:
        root: folder to write; if it exists, it must be empty or hold the same data set.
        train: number of training images, at least 1.
        val: number of validation images, at least 1.
        size: maximum of height and width in pixels, at least 32.
        seed: seed of all random numbers, at least 0.

    Raises:
        InputError: a number is out of range, or `root` holds something else.
    """
    settings = {"version": _VERSION, "train": train, "val": val, "size": size, "seed": seed}
    for name, minimum in (("train", 1), ("val", 1), ("size", _MIN_SIZE), ("seed", 0)):
        if settings[name] < minimum:
            raise InputError(f"shapes: {name}={settings[name]} is too small; give at least {minimum}")
    root = Path(root)
    if _is_written(root, settings):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        staged = Path(temporary) / root.name
        (staged / "annotations").mkdir(parents=True)
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            generators = (np.random.Generator(np.random.PCG64([seed, number, i])) for i in range(count))
            _write_split(staged, split, generators, size)
        (staged / "shapes.json").write_text(json.dumps(settings))
        # Another process may have written the same data set in the meantime.
        if not _is_written(root, settings):
            if root.exists():
                root.rmdir()
            staged.rename(root)


def _is_written(root: Path, settings: dict[str, int]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    record = root / "shapes.json"
    try:
        if json.loads(record.read_bytes()) == settings:
            return True
    except (OSError, ValueError):
        pass
    raise InputError(f"{root}: holds something other than the shapes of {settings}; choose another folder")


def _write_split(root: Path, split: str, generators: Iterator[np.random.Generator], size: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for identity, generator in enumerate(generators, start=1):
        pixels, objects = _render(generator, size)
        height, width = pixels.shape[:2]
        name = f"{identity:05d}.png"
        Image.fromarray(pixels).save(root / split / name)
        images.append({"id": identity, "file_name": name, "width": width, "height": height})
        for kind, mask in objects:
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": identity,
                "category_id": kind + 1,
                "bbox": _tight_box(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
            }
            annotations.append(annotation)
    categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _tight_box(mask: Mask) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _render(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[tuple[int, Mask]]]:
    """An image, uint8 (H, W, 3), and the class and visible part, bool (H, W), of each object."""
    height, width = (size - int(rng.random() * (size // 8 + 1)) for _ in range(2))
    y, x = (axis.astype(np.float64) + 0.5 for axis in np.indices((height, width)))
    colors = [_color(rng, [])]
    light = (rng.random() - 0.5) * 30 * x / width + (rng.random() - 0.5) * 30 * y / height
    pixels = colors[0] + (light + _texture(rng, x, y))[..., None]  # (H, W, 3)
    free = np.ones((height, width), dtype=bool)
    objects = []
    # The nearest first, so that what is left of each later one is known when it is rendered.
    for _ in range(2 + int(rng.random() * 3)):
        kind = int(rng.random() * len(CLASS_NAMES))
        whole = _shape(kind, *_local(rng, x, y, size))
        visible = whole & free
        if visible.sum() < max(_MIN_VISIBLE * whole.sum(), size * size / 256):
            continue
        colors.append(_color(rng, colors))
        surface = colors[-1] + _texture(rng, x, y)[..., None]  # (H, W, 3)
        pixels[visible] = surface[visible]
        free &= ~visible
        objects.append((kind, visible))
    grain = rng.random((height, width, 3)) * 6 - 3
    return (pixels + grain).clip(0, 255).astype(np.uint8), objects


def _local(rng: np.random.Generator, x: Array, y: Array, size: int) -> tuple[Array, Array]:
    """Coordinates of each pixel relative to an object of radius 1 at a random position and angle."""
    height, width = x.shape
    dx = x - width * (0.1 + 0.8 * rng.random())
    dy = y - height * (0.1 + 0.8 * rng.random())
    u, v = _rotate(rng, dx, dy, reach=0.2)
    radius = size * (0.17 + 0.15 * rng.random())
    return u / radius, v / (radius * (0.75 + 0.25 * rng.random()))


def _rotate(rng: np.random.Generator, x: Array, y: Array, reach: float) -> tuple[Array, Array]:
    """Rotates by a random angle, by quotients because sines differ between machines in the last bit.

    The angle is 2 · arctan(t) with t uniform in −reach … reach: a reach of 0.2 is 23 degrees, 1 is 90.
    """
    t = reach * (2 * rng.random() - 1)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return x * cosine + y * sine, y * cosine - x * sine


def _shape(kind: int, u: Array, v: Array) -> Mask:
    if kind == 0:
        return np.less_equal(u * u + v * v, 0.75)
    if kind == 1:
        return np.all([u * a + v * b <= 0.5 for a, b in _TRIANGLE], axis=0)
    if kind == 2:
        # A point of a pentagram is outside at most one of its five lines.
        return np.greater_equal(np.sum([u * a + v * b <= 0.38 for a, b in _STAR], axis=0), 4)
    u, v = abs(u), abs(v)
    return (np.maximum(u, v) <= 0.9) & (np.minimum(u, v) <= 0.32)


def _texture(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Brightness around zero: stripes, checks or blotches, weak compared with the contrast of colors."""
    kind, strength = int(rng.random() * 3), 3 + 6 * rng.random()
    u, v = _rotate(rng, x, y, reach=1)
    period = 6 + 10 * rng.random()
    if kind == 0:
        return strength * _wave(u / period)
    if kind == 1:
        return strength * (_wave(u / period) + _wave(v / period)) / 2
    height, width = x.shape
    blotches = rng.random((height // 4 + 1, width // 4 + 1)) * 2 - 1
    return strength * blotches.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


def _wave(phase: Array) -> Array:
    return abs(phase - np.floor(phase) - 0.5) * 4 - 1


def _color(rng: np.random.Generator, others: list[Array]) -> Array:
    """A random color (3,) in [0, 255] that differs clearly from others, or the most different one tried."""
    tries = 20 + 215 * rng.random((_COLOR_TRIES, 3))
    if not others:
        return tries[0]
    apart = np.stack([_difference(tries, other) for other in others]).min(axis=0)  # (tries,)
    enough = apart >= _CONTRAST
    return tries[int(np.argmax(enough) if enough.any() else np.argmax(apart))]


def _difference(a: Array, b: Array) -> Array:
    """Perceived difference of colors: a weighted distance in RGB, 0 to about 765."""
    red = (a[..., 0] + b[..., 0]) / 512
    d = (a - b) * (a - b)
    return np.sqrt((2 + red) * d[..., 0] + 4 * d[..., 1] + (3 - red) * d[..., 2])
