"""The mask losses, each named as its paper names it; and the ellipse loss of the first steps."""

from boxteacher.losses.dice import dice_loss
from boxteacher.losses.ellipse import ellipse_loss
from boxteacher.losses.packing import BoxRegions
from boxteacher.losses.pairs import pair_sums
from boxteacher.losses.pairwise import (
    affinity_relation,
    color_pairwise_loss,
    color_relation,
    noise_reduced_affinity_loss,
)
from boxteacher.losses.pixel import noise_aware_pixel_loss
from boxteacher.losses.projection import projection_loss

__all__ = [
    "BoxRegions",
    "affinity_relation",
    "color_pairwise_loss",
    "color_relation",
    "dice_loss",
    "ellipse_loss",
    "noise_aware_pixel_loss",
    "noise_reduced_affinity_loss",
    "pair_sums",
    "projection_loss",
]
