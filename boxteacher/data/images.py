"""Image files: found, read as tensors, and checked before training without decoding all of them."""

import os
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from boxteacher.data.problems import Problem
from boxteacher.data.sample_values import UnknownWhiteError, bits_per_sample, to_rgb, white_value
from boxteacher.errors import InputError

# Errors that PIL raises for damaged files; its PNG reader raises SyntaxError, for example.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096
_CHUNK = 256
_THREADS = 8
_SUFFIXES = {".bmp", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_EXIF_ORIENTATION = 0x0112
_IMAGE_WIDTH, _IMAGE_LENGTH = 256, 257  # tags of TIFF
# From the upright view to the pixels as stored, for the orientations that swap width and height.
_TO_STORED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored_name(folder: Path, name: str) -> str:
    """A file's name as the disk has it, where accented letters may be composed otherwise (Unicode NFC, NFD).

    Returns:
        The name as given if there is no such file.
    """
    if name.isascii():
        return name
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    # Not Path.exists, which raises if a form is longer than the disk's names may be.
    return next((form for form in forms if os.path.exists(folder / form)), name)


def find_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The path or paths, each folder replaced by the images directly in it in the order of their names.

    Hidden files are left out.

    Raises:
        InputError: a folder has no image.
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if not path.is_dir():
            found.append(path.parent / stored_name(path.parent, path.name))
            continue
        images = [
            each for each in sorted(path.iterdir()) if each.suffix.lower() in _SUFFIXES and each.is_file()
        ]
        images = [each for each in images if not each.name.startswith(".")]
        if not images:
            suffixes = ", ".join(sorted(_SUFFIXES))
            raise InputError(
                f"{path}: no image directly in this folder ({suffixes}): give files or another folder"
            )
        found += images
    return found


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Reads an image of any mode as RGB, turned as its EXIF orientation says.

    That is the upright view, which annotation tools show. If only the pixels as stored have the annotated
    size, they are not turned. Alpha is dropped. In gray images of more than 8 bits, `white_value` becomes 1.

    Args:
        path: image file.
        size: height and width of the image as annotated, in pixels; those of the upright view if not given.

    Returns:
        float32 (3, H, W) in [0, 1].

    Raises:
        InputError: the file cannot be read as an image, or is of another size.
    """
    return read_and_check_image(path, size)[0]


def read_and_check_image(
    path: str | Path, size: tuple[int, int] | None = None
) -> tuple[Tensor, Problem | None]:
    """The image of `read_image`, and a warning if its largest value told which one is white."""
    path = Path(path)
    try:
        with Image.open(path) as image:
            bits = bits_per_sample(image)
            if image.format == "PNG":
                image.load()  # or getexif would, and damaged pixels would pass for damaged EXIF data
            orientation = _orientation(image)
            stored, upright = _views(image, orientation)
            if size not in (None, stored, upright):
                raise InputError(str(_other_size(path, upright, size)))
            white, told_by_maximum = white_value(image, bits)
            turned = orientation == 1 or isinstance(image, TiffImageFile)  # which PIL turns itself
            view = image if turned else ImageOps.exif_transpose(image)
            if size not in (None, upright):
                view = view.transpose(_TO_STORED[orientation])
            return to_rgb(view, white), _guessed_white(path, bits, white) if told_by_maximum else None
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(str(_unreadable(path, error))) from error


def check_images(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[Problem | None]:
    """Checks that each image exists, is complete, and has its (height, width) in `sizes`.

    Only headers and the last few kilobytes are read. A file is decoded in full if it lacks its format's end
    marker, so that truncation is found, or has more than 8 bits per sample, to find the value of white.

    Returns:
        Problem of each image; None for a sound one. A warning is about an image that can be used.
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
            bits = bits_per_sample(image)
            # PIL would decode every PNG to find EXIF data behind its pixels.
            in_header = image.format != "PNG" or "exif" in image.info
            orientation = _orientation(image) if in_header or size != (image.height, image.width) else 1
            stored, upright = _views(image, orientation)
            if size not in (stored, upright):
                return _other_size(path, upright, size)
            if not _has_end(path, image.format):
                image.load()
            white, told_by_maximum = white_value(image, bits) if bits > 8 else (255, False)
    except _DAMAGE as error:
        return _unreadable(path, error)
    if orientation != 1 and stored == upright:
        what = f"it is turned by its EXIF orientation, {orientation}, as annotation tools show it"
        remedy = "remove that from the file if its boxes are those of the pixels as stored"
        return Problem(path, "", what, remedy, "warning")
    if told_by_maximum:
        return _guessed_white(path, bits, white)
    return None


def _guessed_white(path: Path, bits: int, white: int) -> Problem:
    what = f"no value in this file of {bits} bits per sample exceeds {white}, which is taken as white"
    return Problem(path, "", what, f"save images of 8 bits if {white} is not white", "warning")


def _views(image: Image.Image, orientation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image just opened, as stored and upright."""
    stored = (image.height, image.width)
    if isinstance(image, TiffImageFile):  # its size in recent versions of PIL is the upright view's
        stored = (image.tag_v2[_IMAGE_LENGTH], image.tag_v2[_IMAGE_WIDTH])
    return stored, stored[::-1] if orientation in _TO_STORED else stored


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DAMAGE:
        return 1  # as viewers do with damaged EXIF data
    return value if value in range(1, 9) else 1


def _other_size(path: Path, upright: tuple[int, int], size: tuple[int, int]) -> Problem:
    (height, width), record = upright, f"{size[1]}x{size[0]}"
    what = f"the file is {width}x{height} pixels (width x height) but its record says {record}"
    remedy = "correct 'width' and 'height' or replace the file"
    if size == (width, height):  # swapped in the record, they would belong to boxes of another view
        remedy = "replace it by the file that was annotated, which is turned by 90°"
    return Problem(path, "", what, remedy)


def _has_end(path: Path, kind: str | None) -> bool:
    mark = _END_MARKS.get(kind or "")
    if mark is None:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES), os.SEEK_SET)
        return mark in file.read()


def _unreadable(path: Path, error: BaseException) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(path, "", "no such image", "check its path, or leave it out")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnknownWhiteError):
        return Problem(path, "", reason, "scale its values to 0…255 and save 8 bits per sample")
    what = f"cannot be read as an image ({reason})"
    return Problem(path, "", what, "replace it by an 8-bit PNG or JPEG, or leave it out")
