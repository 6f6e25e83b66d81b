"""Checkpoints: a segmenter's weights, with all that is needed to build and use it."""

from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from boxteacher.engine.files import write_atomically, write_tensors
from boxteacher.engine.segmenters import COCO_MAX_DETECTIONS, build_segmenter
from boxteacher.errors import InputError
from boxteacher.state_dicts import compare_states
from boxteacher.torch_files import read_torch_file
from boxteacher.validation import check_choice, check_whole

_FORMAT = "boxteacher segmenter 1"


@dataclass(frozen=True)
class SegmenterInfo:
    """A checkpoint's description of its segmenter.

    Attributes:
        model: name of the segmenter that `build_segmenter` knows.
        backbone: name of its backbone.
        image_size: longest side in pixels of its training images.
        class_names: names of the labels 0 … C−1.
        category_ids: COCO category ids of the labels.
        shortest_side: shortest side in pixels of the images in evaluation, unless the longest would exceed
            `image_size`; None to resize the longest side to `image_size`.
        refinement: refinement of its masks in evaluation and prediction, "color" or "none".
        max_detections: maximum number of detections per image.
    """

    model: str
    backbone: str
    image_size: int
    class_names: list[str]
    category_ids: list[int]
    shortest_side: int | None = None
    refinement: Literal["color", "none"] = "none"
    max_detections: int = COCO_MAX_DETECTIONS

    def __post_init__(self) -> None:
        if not (isinstance(self.class_names, list) and isinstance(self.category_ids, list)):
            raise TypeError("class_names and category_ids are not both lists")
        if len(self.class_names) != len(self.category_ids):
            raise ValueError(f"{len(self.class_names)} class names, {len(self.category_ids)} category ids")
        check_whole("image_size", self.image_size, minimum=1)
        check_whole("max_detections", self.max_detections, minimum=1)
        if self.shortest_side is not None:
            check_whole("shortest_side", self.shortest_side, minimum=1)
        check_choice("refinement", self.refinement, ("color", "none"))


def save_checkpoint(path: str | Path, segmenter: nn.Module, info: SegmenterInfo) -> None:
    """Writes the segmenter's weights and description; a crash leaves an earlier file as it was.

    The backbone's `preprocessing` (channel order, mean and std) is saved with them.
    """
    content = {
        "format": _FORMAT,
        "info": asdict(info),
        "preprocessing": _preprocessing(segmenter),
        "weights": _contiguous(segmenter.state_dict()),
    }
    write_atomically(Path(path), lambda temporary: write_tensors(temporary, content))


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in row-major order and without shared memory, as safetensors takes them too."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def load_checkpoint(path: str | Path) -> tuple[nn.Module, SegmenterInfo]:
    """Builds the segmenter of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        InputError: the file is missing, broken or not a checkpoint of this library, or its weights do not fit
            the model that it describes, or were trained with another preprocessing.
    """
    path = Path(path)
    content = _read(path)
    try:
        info = SegmenterInfo(**content["info"])
        weights: dict[str, Tensor] = dict(content["weights"])
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("an entry of its weights is no tensor")
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(
            f"{path}: its description is incomplete ({error}); give one that `boxteacher train` wrote"
        ) from error
    segmenter = build_segmenter(
        info.model,
        len(info.class_names),
        backbone=info.backbone,
        weights="none",
        image_size=info.image_size,
        max_detections=info.max_detections,
    )
    if difference := compare_states(segmenter.state_dict(), weights):
        raise InputError(
            f"{path}: its entries are not those of {info.model} on {info.backbone}: {difference}; give a "
            "checkpoint of that model, as `boxteacher train` writes it"
        )
    trained_with, built_with = content.get("preprocessing"), _preprocessing(segmenter)
    if trained_with not in (None, built_with):  # None: written before checkpoints kept the record
        raise InputError(
            f"{path}: was trained with preprocessing {trained_with}, but {info.backbone} now has "
            f"{built_with}; use the version of this library that wrote it, or train again"
        )
    segmenter.load_state_dict(weights)
    return segmenter.eval(), info


def _preprocessing(segmenter: nn.Module) -> dict[str, Any] | None:
    """The `preprocessing` of the segmenter's backbone, if it has one."""
    for module in segmenter.modules():
        record = getattr(module, "preprocessing", None)
        if is_dataclass(record) and not isinstance(record, type):
            return asdict(record)
    return None


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of this library."""
    try:
        _read(Path(path))
    except InputError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a checkpoint that `boxteacher train` wrote")
    try:
        content = read_torch_file(path)
    except Exception as error:  # torch.load raises errors of many types for a broken file
        raise InputError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); it is truncated or not one: "
            "copy it again or train again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(
            f"{path}: not a checkpoint of `boxteacher train`; give RUN/last.pt, or pass backbone weights to "
            "`boxteacher train --weights`"
        )
    return content
