"""The two pair losses: neighbours of like colour, and neighbours that a pseudo mask joins, agree."""

from torch import Tensor

from boxteacher.losses.pairs import PairSelection
from boxteacher.neighbours import Offset, neighbour_offsets, shifted
from boxteacher.scoring import smooth_masks


def color_pair_selection(
    box_masks: Tensor,
    color_similarity: Tensor,
    image_index: Tensor,
    threshold: float,
    kernel_size: int,
    dilation: int,
) -> PairSelection:
    """Pairs whose centre lies in the box and whose colours are alike (BoxInst, Eq. 6).

    Args:
        box_masks: (M, h, w) bool.
        color_similarity: (B, kernel_size² − 1, h, w).
        image_index: (M,) int64, each mask's image.
        threshold: least similarity, > 0.
        kernel_size: side of the window of neighbours, odd.
        dilation: cells between neighbours in the window.
    """
    alike = color_similarity >= threshold  # (B, 8, h, w) bool
    channel = {offset: k for k, offset in enumerate(neighbour_offsets(kernel_size, dilation))}
    return lambda offset: box_masks & alike[:, channel[offset]][image_index]


def affinity_pair_selection(
    box_masks: Tensor, pseudo_masks: Tensor, valid: Tensor, threshold: float
) -> PairSelection:
    """Pairs whose centre lies in the box and that the smoothed pseudo mask joins (BoxTeacher, Eq. 5).

    Args:
        box_masks: (M, h, w) bool.
        pseudo_masks: (M, h, w) in [0, 1].
        valid: (M, h, w) bool; pairs whose neighbour is not valid do not count.
        threshold: least affinity, > 0.
    """
    smooth = smooth_masks(pseudo_masks)  # (M, h, w)
    valid_float = valid.float()
    return lambda offset: box_masks & (mask_affinity(smooth, valid_float, offset) >= threshold)


def mask_affinity(smooth: Tensor, valid: Tensor, offset: Offset) -> Tensor:
    """How likely each cell and its neighbour bear one label: a·b + (1 − a)(1 − b); 0 if not valid.

    Args:
        smooth: (M, h, w) in [0, 1], a smoothed pseudo mask.
        valid: (M, h, w), 1 or 0.
        offset: where the neighbour lies.

    Returns:
        (M, h, w) in [0, 1].
    """
    neighbour = shifted(smooth, offset)
    return (smooth * neighbour + (1 - smooth) * (1 - neighbour)) * shifted(valid, offset)


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
