"""Projection loss: a mask and its box have the same projections onto both axes."""

from torch import Tensor

from boxteacher.losses.dice import dice_loss


def projection_loss(mask_logits: Tensor, box_masks: Tensor) -> Tensor:
    """Dice between the mask's and the box's max-projections, both axes added (BoxInst, Eq. 2 and 3).

    Args:
        mask_logits: (M, h, w).
        box_masks: (M, h, w) bool, the box of each mask's target.

    Returns:
        (M,) in [0, 2].
    """
    probabilities = mask_logits.float().sigmoid()  # (M, h, w)
    rows, columns = box_masks.any(2).float(), box_masks.any(1).float()  # (M, h), (M, w)
    return dice_loss(probabilities.amax(2), rows) + dice_loss(probabilities.amax(1), columns)
