"""Enlarging maps of logits so that their cells stay over the pixels they stand for."""

import torch.nn.functional as F
from torch import Tensor


def upsample_aligned(maps: Tensor, factor: int) -> Tensor:
    """Bilinear enlargement in which cell i of the input becomes cell `factor · i + factor // 2`.

    Beyond the outermost input cells their values go on. A grid cell that stands for the pixel in the
    middle of its square therefore still does when the factor is the grid's stride (CondInst, ECCV 2020).

    Args:
        maps: (N, C, h, w).
        factor: ≥ 1.

    Returns:
        (N, C, factor · h, factor · w).
    """
    if factor == 1:
        return maps
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, 1, 0, 1), mode="replicate")  # (N, C, h + 1, w + 1)
    size = (factor * height + 1, factor * width + 1)
    enlarged = F.interpolate(padded, size, mode="bilinear", align_corners=True)
    shift = factor // 2
    enlarged = F.pad(enlarged, (shift, 0, shift, 0), mode="replicate")
    return enlarged[..., : factor * height, : factor * width]
