"""Initialization of a segmenter from a whole model's weights: a checkpoint, or released weights."""

import logging
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from boxteacher.engine.checkpoint import is_checkpoint, load_checkpoint
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.errors import InputError
from boxteacher.state_dicts import SegmenterWeights, compare_states

logger = logging.getLogger(__name__)

GROUP = "boxteacher.checkpoints"
COCO_GROUP = "boxteacher.coco"


def read_released(path: str | Path) -> SegmenterWeights | None:
    """Released weights in a file, or None if no registered reader knows them.

    Readers are registered in the entry-point group `boxteacher.checkpoints`: functions from a path to a
    `SegmenterWeights`, or None for a file of another kind.

    Raises:
        InputError: the file cannot be read.
    """
    for entry in entry_points(group=GROUP):
        released: SegmenterWeights | None = entry.load()(Path(path))
        if released is not None:
            return released
    return None


def build_with_weights(
    name: str,
    num_classes: int,
    *,
    backbone: str,
    weights: str | Path,
    image_size: int,
    **options: Any,
) -> nn.Module:
    """`build_segmenter`, where `weights` may also be those of a whole segmenter or of a detector.

    They are in a file, or "coco" downloads a detector trained on COCO. What a detector lacks keeps its
    initial values, and so does the classifier if the numbers of classes differ.

    Raises:
        InputError: as `build_segmenter`, the file holds another segmenter, or there are no weights from COCO.
    """
    options["image_size"] = image_size
    if weights == "coco":
        weights = _coco_file(name, backbone, image_size)
    weights = weights if weights in ("imagenet", "none") else Path(weights)
    if not isinstance(weights, Path) or (whole := _read_segmenter(weights)) is None:
        return build_segmenter(name, num_classes, backbone=backbone, weights=weights, **options)
    if (whole.model, whole.backbone) != (name, backbone):
        raise InputError(
            f"weights {weights} are {whole.description}, not {name} on {backbone}: give --model "
            f"{whole.model} --backbone {whole.backbone}, or other weights"
        )
    segmenter = build_segmenter(name, num_classes, backbone=backbone, weights="none", **options)
    left_out = fill(segmenter, num_classes, whole, weights)
    for module in segmenter.modules():
        if callable(freeze := getattr(module, "freeze", None)):  # a backbone, as with ImageNet weights
            freeze()
    logger.info("loaded %s: %s", weights, whole.description)
    if anew := [prefix.rstrip(".") for prefix in whole.initial] + left_out:
        logger.info(
            "not loaded from it but initialized anew: %s%s",
            ", ".join(anew),
            f" (it has {whole.num_classes} classes, the data {num_classes})" if left_out else "",
        )
    return segmenter


def _coco_file(name: str, backbone: str, image_size: int) -> Path:
    """The file of a detector trained on COCO that a package registered for the segmenter."""
    found = entry_points(group=COCO_GROUP)
    if name not in found.names:
        raise InputError(
            f"there are no COCO weights for {name}: take --model {' or '.join(sorted(found.names))}, or give "
            "--weights imagenet, none or a file"
        )
    file: Path = found[name].load()(backbone, image_size)
    return file


def _read_segmenter(path: Path) -> SegmenterWeights | None:
    """The weights of a whole segmenter in a file; None if it holds something else, such as a backbone."""
    if is_checkpoint(path):
        segmenter, info = load_checkpoint(path)
        count = len(info.class_names)
        description = f"a checkpoint of {info.model} on {info.backbone}, {count} classes"
        return SegmenterWeights(info.model, info.backbone, count, segmenter.state_dict(), description)
    released = read_released(path)
    return None if released is None or released.model is None else released


def fill(segmenter: nn.Module, num_classes: int, given: SegmenterWeights, path: Path) -> list[str]:
    """Loads a whole segmenter's weights.

    Only parameters and the statistics of batch norms must be there; a network computes other entries itself.

    Args:
        segmenter: network to load the weights into.
        num_classes: number of its classes.
        given: weights to load.
        path: file of the weights, for error messages.

    Returns:
        Names of the classifier's entries that are not loaded because the numbers of classes differ.

    Raises:
        InputError: the weights are not those of this segmenter.
    """
    wanted = segmenter.state_dict()
    required = {name for name, _ in segmenter.named_parameters()}
    required |= {name for name in wanted if name.endswith(("running_mean", "running_var"))}
    required = {name for name in required if not name.startswith(given.initial)}
    difference = compare_states(wanted, given.weights, optional=lambda name: name not in required)
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
            "file again, or give the --image-size, above 512 for released ones, or --max-detections that the "
            "network was built for"
        )
    fitting = {name: value for name, value in given.weights.items() if name not in classifier}
    segmenter.load_state_dict(fitting, strict=False)
    return classifier


def _per_class(theirs: Tensor, ours: Tensor, their_classes: int, our_classes: int) -> bool:
    """Whether two entries differ in the number of classes alone, with or without a background class."""
    if theirs.ndim == 0 or theirs.shape[1:] != ours.shape[1:]:
        return False
    return any(len(theirs) * (our_classes + k) == len(ours) * (their_classes + k) for k in (0, 1))
