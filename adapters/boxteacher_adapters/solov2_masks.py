"""SOLOv2's masks: drawn from kernels, scored, and the best of them chosen by matrix NMS."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.precision import full_precision
from boxteacher.scoring import mask_quality
from boxteacher_adapters.parts.grouping import rank_in_group

_LEVEL_STRIDES = (8, 8, 16, 32, 32)  # of the maps that the levels' grids are laid over
_NMS_SIGMA = 2.0
_OBJECTS_PER_IMAGE = 100
_CELLS_AT_ONCE = 256  # whose masks are in memory while they are scored


@dataclass(frozen=True)
class Selection:
    """What is looked at, and what of it is kept.

    Attributes:
        least_probability: that a class of a cell must exceed.
        most_cells: per image, surest first, whose masks are scored.
        most_entries: cells and classes per image, best first, that go through matrix NMS.
        least_score: after matrix NMS.
    """

    least_probability: float
    most_cells: float
    most_entries: int
    least_score: float


@dataclass(frozen=True)
class Objects:
    """K objects; images in order, best object first in each.

    Attributes:
        scores: (K,) class probability times mask quality, decayed by matrix NMS.
        class_scores: (K,) class probability, decayed likewise.
        labels: (K,) int64.
        image_index: (K,) int64.
        logits: (K, H / 4, W / 4) of the masks, at the middles of the cells.
    """

    scores: Tensor
    class_scores: Tensor
    labels: Tensor
    image_index: Tensor
    logits: Tensor

    def only(self, chosen: Tensor) -> "Objects":
        """Those of the index or mask `chosen`."""
        return Objects(*(getattr(self, each.name)[chosen] for each in fields(self)))


def select_objects(
    category_maps: Sequence[Tensor], kernels: Tensor, mask_features: Tensor, selection: Selection
) -> Objects:
    """The best objects of each image, 100 at most.

    Args:
        category_maps: (B, C, G_i, G_i) logits of each level.
        kernels: (B, S, E) of the cells.
        mask_features: (B, E, H / 4, W / 4).
        selection: what is looked at and kept.
    """
    peaks = by_cell([_peaks(maps.float().sigmoid()) for maps in category_maps])  # (B, S, C)
    peaks = torch.where(peaks > selection.least_probability, peaks, 0.0)
    surest = peaks.amax(2)  # (B, S)
    cell = surest.topk(_cells_to_draw(surest, selection.most_cells), 1).indices  # (B, n)
    image = torch.arange(len(cell), device=cell.device)[:, None]  # (B, 1)
    area, quality = _area_and_quality(mask_features, kernels[image, cell])  # (B, n) each
    quality = torch.where(area > _strides(category_maps)[cell], quality, 0.0)

    entries = (peaks[image, cell] * quality[..., None]).flatten(1)  # (B, n · C)
    scores, entry = entries.topk(min(selection.most_entries, entries.shape[1]), 1)  # (B, N)
    of_cell, labels = entry // peaks.shape[2], entry % peaks.shape[2]  # (B, N) each
    logits = _draw(mask_features, kernels[image, cell[image, of_cell]])  # (B, N, h, w)
    decay = matrix_nms(logits > 0, scores, labels)  # (B, N)
    best, order = (scores * decay).topk(min(_OBJECTS_PER_IMAGE, scores.shape[1]), 1)
    image, place = ((best > 0) & (best >= selection.least_score)).nonzero(as_tuple=True)  # (K,) each
    chosen = order[image, place]
    scores = best[image, place]
    class_scores = scores / quality[image, of_cell[image, chosen]]
    return Objects(scores, class_scores, labels[image, chosen], image, logits[image, chosen])


def _cells_to_draw(surest: Tensor, most: float) -> int:
    """How many cells of each image have their masks scored, by the cells' surest class (B, S)."""
    # Masks cost; how many are worth one must be known, and the device waited for. A trace, whose
    # numbers are fixed, scores them all.
    worth = surest.shape[1] if torch.compiler.is_compiling() else int((surest > 0).sum(1).max())
    return max(int(min(worth, most)), 1)


def _area_and_quality(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Grid cells of each mask, and its mean probability there: (B, n) each, of kernels (B, n, E)."""
    areas, qualities = [], []
    for some in kernels.split(_CELLS_AT_ONCE, 1):
        logits = _draw(features, some)  # (B, n', h, w)
        areas.append((logits > 0).sum((2, 3)))
        qualities.append(mask_quality(logits.sigmoid().flatten(0, 1)).view(some.shape[:2]))
    return torch.cat(areas, 1), torch.cat(qualities, 1)


def _strides(category_maps: Sequence[Tensor]) -> Tensor:
    """(S,) of the cells' levels: an object has more cells of the mask grid than this."""
    return torch.cat(
        [
            torch.full((maps.shape[-1] ** 2,), stride, device=maps.device)
            for maps, stride in zip(category_maps, _LEVEL_STRIDES, strict=True)
        ]
    )


def by_cell(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, D, G_i, G_i) of all levels, end to end: (B, S, D)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)


def draw_masks(features: Tensor, image: Tensor, kernels: Tensor) -> Tensor:
    """Mask logits (M, h, w).

    Args:
        features: (B, E, h, w).
        image: (M,) int64, whose features each mask is drawn from.
        kernels: (M, E).
    """
    # The kernels of each image are laid side by side, so that the features are not copied for each mask;
    # how many the fullest image has must be known, and the device waited for.
    place = rank_in_group(image, torch.zeros_like(image))  # (M,) among its image's
    most = int(image.bincount(minlength=len(features)).max())
    table = kernels.new_zeros(len(features), most, kernels.shape[1])  # (B, N, E)
    return _draw(features, table.index_put((image, place), kernels))[image, place]


def _draw(features: Tensor, kernels: Tensor) -> Tensor:
    """Mask logits (B, N, h, w) of features (B, E, h, w) under kernels (B, N, E)."""
    with full_precision(features.device):
        return torch.bmm(kernels.float(), features.float().flatten(2)).unflatten(2, features.shape[2:])


def _peaks(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) ≥ 0 where a cell is the greatest of itself and those above, left and above left."""
    greatest = F.max_pool2d(maps, 2, stride=1, padding=1)[..., :-1, :-1]
    return torch.where(maps == greatest, maps, 0.0)


def matrix_nms(masks: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """How much each mask's score is to shrink for the better ones of its class (SOLOv2, Sec. 3.3).

    exp(−σ (iou² − other²)) for the better mask where it is least, `other` being that mask's own greatest
    IoU with a mask better still.

    Args:
        masks: (B, N, h, w) bool.
        scores: (B, N); of equal ones, the earlier is better.
        labels: (B, N) int64.

    Returns:
        (B, N) in (0, 1].
    """
    flat = masks.flatten(2).float()  # (B, N, h · w)
    with full_precision(masks.device):
        intersection = flat @ flat.transpose(1, 2)  # (B, N, N)
    area = flat.sum(2)  # (B, N)
    union = area[:, :, None] + area[:, None, :] - intersection
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, N)
    better = (rank[:, :, None] < rank[:, None, :]) & (labels[:, :, None] == labels[:, None, :])
    iou = torch.where(better, intersection / union.clamp(min=1), 0.0).square()  # (B, better one, worse one)
    excess = iou - iou.amax(1)[:, :, None]  # (B, N, N)
    return torch.exp(-_NMS_SIGMA * excess.amax(1).clamp(min=0))
