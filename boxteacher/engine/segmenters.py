"""Segmenters by name: packages offer them through the entry-point group `boxteacher.segmenters`."""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

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
    weights: Path | Literal["imagenet", "none"],
    image_size: int,
) -> nn.Module:
    """Builds the segmenter that a package registered under `name`.

    An entry point names a function with this function's signature but for `name`.

    Raises:
        InputError: no such segmenter, or its backbone or weights cannot be had.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise InputError(f"no model {name!r}: take one of {', '.join(segmenter_names())}")
    build: Any = next(iter(found)).load()
    return build(num_classes, backbone=backbone, weights=weights, image_size=image_size)
