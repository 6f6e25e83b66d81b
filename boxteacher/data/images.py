"""Image files: read as tensors, and checked before training without decoding all of them."""

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from boxteacher.data.problems import Problem
from boxteacher.errors import InputError

# Errors that PIL raises for damaged files; its PNG reader raises SyntaxError, for example.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096
_CHUNK = 256
_THREADS = 8


def read_image(path: str | Path) -> Tensor:
    """Reads an image of any mode as RGB.

    EXIF orientation is not applied, because COCO's boxes refer to the pixels as stored. Alpha is dropped.
    16-bit gray keeps its range.

    Returns:
        float32 (3, H, W) in [0, 1].

    Raises:
        InputError: the file cannot be read as an image.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                # PIL's own conversion of 16-bit gray to 8 bits clips at 255 instead of scaling.
                gray = np.asarray(image).clip(0, 65535).astype(np.float32) / np.float32(65535)  # (H, W)
                return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except _DAMAGE as error:
        raise InputError(str(_unreadable(path, error))) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


def check_images(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[Problem | None]:
    """Checks that each image exists, is complete, and has its (height, width) in `sizes`.

    Only headers and the last few kilobytes are read; a file without its format's end marker is decoded in
    full, so that truncation is found.

    Returns:
        Problem of each image; None for a sound one.
    """
    # In chunks, because a future for each of COCO's 118k images costs more than its check.
    starts = range(0, len(paths), _CHUNK)
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = pool.map(
            lambda i: list(map(_check_image, paths[i : i + _CHUNK], sizes[i : i + _CHUNK])), starts
        )
        return list(chain.from_iterable(chunks))


def _check_image(path: Path, size: tuple[int, int]) -> Problem | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if not _has_end(path, image.format):
                image.load()
    except _DAMAGE as error:
        return _unreadable(path, error)
    if size == (height, width):
        return None
    what = f"the file is {width}x{height} pixels (width x height) but its record says {size[1]}x{size[0]}"
    return Problem(path, "", what, "correct 'width' and 'height' or replace the file")


def _has_end(path: Path, kind: str | None) -> bool:
    mark = _END_MARKS.get(kind or "")
    if mark is None:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES), os.SEEK_SET)
        return mark in file.read()


def _unreadable(path: Path, error: BaseException) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(path, "", "no such image", "check its path, or remove its record")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    what = f"cannot be read as an image ({reason})"
    return Problem(path, "", what, "replace the file or remove its record")
