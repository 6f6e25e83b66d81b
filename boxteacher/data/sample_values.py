"""The values that an image file stores, mapped to [0, 1]."""

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

_BITS_PER_SAMPLE = 258  # tag of TIFF
_WHITE_VALUES = (1, 255, 4095, 65535)
_BLACK_TO_THE_EYE = 1 / 16


class UnknownWhiteError(ValueError):
    """An image's values do not tell which of them is white."""


def bits_per_sample(image: Image.Image) -> int:
    """Bits per sample of an opened file, which must not be loaded yet; 8 stands for any number up to 8."""
    if isinstance(image, TiffImageFile):
        return max(8, *image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    # PIL reduces colors of 16 bits to their upper 8; only the decoder that it chose tells.
    return 16 if _is_deep_gray(image) or ";16" in str(getattr(image, "tile", "")) else 8


def white_value(image: Image.Image, bits: int) -> tuple[int, bool]:
    """The value that becomes 1, and whether it was told by the largest value in the image.

    Gray files of more than 8 bits do not say it: cameras of 12 bits write files of 16. It is 4095 for samples
    of 12 bits; otherwise the smallest of 1 (floating point alone), 255, 4095 and 65535 that is no less than
    the largest value. So it depends on the file alone, and a file always reads the same.

    Args:
        image: image as opened.
        bits: bits per sample, of `bits_per_sample`.

    Raises:
        UnknownWhiteError: a value is negative, not finite or above 65535, or the image would be black to the
            eye (its largest value positive, but less than 1/16 of white).
    """
    if not _is_deep_gray(image):
        _check_upper_bits(image, bits)
        return 255, False
    if bits == 12:
        return 4095, False
    values = np.asarray(image)  # (H, W)
    low, high = float(values.min()), float(values.max())
    fitting = [each for each in _WHITE_VALUES if high <= each and (each > 1 or image.mode == "F")]
    if not np.isfinite([low, high]).all():
        raise UnknownWhiteError(
            "its values, some of them NaN or infinite, do not tell which of them is white"
        )
    if not (low >= 0 and fitting) or 0 < high < fitting[0] * _BLACK_TO_THE_EYE:
        raise UnknownWhiteError(f"its values, {low:g} to {high:g}, do not tell which of them is white")
    return fitting[0], fitting[0] in (255, 4095)


def to_rgb(image: Image.Image, white: int) -> Tensor:
    """An image of any mode as float32 (3, H, W) in [0, 1], RGB; `white` becomes 1, and alpha is dropped."""
    if _is_deep_gray(image):
        # PIL's own conversion to 8 bits clips at 255 instead of scaling.
        gray = np.asarray(image).astype(np.float32) / np.float32(white)  # (H, W)
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(white)


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _check_upper_bits(image: Image.Image, bits: int) -> None:
    """Raises UnknownWhiteError if the upper 8 of 16 bits per color, all that PIL reads, hold no picture."""
    if bits != 16:
        return
    brightest = np.asarray(image.convert("RGB")).max()
    if brightest < 256 * _BLACK_TO_THE_EYE and (brightest > 0 or not _lower_bits_are_0(image)):
        raise UnknownWhiteError(
            "its colors of 16 bits do not exceed 4095, and only their upper 8 bits are read"
        )


def _lower_bits_are_0(image: Image.Image) -> bool:
    """Whether the lower 8 of 16 bits per color are 0 in the whole file; False if PIL cannot read them."""
    if not isinstance(image, ImageFile):
        return False
    with Image.open(image.filename) as swapped:
        try:
            swapped.tile = [_in_the_other_byte_order(tile) for tile in swapped.tile]
            return not np.asarray(swapped.convert("RGB")).any()
        except ValueError:  # gray with alpha is read in one byte order alone
            return False


def _in_the_other_byte_order(tile: Any) -> Any:
    *place, arguments = tile
    mode, *others = (arguments,) if isinstance(arguments, str) else arguments
    native = "L" if sys.byteorder == "little" else "B"  # of compressed TIFF
    order = mode[-1].replace("N", native)
    if order not in ("B", "L"):
        raise ValueError(f"samples of {mode} have no byte order")
    mode = mode[:-1] + ("L" if order == "B" else "B")
    make = getattr(type(tile), "_make", tuple)  # a tuple without names before PIL 11
    return make((*place, (mode, *others)))
