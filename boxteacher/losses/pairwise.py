"""The two pair losses: neighbors of similar color, and neighbors that a pseudo mask joins, agree."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.distributed import global_count
from boxteacher.grid import Offset, neighbor_offsets, pair_slices, shifted
from boxteacher.losses.packing import PackedBoxes
from boxteacher.losses.pairs import PairRelation


def color_relation(color_similarity: Tensor, image_index: Tensor, threshold: float = 0.3) -> PairRelation:
    """Pairs of similar color (BoxInst, Eq. 6).

    Args:
        color_similarity: (B, 8, h, w), as `boxteacher.targets.color_similarity` gives it.
        image_index: (M,) int64, each mask's image.
        threshold: minimum similarity, in (0, 1].
    """
    alike = color_similarity >= threshold  # (B, 8, h, w) bool
    offsets = neighbor_offsets()
    bit = {offset: 1 << k for k, offset in enumerate(offsets[4:])}
    codes = torch.zeros_like(alike[:, 0], dtype=torch.uint8)  # (B, h, w)
    for k, offset in enumerate(offsets[4:]):
        # A pair is similar if it is so from either cell: similarity to a neighbor that is not valid is 0.
        either = alike[:, 4 + k] | shifted(alike[:, 3 - k], offset)  # (B, h, w)
        codes |= either.to(torch.uint8) * bit[offset]

    def on(packed: PackedBoxes) -> Callable[[Offset], Tensor]:
        cells = packed.pack(codes, image_index)  # (R, S)
        return lambda offset: (cells[pair_slices(offset)[0]] & bit[offset]) != 0

    return on


def affinity_relation(pseudo_masks: Tensor, mask_index: Tensor, threshold: float = 0.5) -> PairRelation:
    """Pairs that the smoothed pseudo mask joins (BoxTeacher, Eq. 5).

    Args:
        pseudo_masks: (T, h, w), of each target; bool, or in [0, 1].
        mask_index: (M,) int64, the pseudo mask that each mask is compared with.
        threshold: minimum affinity, in (0, 1].
    """

    def on(packed: PackedBoxes) -> Callable[[Offset], Tensor]:
        smooth = smooth_masks(packed.pack(pseudo_masks, mask_index)[None])[0]  # (R, S)

        def joined(offset: Offset) -> Tensor:
            here, there = pair_slices(offset)
            return mask_affinity(smooth[here], smooth[there]) >= threshold

        return joined

    return on


def smooth_masks(masks: Tensor) -> Tensor:
    """Each mask (N, h, w) averaged with its 3 × 3 mean; cells outside the grid count as 0."""
    values = masks.float()
    return (values + F.avg_pool2d(values, 3, stride=1, padding=1)) / 2


def mask_affinity(mask: Tensor, neighbor: Tensor) -> Tensor:
    """How likely a cell and its neighbor have one label: a·b + (1 − a)(1 − b) (BoxTeacher, Eq. 5).

    Args:
        mask: of any shape, in [0, 1].
        neighbor: the neighbor's value, of the same shape.
    """
    return mask * neighbor + (1 - mask) * (1 - neighbor)


def color_pairwise_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean of the pair term over all pairs of all masks (BoxInst, Eq. 6); 0 without pairs.

    Args:
        sums: (M,) of the pair term over each mask's pairs.
        counts: (M,) of pairs.
    """
    return sums.sum() / global_count(counts.sum(), minimum=1)


def noise_reduced_affinity_loss(sums: Tensor, counts: Tensor, confidence: Tensor) -> Tensor:
    """Each mask's mean of the pair term, weighted by confidence (BoxTeacher, Eq. 6).

    Args:
        sums: (M,) of the pair term over each mask's pairs.
        counts: (M,) of pairs.
        confidence: (M,) in [0, 1]; 0 where the target has no pseudo mask.

    Returns:
        Scalar: the weighted sum over the number of masks with confidence > 0; 0 if there is none.
    """
    per_mask = sums / counts.clamp(min=1)  # (M,)
    return (per_mask * confidence).sum() / global_count((confidence > 0).sum(), minimum=1)
