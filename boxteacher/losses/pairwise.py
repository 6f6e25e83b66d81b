"""The two pair losses: neighbours of like colour, and neighbours that a pseudo mask joins, agree."""

from collections.abc import Callable

import torch
from torch import Tensor

from boxteacher.losses.canvas import BoxCanvas
from boxteacher.losses.pairs import PairRelation
from boxteacher.neighbours import Offset, neighbour_offsets, pair_slices, shifted
from boxteacher.scoring import smooth_masks


def color_relation(
    color_similarity: Tensor, image_index: Tensor, threshold: float, kernel_size: int, dilation: int
) -> PairRelation:
    """Pairs whose colours are alike (BoxInst, Eq. 6).

    Args:
        color_similarity: (B, kernel_size² − 1, h, w), as `boxteacher.targets.color_similarity` gives it.
        image_index: (M,) int64, each mask's image.
        threshold: least similarity, > 0.
        kernel_size: side of the window of neighbours, odd, at most 9.
        dilation: cells between neighbours in the window.
    """
    alike = color_similarity >= threshold  # (B, 8, h, w) bool
    offsets = neighbour_offsets(kernel_size, dilation)
    half = len(offsets) // 2
    bit = {offset: 1 << k for k, offset in enumerate(offsets[half:])}
    codes = torch.zeros_like(alike[:, 0], dtype=torch.uint8 if half <= 8 else torch.int64)  # (B, h, w)
    for k, offset in enumerate(offsets[half:]):
        # Similarity is 0 where the neighbour is not valid; the pair's other order knows it all the same.
        either = alike[:, half + k] | shifted(alike[:, half - 1 - k], offset)  # (B, h, w)
        codes |= either.to(codes.dtype) * bit[offset]

    def on(canvas: BoxCanvas) -> Callable[[Offset], Tensor]:
        packed = canvas.pack(codes, image_index)  # (R, S)
        return lambda offset: (packed[pair_slices(offset)[0]] & bit[offset]) != 0

    return on


def affinity_relation(pseudo_masks: Tensor, mask_index: Tensor, threshold: float) -> PairRelation:
    """Pairs that the smoothed pseudo mask joins (BoxTeacher, Eq. 5).

    Args:
        pseudo_masks: (T, h, w), of each target; bool, or in [0, 1].
        mask_index: (M,) int64, which of them each mask is to reproduce.
        threshold: least affinity, > 0.
    """

    def on(canvas: BoxCanvas) -> Callable[[Offset], Tensor]:
        smooth = smooth_masks(canvas.pack(pseudo_masks, mask_index))  # (R, S)

        def joined(offset: Offset) -> Tensor:
            here, there = pair_slices(offset)
            return mask_affinity(smooth[here], smooth[there]) >= threshold

        return joined

    return on


def mask_affinity(smooth: Tensor, neighbour: Tensor) -> Tensor:
    """How likely a cell and its neighbour bear one label: a·b + (1 − a)(1 − b) (BoxTeacher, Eq. 5).

    Args:
        smooth: any shape, in [0, 1], from `smooth_masks`.
        neighbour: of the same shape, the neighbour's.
    """
    return smooth * neighbour + (1 - smooth) * (1 - neighbour)


def color_pairwise_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean of the pair term over all pairs of all masks (BoxInst, Eq. 6); 0 without pairs.

    Args:
        sums: (M,) of the pair term over each mask's pairs.
        counts: (M,) of pairs.
    """
    return sums.sum() / counts.sum().clamp(min=1)


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
    return (per_mask * confidence).sum() / (confidence > 0).sum().clamp(min=1)
