"""How far a pseudo mask is to be trusted."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ConfidenceFormula = Literal["released", "paper"]


def mask_quality(mask_probabilities: Tensor, threshold: float = 0.5, enlargement: int = 1) -> Tensor:
    """Mean probability over a mask's own pixels, those above the threshold (BoxTeacher, Eq. 2).

    Args:
        mask_probabilities: (K, h, w) in [0, 1].
        threshold: a pixel belongs to the mask above it.
        enlargement: how many times larger, by bilinear interpolation, the mask is before its pixels are
            looked at. The released code enlarges to the image's size.

    Returns:
        (K,) in [0, 1]; 0 for a mask without pixels.
    """
    total = mask_probabilities.new_zeros(mask_probabilities.shape[:1])  # (K,)
    count = torch.zeros_like(total)  # (K,)
    for pixels in _phases(mask_probabilities, enlargement):
        foreground = pixels > threshold  # (K, h, w)
        total += (pixels * foreground).sum((1, 2))
        count += foreground.sum((1, 2))
    return total / count.clamp(min=1)


def _phases(masks: Tensor, enlargement: int) -> Iterator[Tensor]:
    """An enlarged mask's pixels as enlargement² grids (K, h, w), so that it never is in memory as a whole.

    Cell i becomes pixel `enlargement · i + enlargement // 2`; beyond the outermost cells their values go on.
    """
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")[:, 0] if enlargement > 1 else masks
    for rows in _phases_along(padded, -2, enlargement):
        yield from _phases_along(rows, -1, enlargement)


def _phases_along(padded: Tensor, dimension: int, enlargement: int) -> Iterator[Tensor]:
    if enlargement == 1:
        yield padded
        return
    size = padded.shape[dimension] - 2
    for phase in range(enlargement):
        # Later phases lie nearer to the next cell: the grid's first pixels are before its first cell.
        start = 1 if phase < enlargement - enlargement // 2 else 0
        cells = padded.narrow(dimension, start, size)
        yield torch.lerp(cells, padded.narrow(dimension, start + 1, size), phase / enlargement)


def ranking_score(scores: Tensor, quality: Tensor) -> Tensor:
    """√(score · quality), (K,): the order in which candidates choose their boxes (BoxTeacher, Alg. 1)."""
    return (scores * quality).sqrt()


def mask_confidence(scores: Tensor, quality: Tensor, formula: ConfidenceFormula = "released") -> Tensor:
    """Mask-aware confidence (BoxTeacher, Eq. 3).

    Args:
        scores: (K,) detection scores in [0, 1].
        quality: (K,) in [0, 1], from `mask_quality`.
        formula: "paper" is √(score · quality); "released", that of the authors' code and of its numbers,
            is √(√score · quality).

    Returns:
        (K,) in [0, 1].
    """
    return ((scores.sqrt() if formula == "released" else scores) * quality).sqrt()


def smooth_masks(masks: Tensor) -> Tensor:
    """Each mask (…, h, w) averaged with its 3 × 3 mean; cells outside the grid count as 0."""
    values = masks.float()
    padded = F.pad(values, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]  # (…, h, w + 2)
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # (…, h, w)
    return (values + total / 9) / 2
