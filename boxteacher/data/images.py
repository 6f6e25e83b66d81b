"""Pixels on disk: image files and COCO segmentations, checked before any training and read as tensors.

Image files are checked without decoding them all.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image
from torch import Tensor

from boxteacher.errors import InputError

# What PIL lets through when a file is damaged; its PNG reader raises SyntaxError, for one.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096
_CHUNK = 256
_THREADS = 8


def read_image(path: Path) -> Tensor:
    """Read an image of any mode as RGB.

    EXIF orientation is not applied, because COCO boxes are about the pixels as they are stored. Alpha is
    left out. 16-bit grey keeps its range.

    Returns:
        float32 (3, H, W) in [0, 1].

    Raises:
        InputError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                # PIL's own conversion of 16-bit grey to 8 bits clips at 255 instead of scaling.
                grey = np.asarray(image).clip(0, 65535).astype(np.float32) / np.float32(65535)  # (H, W)
                return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


def check_images(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    """Check that each image is there, is whole, and is as large as its (height, width) in `sizes`.

    Only headers are read, and the last few kilobytes; a file without the mark that ends its format is
    decoded in full, so that a truncated one is found.

    Raises:
        InputError: names the first image at fault, in the order given.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        there = pool.map(Path.is_file, paths)
        missing = [path for path, found in zip(paths, there, strict=True) if not found]
        if missing:
            raise InputError(
                f"{missing[0]}: no such image ({len(missing)} of {len(paths)} are missing); "
                "add the files or remove their records from the annotations"
            )
        # In chunks, because a future for each of COCO's 118k images costs more than its check.
        starts = range(0, len(paths), _CHUNK)
        list(pool.map(lambda i: _check_chunk(paths[i : i + _CHUNK], sizes[i : i + _CHUNK]), starts))


def encode_mask(segmentation: Any, height: int, width: int) -> bytes:
    """Turn polygons or either kind of RLE into the counts of a compressed RLE.

    Raises:
        ValueError: it is none of them, or not of an image of this size.
    """
    try:
        if isinstance(segmentation, list):
            return _encode_polygons(segmentation, height, width)
        counts, size = segmentation["counts"], list(segmentation["size"])
        runs = counts if isinstance(counts, list) else _runs(counts.encode("ascii"))
        # pycocotools leaves memory unset, or writes past its end, where the runs do not fill the image.
        if size != [height, width] or min(runs) < 0 or sum(runs) != height * width:
            raise ValueError(f"its runs of size {size} do not fill the image, {[height, width]}")
        if isinstance(counts, list):
            return bytes(mask_util.frPyObjects({"size": size, "counts": counts}, height, width)["counts"])
        return bytes(counts, "ascii")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("it is neither polygons nor RLE") from error


def decode_masks(counts: Sequence[bytes], height: int, width: int) -> Tensor:
    """Decode N counts of `encode_mask` into masks, bool (N, height, width)."""
    if not counts:
        return torch.zeros((0, height, width), dtype=torch.bool)
    stacked = mask_util.decode([{"size": [height, width], "counts": each} for each in counts])  # (H, W, N)
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(2, 0, 1))).bool()


def _encode_polygons(polygons: list[Any], height: int, width: int) -> bytes:
    rings = [np.asarray(polygon, dtype=np.float64) for polygon in polygons]
    if not all(r.ndim == 1 and r.size >= 6 and r.size % 2 == 0 and np.isfinite(r).all() for r in rings):
        raise ValueError("a polygon must be three or more pairs of finite numbers")
    parts = mask_util.frPyObjects([ring.tolist() for ring in rings], height, width)
    return bytes(mask_util.merge(parts)["counts"])


def _runs(counts: bytes) -> list[int]:
    """Spell out compressed counts: 5 bits a byte, then differences to the run before last."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError("its counts hold a character that RLE does not use")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift or not runs:
        raise ValueError("its counts break off")
    return runs


def _check_chunk(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    for path, (height, width) in zip(paths, sizes, strict=True):
        try:
            with Image.open(path) as image:
                actual = image.size
                if not _has_end(path, image.format):
                    image.load()
        except _DAMAGE as error:
            raise _unreadable(path, error) from error
        if actual != (width, height):
            raise InputError(
                f"{path}: the file is {actual[0]}x{actual[1]} pixels (width x height) but its record says "
                f"{width}x{height}; correct 'width' and 'height' or replace the file"
            )


def _has_end(path: Path, kind: str | None) -> bool:
    mark = _END_MARKS.get(kind or "")
    if mark is None:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES), os.SEEK_SET)
        return mark in file.read()


def _unreadable(path: Path, error: BaseException) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: there is no such file; check the path")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: cannot be read as an image ({reason}); replace the file or remove its record")
