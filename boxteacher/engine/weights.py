"""A segmenter that begins from another's weights: one of this library's, or one that others released."""

import logging
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from boxteacher.engine.checkpoint import is_checkpoint, load_checkpoint
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.errors import InputError
from boxteacher.state_dicts import SegmenterWeights, compare_states

logger = logging.getLogger(__name__)

GROUP = "boxteacher.checkpoints"


def read_released(path: Path) -> SegmenterWeights | None:
    """Weights that others released, as the first reader that knows the file's kind gives them.

    A reader is a function that the entry-point group `boxteacher.checkpoints` names: of a path, to a
    `SegmenterWeights`, or to None if it does not know the file's kind.

    Raises:
        InputError: the file cannot be read.
    """
    for entry in entry_points(group=GROUP):
        released: SegmenterWeights | None = entry.load()(path)
        if released is not None:
            return released
    return None


def build_with_weights(
    name: str,
    num_classes: int,
    *,
    backbone: str,
    weights: Path | Literal["imagenet", "none"],
    **options: Any,
) -> nn.Module:
    """`build_segmenter`, whose `weights` may also be a file with those of a whole segmenter.

    The classifier of one with another number of classes is left out.

    Raises:
        InputError: see `build_segmenter`; or the file holds another segmenter.
    """
    if not isinstance(weights, Path) or (whole := _read_segmenter(weights)) is None:
        return build_segmenter(name, num_classes, backbone=backbone, weights=weights, **options)
    if (whole.model, whole.backbone) != (name, backbone):
        raise InputError(
            f"weights {weights} are {whole.description}, not {name} on {backbone}: give --model "
            f"{whole.model} --backbone {whole.backbone}, or other weights"
        )
    segmenter = build_segmenter(name, num_classes, backbone=backbone, weights="none", **options)
    left_out = fill(segmenter, num_classes, whole, weights)
    freeze = getattr(getattr(segmenter, "backbone", None), "freeze", None)
    if freeze is not None:  # as with ImageNet weights
        freeze()
    logger.info("loaded %s: %s", weights, whole.description)
    if left_out:
        logger.info(
            "%s knows %d classes, the data %d: its classifier (%s) is left out and begins anew",
            weights,
            whole.num_classes,
            num_classes,
            ", ".join(left_out),
        )
    return segmenter


def _read_segmenter(path: Path) -> SegmenterWeights | None:
    """The whole segmenter in a file; None if there is none, but a backbone alone."""
    if is_checkpoint(path):
        segmenter, info = load_checkpoint(path)
        count = len(info.class_names)
        description = f"a checkpoint of {info.model} on {info.backbone}, {count} classes"
        return SegmenterWeights(info.model, info.backbone, count, segmenter.state_dict(), description)
    released = read_released(path)
    return None if released is None or released.model is None else released


def fill(segmenter: nn.Module, num_classes: int, given: SegmenterWeights, path: Path) -> list[str]:
    """Loads a whole segmenter's weights.

    Entries that a network computes for itself may be missing: all but its parameters and the statistics of
    batch norms.

    Args:
        segmenter: network that is filled.
        num_classes: number of its classes.
        given: weights.
        path: file of the weights, for messages.

    Returns:
        Names of the classifier's entries, which are left as they are if the numbers of classes differ.

    Raises:
        InputError: the weights are not those of this segmenter.
    """
    wanted = segmenter.state_dict()
    learnt = {name for name, _ in segmenter.named_parameters()}
    learnt |= {name for name in wanted if name.endswith(("running_mean", "running_var"))}
    difference = compare_states(wanted, given.weights, optional=lambda name: name not in learnt)
    classifier = [
        name
        for name in difference.reshaped
        if num_classes != given.num_classes
        and _per_class(given.weights[name], wanted[name], given.num_classes, num_classes)
    ]
    difference = replace(
        difference, reshaped=[name for name in difference.reshaped if name not in classifier]
    )
    if difference:
        raise InputError(
            f"weights {path} look like {given.description}, but entries do not fit: {difference}; copy the "
            "file again, or give the --image-size of its network"
        )
    fitting = {name: value for name, value in given.weights.items() if name not in classifier}
    segmenter.load_state_dict(fitting, strict=False)
    return classifier


def _per_class(theirs: Tensor, ours: Tensor, their_classes: int, our_classes: int) -> bool:
    """Whether two entries differ by the numbers of classes alone, with or without one for background."""
    if theirs.ndim == 0 or theirs.shape[1:] != ours.shape[1:]:
        return False
    return any(len(theirs) * (our_classes + k) == len(ours) * (their_classes + k) for k in (0, 1))
