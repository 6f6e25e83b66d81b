"""Segmenters by name, which packages register in the entry-point group `boxteacher.segmenters`."""

from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from boxteacher.errors import InputError

GROUP = "boxteacher.segmenters"


def segmenter_names() -> list[str]:
    """Names that `build_segmenter` knows."""
    return sorted(entry_points(group=GROUP).names)


def build_segmenter(
    name: str,
    num_classes: int,
    *,
    backbone: str,
    weights: str | Path,
    image_size: int,
    mask_samples: int = 0,
) -> nn.Module:
    """Builds the segmenter that a package registered under `name`.

    The registered function has this signature without `name`, and without `mask_samples` if its segmenter
    does not sample masks.

    Args:
        name: name of the segmenter.
        num_classes: number of classes, C.
        backbone: name of the backbone.
        weights: initial weights of the backbone: path of a file, "imagenet" or "none".
        image_size: longest side of the images in pixels; for small images the network is smaller.
        mask_samples: maximum number of masks per image in training; 0 for the segmenter's default.

    Raises:
        InputError: there is no such segmenter, backbone or file of weights, or `mask_samples` is given for a
            segmenter that does not sample masks.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise InputError(f"no model {name!r}: take one of {', '.join(segmenter_names())}")
    build: Any = next(iter(found)).load()
    options = {"mask_samples": mask_samples} if mask_samples else {}
    if not options.keys() <= signature(build).parameters.keys():
        raise InputError(f"mask_samples is {mask_samples}, but {name} does not sample masks: leave it out")
    return build(num_classes, backbone=backbone, weights=weights, image_size=image_size, **options)
