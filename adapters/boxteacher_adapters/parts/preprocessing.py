"""What a network's weights want an image to look like."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB image in [0, 1] to a network's input.

    Attributes:
        channel_order: of the input.
        mean: of the channels in that order, in [0, 1].
        std: likewise.
    """

    channel_order: Literal["RGB", "BGR"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Preprocessing("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Caffe's networks take the mean off images in [0, 255] and leave their scale.
CAFFE = Preprocessing("BGR", (103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255, 1 / 255, 1 / 255))
