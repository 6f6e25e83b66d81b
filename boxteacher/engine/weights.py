"""A segmenter that begins from another's weights: one of this library's, or one that others released."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from boxteacher.engine.checkpoint import is_checkpoint, load_checkpoint
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

GROUP = "boxteacher.checkpoints"
_NAMED = 3  # of the entries that do not fit, in a message


@dataclass(frozen=True)
class WholeModel:
    """The weights of a whole segmenter.

    Attributes:
        model: name that `build_segmenter` knows.
        backbone: name of its backbone.
        num_classes: C.
        weights: by the names of the segmenter's state dict.
        path: of the file that they come from.
        description: of that file, for messages.
    """

    model: str
    backbone: str
    num_classes: int
    weights: Mapping[str, Tensor]
    path: Path
    description: str


def read_released(path: Path) -> Any:
    """What others released, as the first reader of the entry-point group `boxteacher.checkpoints` sees it.

    An entry point names a function of a path. It returns None for what it does not know, and otherwise
    something with the attributes of `boxteacher_adapters.checkpoints.ReleasedWeights`.

    Raises:
        InputError: the file cannot be read.
    """
    for entry in entry_points(group=GROUP):
        released = entry.load()(path)
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

    If that one knows another number of classes, its classifier is left out.

    Raises:
        InputError: see `build_segmenter`; or the file holds another segmenter.
    """
    whole = _whole_model(weights) if isinstance(weights, Path) else None
    if whole is None:
        return build_segmenter(name, num_classes, backbone=backbone, weights=weights, **options)
    if (whole.model, whole.backbone) != (name, backbone):
        raise InputError(
            f"weights {weights} are {whole.description}, not {name} on {backbone}: give --model "
            f"{whole.model} --backbone {whole.backbone}, or other weights"
        )
    segmenter = build_segmenter(name, num_classes, backbone=backbone, weights="none", **options)
    left_out = fill(segmenter, num_classes, whole)
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


def _whole_model(path: Path) -> WholeModel | None:
    if is_checkpoint(path):
        segmenter, info = load_checkpoint(path)
        count = len(info.class_names)
        description = f"a checkpoint of {info.model} on {info.backbone}, {count} classes"
        return WholeModel(info.model, info.backbone, count, segmenter.state_dict(), path, description)
    released = read_released(path)
    return None if released is None or released.model is None else as_whole_model(released, path)


def as_whole_model(released: Any, path: Path) -> WholeModel:
    """What `read_released` found in a file, if that is a whole segmenter."""
    return WholeModel(
        model=released.model,
        backbone=released.backbone,
        num_classes=released.num_classes,
        weights=released.weights,
        path=path,
        description=released.description,
    )


def fill(segmenter: nn.Module, num_classes: int, whole: WholeModel) -> list[str]:
    """Loads a whole segmenter's weights.

    The numbers that a network makes for itself may be missing: all that is neither a parameter nor a batch
    norm's statistics.

    Args:
        segmenter: the one that is filled.
        num_classes: that it has.
        whole: the weights.

    Returns:
        Entries of the classifier, which are left as they are if the numbers of classes differ.

    Raises:
        InputError: the weights are not those of this segmenter.
    """
    wanted, weights = segmenter.state_dict(), whole.weights
    learnt = {name for name, _ in segmenter.named_parameters()}
    learnt |= {name for name in wanted if name.endswith(("running_mean", "running_var"))}
    missing = [name for name in wanted if name in learnt and name not in weights]
    unknown = [name for name in weights if name not in wanted]
    unfit = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    classifier: list[str] = []
    if num_classes != whole.num_classes:
        classes = whole.num_classes, num_classes
        classifier = [name for name in unfit if _per_class(weights[name], wanted[name], *classes)]
    unfit = [name for name in unfit if name not in classifier]
    problems = [
        f"{len(names)} {problem} ({some(names)})"
        for names, problem in ((missing, "missing"), (unknown, "unknown"), (unfit, "of another shape"))
        if names
    ]
    if problems:
        raise InputError(
            f"weights {whole.path} look like {whole.description}, but entries do not fit: "
            f"{', '.join(problems)}; copy the file again, or give the --image-size of its network"
        )
    fitting = {name: value for name, value in weights.items() if name not in classifier}
    segmenter.load_state_dict(fitting, strict=False)
    return classifier


def _per_class(theirs: Tensor, ours: Tensor, their_classes: int, our_classes: int) -> bool:
    """Whether two entries differ by the numbers of classes alone, with or without one for background."""
    if theirs.ndim == 0 or theirs.shape[1:] != ours.shape[1:]:
        return False
    return any(len(theirs) * (our_classes + k) == len(ours) * (their_classes + k) for k in (0, 1))


def some(names: Sequence[str]) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
