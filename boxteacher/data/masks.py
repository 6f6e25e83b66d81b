"""Masks of a data set: COCO segmentations, checked and stored as compressed run-length encodings (RLE)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_RING = 6  # numbers: three points


def encode_mask(segmentation: Any, height: int, width: int) -> bytes:
    """Encodes polygons or either kind of RLE as the counts of a compressed RLE.

    Polygons of fewer than three points are ignored if there are others.

    Raises:
        ValueError: the segmentation is none of these, or of another image size.
    """
    try:
        if isinstance(segmentation, list):
            return _encode_polygons(segmentation, height, width)
        counts, size = segmentation["counts"], list(segmentation["size"])
        runs = counts if isinstance(counts, list) else _runs(counts.encode("ascii"))
        # pycocotools leaves memory unset, or writes past its end, where the runs do not fill the image.
        if size != [height, width] or not _fill(runs, height * width):
            raise ValueError(f"its runs of size {size} do not fill the image, {[height, width]}")
        if isinstance(counts, list):
            return bytes(mask_util.frPyObjects({"size": size, "counts": counts}, height, width)["counts"])
        return bytes(counts, "ascii")
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError("it is neither polygons nor RLE") from error


def mask_area(counts: bytes, height: int, width: int) -> int:
    """Number of pixels of a mask, given as counts of `encode_mask`."""
    return int(mask_util.area({"size": [height, width], "counts": counts}))


def mask_box(counts: bytes, height: int, width: int) -> list[float]:
    """Box x, y, width, height around the pixels of a mask, given as counts of `encode_mask`."""
    box: list[float] = mask_util.toBbox({"size": [height, width], "counts": counts}).tolist()
    return box


def decode_masks(counts: Sequence[bytes], height: int, width: int) -> Tensor:
    """Decodes N counts of `encode_mask` to masks, bool (N, height, width)."""
    if not counts:
        return torch.zeros((0, height, width), dtype=torch.bool)
    stacked = mask_util.decode([{"size": [height, width], "counts": each} for each in counts])  # (H, W, N)
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(2, 0, 1))).bool()


def encode_binary_masks(masks: Tensor, height: int, width: int) -> list[bytes]:
    """Encodes masks (N, h, w), bool or in [0, 1] and cut at 0.5, as N counts of RLE of another size."""
    counts: list[bytes] = []
    for some in masks.split(16):  # a hundred masks of a large photograph at once would take gigabytes
        large = F.interpolate(some[:, None].float(), (height, width), mode="bilinear")[:, 0] > 0.5
        columns = np.asfortranarray(large.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
        counts += [rle["counts"] for rle in mask_util.encode(columns)]
    return counts


def _encode_polygons(polygons: list[Any], height: int, width: int) -> bytes:
    rings = [np.asarray(polygon, dtype=np.float64) for polygon in polygons]
    rings = [ring for ring in rings if ring.ndim != 1 or ring.size >= _MIN_RING]
    if not rings or not all(r.ndim == 1 and r.size % 2 == 0 and np.isfinite(r).all() for r in rings):
        raise ValueError("a polygon must be three or more pairs of finite numbers")
    parts = mask_util.frPyObjects([ring.tolist() for ring in rings], height, width)
    return bytes(mask_util.merge(parts)["counts"])


def _fill(runs: list[Any], pixels: int) -> bool:
    return all(type(run) is int and run >= 0 for run in runs) and sum(runs) == pixels


def _runs(counts: bytes) -> list[int]:
    """Decompresses counts: 5 bits per byte, then differences to the run before the last."""
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
