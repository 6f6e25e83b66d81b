"""How far a pseudo mask is to be trusted."""

from typing import Literal

from torch import Tensor

ConfidenceFormula = Literal["released", "paper"]


def mask_quality(mask_probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """Mean probability over a mask's own pixels, those above the threshold (BoxTeacher, Eq. 2).

    Args:
        mask_probabilities: (K, h, w) in [0, 1].
        threshold: probability above which a pixel belongs to the mask.

    Returns:
        (K,) in [0, 1]; 0 for a mask without pixels.
    """
    foreground = (mask_probabilities > threshold).to(mask_probabilities.dtype)  # (K, h, w)
    total = (mask_probabilities * foreground).sum((1, 2))
    return total / foreground.sum((1, 2)).clamp(min=1)


def ranking_score(scores: Tensor, quality: Tensor) -> Tensor:
    """√(score · quality), (K,): the order in which candidates choose their boxes (BoxTeacher, Alg. 1)."""
    return (scores * quality).sqrt()


def mask_confidence(scores: Tensor, quality: Tensor, formula: ConfidenceFormula = "released") -> Tensor:
    """Mask-aware confidence (BoxTeacher, Eq. 3).

    Args:
        scores: (K,) detection scores in [0, 1].
        quality: (K,) in [0, 1], from `mask_quality`.
        formula: "paper" for √(score · quality); "released", as in the authors' code and figures, for
            √(√score · quality).

    Returns:
        (K,) in [0, 1].
    """
    return ((scores.sqrt() if formula == "released" else scores) * quality).sqrt()
