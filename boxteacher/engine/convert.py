"""Conversion of released weights to checkpoints of this library."""

from pathlib import Path

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from boxteacher.engine.checkpoint import SegmenterInfo, is_checkpoint, save_checkpoint
from boxteacher.engine.files import check_new_file, write_atomically, write_tensors
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.weights import fill, read_released
from boxteacher.errors import InputError
from boxteacher.state_dicts import SegmenterWeights, first_names

# COCO's usual size, with which the released segmenters were trained and evaluated.
_LONGEST_SIDE, _SHORTEST_SIDE = 1333, 800


def convert(source: str | Path, destination: str | Path) -> str:
    """Writes released weights as a checkpoint, or those of a backbone alone as its state dict.

    Args:
        source: file of released weights; see `boxteacher.engine.weights.read_released`.
        destination: file to write; it must not exist.

    Returns:
        One line about what the file is and what became of its entries.

    Raises:
        InputError: the file cannot be read, is not known, or does not fit; nothing is written.
    """
    source, destination = Path(source), Path(destination)
    check_new_file(destination)
    if is_checkpoint(source):
        raise InputError(f"{source}: is a checkpoint of this library already; evaluate it as it is")
    released = read_released(source)
    if released is None:
        raise InputError(
            f"{source}: holds none of the released weights that are known: give a checkpoint of CondInst, "
            "BoxTeacher or SOLOv2, or an ImageNet backbone of detectron2 (other backbones' own state dicts "
            "need no conversion)"
        )
    if released.model is None:
        write_atomically(destination, lambda path: write_tensors(path, released.weights))
        use = f"use it as --weights with --backbone {released.backbone}"
    elif released.initial:
        raise InputError(
            f"{source}: is {released.description}, which has no masks for {released.model}: give it to "
            "`boxteacher train --weights`"
        )
    else:
        _write_segmenter(released.model, released, source, destination)
        use = "evaluate it, or use it as --weights"
    entries = f"{len(released.weights)} entries"
    if unneeded := released.left_out:
        entries += f", and {len(unneeded)} that the network does not need ({first_names(unneeded)})"
    return f"{destination}: {released.description}; {entries}; {use}"


def _write_segmenter(model: str, whole: SegmenterWeights, source: Path, destination: Path) -> None:
    segmenter = build_segmenter(
        model, whole.num_classes, backbone=whole.backbone, weights="none", image_size=_LONGEST_SIDE
    )
    fill(segmenter, whole.num_classes, whole, source)
    categories = coco_categories()
    if whole.num_classes != len(categories):
        categories = {i + 1: f"class {i + 1}" for i in range(whole.num_classes)}
    info = SegmenterInfo(
        model=model,
        backbone=whole.backbone,
        image_size=_LONGEST_SIDE,
        shortest_side=_SHORTEST_SIDE,
        class_names=list(categories.values()),
        category_ids=list(categories),
    )
    save_checkpoint(destination, segmenter, info)


def coco_categories() -> dict[int, str]:
    """Names of COCO's 80 detection categories, by id; the ids have gaps."""
    names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")}
