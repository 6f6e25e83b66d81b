"""Segmenters by name, which packages register in the entry-point group `boxteacher.segmenters`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

GROUP = "boxteacher.segmenters"

COCO_MAX_DETECTIONS = 100
"""Maximum number of detections per image in COCO's evaluation."""


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
    max_detections: int = COCO_MAX_DETECTIONS,
) -> nn.Module:
    """Builds the segmenter that a package registered under `name`.

    The registered function has this signature without `name`, without `mask_samples` if its segmenter does
    not sample masks, and without `max_detections` if it is built the same for any number of detections.

    Args:
        name: name of the segmenter.
        num_classes: number of classes, C.
        backbone: name of the backbone.
        weights: initial weights of the backbone: path of a file, "imagenet" or "none".
        image_size: longest side of the images in pixels; for small images the network is smaller.
        mask_samples: maximum number of masks per image in training; 0 for the segmenter's default.
        max_detections: maximum number of detections per image (see `limit_detections`).

    Raises:
        InputError: there is no such segmenter, backbone or file of weights, or `mask_samples` is given for a
            segmenter that does not sample masks.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise InputError(f"no model {name!r}: take one of {', '.join(segmenter_names())}")
    build: Any = next(iter(found)).load()
    options = {"mask_samples": mask_samples} if mask_samples else {}
    parameters = signature(build).parameters
    if not options.keys() <= parameters.keys():
        raise InputError(f"mask_samples is {mask_samples}, but {name} does not sample masks: leave it out")
    if "max_detections" in parameters:
        options["max_detections"] = max_detections
    segmenter = build(num_classes, backbone=backbone, weights=weights, image_size=image_size, **options)
    limit_detections(segmenter, max_detections)
    return segmenter


def limit_detections(segmenter: Any, maximum: int) -> None:
    """Sets the segmenter's maximum number of detections per image, `max_detections`.

    A segmenter without this attribute is left as it is, with a warning if `maximum` is not COCO's 100.
    """
    if hasattr(segmenter, "max_detections"):
        segmenter.max_detections = maximum
    elif maximum != COCO_MAX_DETECTIONS:
        logger.warning(
            "%s has no attribute max_detections, so its own limit stays: check that it detects up to %d "
            "objects in an image",
            type(segmenter).__name__,
            maximum,
        )


@contextmanager
def limited_detections(segmenter: Any, maximum: int) -> Iterator[None]:
    """`limit_detections` for a while."""
    before = getattr(segmenter, "max_detections", COCO_MAX_DETECTIONS)
    limit_detections(segmenter, maximum)
    try:
        yield
    finally:
        if hasattr(segmenter, "max_detections"):
            segmenter.max_detections = before
