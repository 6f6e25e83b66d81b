"""Segmenters by name: packages offer them through the entry-point group `boxteacher.segmenters`."""

from importlib.metadata import entry_points
from inspect import signature
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
    mask_samples: int | None = None,
) -> nn.Module:
    """Builds the segmenter that a package registered under `name`.

    An entry point names a function with this function's signature but for `name`; one whose segmenter does
    not sample masks has no `mask_samples`.

    Raises:
        InputError: no such segmenter, its backbone or weights cannot be had, or it does not sample masks
            and `mask_samples` is given.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise InputError(f"no model {name!r}: take one of {', '.join(segmenter_names())}")
    build: Any = next(iter(found)).load()
    options: dict[str, Any] = {} if mask_samples is None else {"mask_samples": mask_samples}
    if not options.keys() <= signature(build).parameters.keys():
        raise InputError(f"mask_samples is {mask_samples}, and {name} takes every mask: leave it out")
    return build(num_classes, backbone=backbone, weights=weights, image_size=image_size, **options)
