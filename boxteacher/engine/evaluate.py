"""COCO's average precision of a segmenter on a data set."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from boxteacher.data import DataIndex, InstanceDataset, collate, evaluation_transform, read_split
from boxteacher.data.masks import encode_binary_masks
from boxteacher.engine.average_precision import Evaluation, coco_evaluation
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.devices import pick_device
from boxteacher.engine.files import write_atomically
from boxteacher.engine.segmenters import COCO_MAX_DETECTIONS, limited_detections
from boxteacher.protocol import Detections
from boxteacher.refinement import refine_detections

logger = logging.getLogger(__name__)

Refinement = Literal["color", "none"]


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    refinement: Refinement | None = None,
    device: str = "auto",
    workers: int = 2,
    max_detections: int | None = None,
) -> Evaluation:
    """Evaluates a checkpoint on the validation split of `data`, and writes `metrics.json` beside it.

    Where that file cannot be written, a warning is logged.

    Args:
        checkpoint: checkpoint that `train` wrote.
        data: folder of the data set.
        refinement: "color" or "none"; what the run was made with if not given.
        device: name of the device (see `pick_device`).
        workers: number of processes that load images.
        max_detections: maximum number of detections per image; see `evaluate_segmenter`.

    Raises:
        InputError: the checkpoint or the data cannot be used.
    """
    segmenter, info = load_checkpoint(checkpoint)
    evaluation = evaluate_segmenter(
        segmenter.to(pick_device(device)),
        data,
        image_size=info.image_size,
        class_names=info.class_names,
        category_ids=info.category_ids,
        shortest_side=info.shortest_side,
        refinement=refinement or info.refinement,
        workers=workers,
        max_detections=max_detections,
    )
    text = json.dumps(evaluation.metrics) + "\n"
    try:
        write_atomically(Path(checkpoint).parent / "metrics.json", lambda path: path.write_text(text))
    except OSError as error:  # of a folder that is read-only: the figures are worth more than the file
        logger.warning("the figures are not saved: %s", error)
    return evaluation


def evaluate_segmenter(
    segmenter: nn.Module,
    data: str | Path,
    *,
    image_size: int,
    class_names: list[str],
    category_ids: list[int],
    shortest_side: int | None = None,
    refinement: Refinement = "none",
    workers: int = 2,
    max_detections: int | None = None,
) -> Evaluation:
    """Evaluates any segmenter on the validation split of `data`, on the device of its parameters.

    Args:
        segmenter: model in evaluation mode that returns torchvision's detections of a list of images.
        data: folder of the data set.
        image_size: longest side of the images in pixels.
        class_names: names of labels 0 … C−1, by which the data's categories are matched to them.
        category_ids: COCO category id of each label, for categories that have another name in the data.
        shortest_side: shortest side of the images in pixels (see `evaluation_transform`).
        refinement: "color" to fit masks to the colors of the stored images (see `boxteacher.refinement`).
        workers: number of processes that load images.
        max_detections: maximum number of detections per image, of the segmenter (its `max_detections`) and of
            the evaluation; if not given, the segmenter's own or COCO's 100, or as many as an image has
            objects if that is more.

    Raises:
        InputError: the data cannot be used.
    """
    index = read_truth(data, class_names, category_ids)
    if max_detections is None:
        own = getattr(segmenter, "max_detections", COCO_MAX_DETECTIONS)
        max_detections = max(own, index.max_boxes()[0])
    # Annotated masks are compared as RLE, so no worker has to decode them.
    transform = _WithStoredImage(evaluation_transform(image_size, shortest_side))
    images = InstanceDataset(replace(index, masks=None), transform=transform)
    logger.info("masks are %s", "refined by colors" if refinement == "color" else "as predicted")
    with limited_detections(segmenter, max_detections):
        results = _results(segmenter, images, refinement, workers)
    return coco_evaluation(index, results, max_detections)


def read_truth(data: str | Path, class_names: list[str], category_ids: list[int]) -> DataIndex:
    """Reads the validation split with the masks that it has, and logs what its evaluation will lack.

    Args:
        data: folder of the data set.
        class_names: names of a model's labels 0 … C−1.
        category_ids: COCO category id of each label.

    Raises:
        InputError: the data cannot be used.
    """
    classes = dict(zip(category_ids, class_names, strict=True))
    index = read_split(data, "val", read_masks=True, masks_optional=True, classes=classes)
    if index.masks is None:
        logger.warning("%s: no object has a mask: only boxes are evaluated", index.annotations)
        return index
    missing = [mask is None for mask in index.masks] & ~index.crowd  # (M,)
    if missing.any():
        logger.warning(
            "%s: %d of %d objects have no mask, the first the annotation of id %d: mask AP ignores them",
            index.annotations,
            missing.sum(),
            (~index.crowd).sum(),
            index.annotation_ids[missing.argmax()],
        )
    return index


def coco_results(
    detections: Detections, image_id: int, size: tuple[int, int], category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's detections as COCO results, at the stored image's size.

    Args:
        detections: detections in the image, possibly at another scale.
        image_id: COCO's id of the image.
        size: height and width of the stored image in pixels.
        category_ids: COCO category id of each label.
    """
    height, width = size
    masks = detections["masks"]  # (K, 1, h, w)
    scale = detections["boxes"].new_tensor([width / masks.shape[-1], height / masks.shape[-2]]).repeat(2)
    boxes = box_convert(detections["boxes"] * scale, "xyxy", "xywh").cpu().tolist()
    rows = zip(
        boxes,
        detections["scores"].cpu().tolist(),
        detections["labels"].cpu().tolist(),
        encode_binary_masks(masks[:, 0], height, width),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in box],
            "score": score,
            "segmentation": {"size": [height, width], "counts": counts.decode()},
        }
        for box, score, label, counts in rows
    ]


class _WithStoredImage:
    """A transform that also keeps each image as it was stored, as `stored_image` of its target."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        small, target = self.transform(image, target)
        return small, {**target, "stored_image": image}


@torch.inference_mode()
def _results(
    segmenter: nn.Module, dataset: InstanceDataset, refinement: Refinement, workers: int
) -> list[dict[str, Any]]:
    device = next(segmenter.parameters()).device
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=collate)
    results = []
    for i, (images, targets) in enumerate(loader):
        found = segmenter([image.to(device) for image in images])
        if refinement == "color":
            found = refine_detections([targets[0]["stored_image"].to(device)], found)
        height, width = dataset.index.sizes[i].tolist()
        category_ids = dataset.index.category_ids
        results += coco_results(found[0], targets[0]["image_id"], (height, width), category_ids)
    return results
