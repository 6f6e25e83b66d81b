"""Color refinement: masks are fitted to the colors of the image, on a crop round each box.

Nothing is trained, so any segmenter's detections can pass through it, and pseudo masks too. Each cell of a
crop has a unary term, the mask's own logit plus the log ratio of two color histograms (of the mask, and of
what lies outside the box), and is pulled to its neighbors of similar color by mean-field steps, as in GrabCut
(Rother et al., SIGGRAPH 2004) and dense CRFs (Krähenbühl and Koltun, NeurIPS 2011). The colors count as far
as the two histograms differ. Colors outside the box are surely background, however wrong the mask is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from boxteacher.crops import cells_in_box, cells_in_image, crop_images, crop_masks, paste_crops
from boxteacher.errors import InputError
from boxteacher.inputs import cast_images_like
from boxteacher.precision import full_precision
from boxteacher.protocol import Detections
from boxteacher.targets import rgb_to_lab
from boxteacher.value_checks import ValueChecks

_BINS = 8  # per color axis, over the crop's own range
_BIN_FLOOR = 1e-3  # added to both histograms' shares
_SURE = 0.7  # probability above which a cell's color surely belongs to the object
_UNARY_LIMIT = 4.0
_ROUNDS = 2  # of new histograms
_STEPS = 4  # of mean field, per round
_COLOR_SCALE = 8.0  # standard deviation in Lab of the ties between neighbors
_DISTANCES = (1, 2, 4)  # in cells
_CHUNK = 32  # masks that are refined at once


def refine_detections(
    images: Sequence[Any], detections: Sequence[Detections], *, chunk: int = _CHUNK
) -> list[Detections]:
    """Detections whose masks are fitted to the colors of their images, cut to their boxes.

    Args:
        images: tensors (3, H_i, W_i), RGB in [0, 1], or others that `cast_images` takes.
        detections: torchvision's, one dict per image, with masks (K, 1, h_i, w_i) that cover the image; they
            may have been found at another scale than that of `images`.
        chunk: number of masks that are refined at once, which bounds the memory beside the result's.

    Returns:
        Detections in pixels of `images`, with mask probabilities (K, 1, H_i, W_i).

    Raises:
        InputError: the numbers of images and detections differ, detections have no masks, or `images` is not
            a list of images.
    """
    if len(images) != len(detections):
        raise InputError(f"{len(images)} images and {len(detections)} detections: give one dict per image")
    for each in detections:
        if "masks" not in each:
            raise InputError(f"detections have {', '.join(each)} and no masks: nothing can be refined")
    found = _cast(images, detections[0]["boxes"]) if detections else []
    return [_refined(image, each, chunk) for image, each in zip(found, detections, strict=True)]


def _cast(images: Sequence[Any], boxes: Tensor) -> list[Tensor]:
    """Images (3, H_i, W_i) float32 in [0, 1]; arrays and PIL images on the device of the boxes."""
    return cast_images_like(torch.zeros((), device=boxes.device), images, ValueChecks(cpu_only=True))


def _refined(image: Tensor, detections: Detections, chunk: int) -> Detections:
    masks, boxes = detections["masks"], detections["boxes"]  # (K, 1, h, w), (K, 4)
    height, width = image.shape[-2:]
    scale = boxes.new_tensor([width / masks.shape[-1], height / masks.shape[-2]]).repeat(2)  # (4,)
    parts = [masks.new_zeros(0, height, width)]
    for some, own in zip((boxes * scale).split(chunk), masks.split(chunk), strict=True):
        parts.append(refine_masks(image, some, own[:, 0]))
    return {**detections, "boxes": boxes * scale, "masks": torch.cat(parts)[:, None]}


def refine_masks(image: Any, boxes: Tensor, masks: Tensor) -> Tensor:
    """Masks of one image fitted to its colors, each 0 outside its box.

    Args:
        image: tensor (3, H, W), RGB in [0, 1], or another that `cast_images` takes.
        boxes: (N, 4) `x0, y0, x1, y1` in pixels of the image.
        masks: (N, h, w) probabilities that cover the image, possibly at another scale.

    Returns:
        (N, H, W) probabilities.

    Raises:
        InputError: `image` is no such image.
    """
    (image,) = _cast([image], boxes)
    height, width = image.shape[-2:]
    scale = boxes.new_tensor([masks.shape[-1] / width, masks.shape[-2] / height]).repeat(2)  # (4,)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    crops = refine_crops(
        crop_images([image], boxes, index),
        crop_masks(masks, boxes * scale),
        cells_in_image(boxes, boxes.new_tensor([[height, width]])),
    )
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    return paste_crops(crops, boxes, rows, columns)


def refine_crops(colors: Tensor, masks: Tensor, in_image: Tensor) -> Tensor:
    """Masks on crops (see `boxteacher.crops`) fitted to the crops' colors; 0 outside their boxes.

    Args:
        colors: (N, 3, S, S), RGB in [0, 1].
        masks: (N, S, S) probabilities.
        in_image: (N, S, S) bool.

    Returns:
        (N, S, S) probabilities.
    """
    with full_precision(masks.device):
        lab = rgb_to_lab(colors.clamp(0, 1))  # (N, 3, S, S)
        in_box = cells_in_box(masks.device) & in_image  # (N, S, S)
        bins = _color_bins(lab, in_image)  # (N, S · S)
        outside = _histogram(bins, (in_image & ~in_box).float())  # (N, bins³)
        masks = masks.float() * in_box
        own = masks.clamp(1e-4, 1 - 1e-4).logit()  # (N, S, S)
        separation = _separation(_histogram(bins, (masks > _SURE).float()), outside)  # (N,)
        separation = separation[:, None, None]
        has_outside = outside.sum(1, keepdim=True) > 0  # (N, 1); not if the box covers the image
        ties = _ties(lab, in_image)
        for _ in range(_ROUNDS):
            ratio = (_histogram(bins, masks) + _BIN_FLOOR).log() - (outside + _BIN_FLOOR).log()
            ratio = ratio * has_outside  # (N, bins³)
            color = ratio.gather(1, bins).view_as(masks)  # (N, S, S)
            unary = (own + _color_weight(separation) * color).clamp(-_UNARY_LIMIT, _UNARY_LIMIT)
            for _ in range(_STEPS):
                votes = _neighbors_vote(2 * masks - 1, ties)  # (N, S, S)
                masks = (unary + _tie_weight(separation) * votes).sigmoid() * in_box
    return masks


def _color_weight(separation: Tensor) -> Tensor:
    return 0.3 + 0.7 * separation


def _tie_weight(separation: Tensor) -> Tensor:
    return (1 + 4 * separation) / 12


def _color_bins(lab: Tensor, in_image: Tensor) -> Tensor:
    """The bin (N, S · S) int64 of each cell's color (N, 3, S, S)."""
    inside = in_image[:, None]  # (N, 1, S, S)
    low = lab.masked_fill(~inside, torch.inf).amin((2, 3), keepdim=True)  # (N, 3, 1, 1)
    high = lab.masked_fill(~inside, -torch.inf).amax((2, 3), keepdim=True)
    bins = ((lab - low) / (high - low).clamp(min=1e-3) * _BINS).clamp(0, _BINS - 1).long()  # (N, 3, S, S)
    return ((bins[:, 0] * _BINS + bins[:, 1]) * _BINS + bins[:, 2]).flatten(1)


def _histogram(bins: Tensor, weights: Tensor) -> Tensor:
    """Shares (N, bins³) of weights (N, S, S) by color, smoothed by 1, 2, 1 along each axis; 0 for none."""
    counts = weights.new_zeros(len(bins), _BINS**3).scatter_add_(1, bins, weights.flatten(1))
    cube = counts.unflatten(1, (_BINS, _BINS, _BINS))
    for axis in (1, 2, 3):
        size = _BINS - 1
        lower, upper = cube.narrow(axis, 0, size), cube.narrow(axis, 1, size)
        blurred = cube / 2
        blurred.narrow(axis, 1, size).add_(lower, alpha=0.25)
        blurred.narrow(axis, 0, size).add_(upper, alpha=0.25)
        cube = blurred
    shares = cube.flatten(1)
    return shares / shares.sum(1, keepdim=True).clamp(min=1e-6)


def _separation(a: Tensor, b: Tensor) -> Tensor:
    """1 − Σ√(ab), (N,), of histograms (N, bins³): 0 if they are equal or one is empty, 1 if disjoint."""
    known = (a.sum(1) > 0) & (b.sum(1) > 0)
    return (1 - (a * b).sqrt().sum(1)).clamp(min=0) * known


Ties = list[tuple[tuple[int, int], Tensor]]
"""For each direction, rows and columns to the neighbor, and how strongly it is tied, (N, S, S)."""


def _ties(lab: Tensor, in_image: Tensor) -> Ties:
    ties = []
    for step in _DISTANCES:
        for down, right in ((0, step), (step, 0), (step, step), (step, -step)):
            neighbor = torch.roll(lab, (-down, -right), (2, 3))
            difference = (lab - neighbor).square().sum(1)  # (N, S, S)
            weight = torch.exp(-difference / (2 * _COLOR_SCALE**2)) / (down**2 + right**2) ** 0.5
            weight *= in_image & torch.roll(in_image, (-down, -right), (1, 2))
            weight[:, weight.shape[1] - down :] = 0  # rolled over the border
            weight[:, :, : max(0, -right)] = 0
            weight[:, :, weight.shape[2] - max(0, right) :] = 0
            ties.append(((down, right), weight))
    return ties


def _neighbors_vote(masks: Tensor, ties: Ties) -> Tensor:
    """Sum (N, S, S) over the neighbors of each cell, in both directions, of their value times the tie."""
    total = torch.zeros_like(masks)
    for (down, right), weight in ties:
        total += weight * torch.roll(masks, (-down, -right), (1, 2))
        total += torch.roll(weight * masks, (down, right), (1, 2))
    return total
