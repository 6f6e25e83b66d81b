"""Noise-aware pixel loss: Dice with a pseudo mask, weighted by its confidence."""

from torch import Tensor

from boxteacher.distributed import global_count
from boxteacher.losses.dice import dice_loss


def noise_aware_pixel_loss(mask_logits: Tensor, pseudo_masks: Tensor, confidence: Tensor) -> Tensor:
    """Dice with each mask's pseudo mask, weighted by its confidence (BoxTeacher, Eq. 4).

    Args:
        mask_logits: (M, h, w).
        pseudo_masks: (M, h, w) in [0, 1], the pseudo mask of each mask's target.
        confidence: (M,) in [0, 1]; 0 where the target has no pseudo mask.

    Returns:
        Scalar: the weighted sum over the number of masks with confidence > 0; 0 if there is none.
    """
    per_mask = dice_loss(mask_logits.float().sigmoid(), pseudo_masks.float())  # (M,)
    return (per_mask * confidence).sum() / global_count((confidence > 0).sum(), minimum=1)
