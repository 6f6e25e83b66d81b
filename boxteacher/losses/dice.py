"""Dice loss with squared sums."""

from torch import Tensor


def dice_loss(probabilities: Tensor, targets: Tensor, eps: float = 1e-5) -> Tensor:
    """1 − 2 Σpq / (Σp² + Σq² + eps) over all but the first dimension (V-Net, 3DV 2016).

    Args:
        probabilities: (M, …) in [0, 1].
        targets: (M, …) in [0, 1].
        eps: keeps two empty masks from dividing zero by zero.

    Returns:
        (M,) in [0, 1].
    """
    p, q = probabilities.flatten(1), targets.flatten(1)
    return 1 - 2 * (p * q).sum(1) / (p.square().sum(1) + q.square().sum(1) + eps)
