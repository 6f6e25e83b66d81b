"""SOLOv2's masks: decoded by kernels, scored, and the best of them selected by matrix NMS."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.adapter import full_precision, mask_quality
from boxteacher_adapters.parts.grouping import rank_in_group
from boxteacher_adapters.parts.maps import flatten_levels

_LEVEL_STRIDES = (8, 8, 16, 32, 32)  # of the maps that the levels' grids are laid over
_NMS_SIGMA = 2.0
_CELLS_AT_ONCE = 256  # number of cells per image whose masks are scored together; bounds memory


@dataclass(frozen=True)
class Selection:
    """Thresholds and limits of `select_objects`.

    Attributes:
        min_probability: class probability that a cell must exceed.
        max_cells: number of cells per image whose masks are scored, the most confident first.
        max_entries: number of pairs of cell and class per image that go through matrix NMS, the best first.
        min_score: minimum score after matrix NMS.
        max_objects: maximum number of objects per image.
    """

    min_probability: float
    max_cells: float
    max_entries: int
    min_score: float
    max_objects: int = 100

    def up_to(self, objects: int) -> "Selection":
        """This selection for up to `objects` objects per image, with more cells and entries in proportion."""
        factor = max(1.0, objects / self.max_objects)
        return replace(
            self,
            max_cells=self.max_cells * factor,
            max_entries=int(self.max_entries * factor),
            max_objects=objects,
        )


@dataclass(frozen=True)
class Objects:
    """K objects; images in order, best object first in each.

    Attributes:
        scores: (K,) class probability times mask quality, decayed by matrix NMS.
        class_scores: (K,) class probability, decayed likewise.
        labels: (K,) int64.
        image_index: (K,) int64.
        logits: (K, H / 4, W / 4) of the masks, at the centers of the cells.
    """

    scores: Tensor
    class_scores: Tensor
    labels: Tensor
    image_index: Tensor
    logits: Tensor

    def only(self, index: Tensor) -> "Objects":
        """The objects at an index, or in a mask of them."""
        return Objects(*(getattr(self, each.name)[index] for each in fields(self)))


def select_objects(
    category_maps: Sequence[Tensor], kernels: Tensor, mask_features: Tensor, selection: Selection
) -> Objects:
    """The best objects of each image.

    Args:
        category_maps: (B, C, G_i, G_i) logits of each level.
        kernels: (B, S, E) of the cells.
        mask_features: (B, E, H / 4, W / 4).
        selection: thresholds and limits.
    """
    peaks = flatten_levels([_peaks(maps.float().sigmoid()) for maps in category_maps])  # (B, S, C)
    peaks = torch.where(peaks > selection.min_probability, peaks, 0.0)
    confidence = peaks.amax(2)  # (B, S)
    # Masks are costly: only as many cells are scored as the fullest image has, which synchronizes with the
    # device. A trace, whose numbers are fixed, scores them all.
    tracing = torch.compiler.is_compiling()
    positive = confidence.shape[1] if tracing else int((confidence > 0).sum(1).max())
    cell = confidence.topk(max(int(min(positive, selection.max_cells)), 1), 1).indices  # (B, n)
    image = torch.arange(len(cell), device=cell.device)[:, None]  # (B, 1)
    area, quality = _area_and_quality(mask_features, kernels[image, cell])  # (B, n) each
    strides = [
        torch.full((maps.shape[-1] ** 2,), stride, device=maps.device)
        for maps, stride in zip(category_maps, _LEVEL_STRIDES, strict=True)
    ]
    # As in the original, an object's area in cells of the mask grid exceeds its level's stride.
    quality = torch.where(area > torch.cat(strides)[cell], quality, 0.0)

    entries = (peaks[image, cell] * quality[..., None]).flatten(1)  # (B, n · C)
    scores, entry = entries.topk(min(selection.max_entries, entries.shape[1]), 1)  # (B, N)
    of_cell, labels = entry // peaks.shape[2], entry % peaks.shape[2]  # (B, N) each
    logits = _decode(mask_features, kernels[image, cell[image, of_cell]])  # (B, N, h, w)
    decay = matrix_nms(logits > 0, scores, labels)  # (B, N)
    best, order = (scores * decay).topk(min(selection.max_objects, scores.shape[1]), 1)
    image, rank = ((best > 0) & (best >= selection.min_score)).nonzero(as_tuple=True)  # (K,) each
    chosen = order[image, rank]
    scores = best[image, rank]
    class_scores = scores / quality[image, of_cell[image, chosen]]
    return Objects(scores, class_scores, labels[image, chosen], image, logits[image, chosen])


def _area_and_quality(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Area in grid cells of each mask, and its mean probability there: (B, n) each, of kernels (B, n, E)."""
    areas, qualities = [], []
    for some in kernels.split(_CELLS_AT_ONCE, 1):
        logits = _decode(features, some)  # (B, n', h, w)
        areas.append((logits > 0).sum((2, 3)))
        qualities.append(mask_quality(logits.sigmoid().flatten(0, 1)).view(some.shape[:2]))
    return torch.cat(areas, 1), torch.cat(qualities, 1)


def predict_masks(features: Tensor, image_index: Tensor, kernels: Tensor) -> Tensor:
    """Mask logits (M, h, w).

    Args:
        features: (B, E, h, w).
        image_index: (M,) int64 of the features that each mask is decoded from.
        kernels: (M, E).
    """
    # The kernels of each image are laid side by side, so that the features are not copied for each mask. The
    # number of the fullest image's kernels must be known, which synchronizes with the device.
    column = rank_in_group(image_index, torch.zeros_like(image_index))  # (M,)
    count = int(image_index.bincount(minlength=len(features)).max())
    table = kernels.new_zeros(len(features), count, kernels.shape[1])  # (B, N, E)
    return _decode(features, table.index_put((image_index, column), kernels))[image_index, column]


def _decode(features: Tensor, kernels: Tensor) -> Tensor:
    """Mask logits (B, N, h, w) of features (B, E, h, w) under kernels (B, N, E)."""
    with full_precision(features.device):
        return torch.bmm(kernels.float(), features.float().flatten(2)).unflatten(2, features.shape[2:])


def centers_to_grid(maps: Tensor, stride: int) -> Tensor:
    """Values moved from the centers of the cells to the pixels that the mask grid's cells stand for.

    A cell of a map that is enlarged by `interpolate(…, align_corners=False)` stands for the center of its
    stride × stride pixels, which for an even stride is half a pixel above and left of pixel
    (stride // 2, stride // 2). Values between centers are bilinear; beyond the last they are repeated.

    Args:
        maps: (N, h, w).
        stride: pixels per cell.

    Returns:
        (N, h, w).
    """
    offset = (stride // 2 - (stride - 1) / 2) / stride  # in cells
    padded = F.pad(maps[:, None], (0, 1, 0, 1), mode="replicate")[:, 0]  # (N, h + 1, w + 1)
    rows = torch.lerp(padded[:, :-1], padded[:, 1:], offset)  # (N, h, w + 1)
    return torch.lerp(rows[..., :-1], rows[..., 1:], offset)


def _peaks(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) ≥ 0 where a cell is the maximum of itself and those above, left and above left."""
    maximum = F.max_pool2d(maps, 2, stride=1, padding=1)[..., :-1, :-1]
    return torch.where(maps == maximum, maps, 0.0)


def matrix_nms(masks: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Factor by which better masks of its class decay each mask's score (SOLOv2, Sec. 3.3).

    The minimum over the better masks of exp(−σ (iou² − other²)), where `other` is the better mask's own
    maximum IoU with a mask better still.

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
