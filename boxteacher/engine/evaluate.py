"""COCO's average precision of a segmenter on a data set."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert

from boxteacher.data import DataIndex, evaluation_transform, read_split
from boxteacher.data.images import read_image
from boxteacher.data.masks import encode_binary_masks
from boxteacher.engine.average_precision import Evaluation, coco_evaluation
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.devices import pick_device
from boxteacher.engine.files import write_atomically
from boxteacher.engine.segmenters import COCO_MAX_DETECTIONS, limited_detections
from boxteacher.protocol import Detections
from boxteacher.refinement import refine_masks

logger = logging.getLogger(__name__)

Refinement = Literal["color", "none"]

_MASKS_AT_ONCE = 16


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
        category_ids: COCO category id of each label, for data whose categories all have other names.
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
    images = _Images(index, evaluation_transform(image_size, shortest_side), refinement == "color")
    logger.info("masks are %s", "refined by colors" if refinement == "color" else "as predicted")
    with limited_detections(segmenter, max_detections):
        results = _results(segmenter, images, workers)
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
    detections: Detections,
    image_id: int,
    size: tuple[int, int],
    category_ids: list[int],
    *,
    refine_to: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One image's detections as COCO results, at the stored image's size.

    Args:
        detections: detections in the image, possibly at another scale.
        image_id: COCO's id of the image.
        size: height and width of the stored image in pixels.
        category_ids: COCO category id of each label.
        refine_to: stored image (3, H, W), RGB in [0, 1], to whose colors masks are fitted.
    """
    height, width = size
    masks = detections["masks"][:, 0]  # (K, h, w)
    scale = detections["boxes"].new_tensor([width / masks.shape[-1], height / masks.shape[-2]]).repeat(2)
    boxes = detections["boxes"] * scale  # (K, 4)
    counts: list[bytes] = []
    # All masks of a large photograph at its own size would take gigabytes.
    for some, own in zip(boxes.split(_MASKS_AT_ONCE), masks.split(_MASKS_AT_ONCE), strict=True):
        refined = own if refine_to is None else refine_masks(refine_to, some, own)
        counts += encode_binary_masks(refined, height, width)
    rows = zip(
        box_convert(boxes, "xyxy", "xywh").cpu().tolist(),
        detections["scores"].cpu().tolist(),
        detections["labels"].cpu().tolist(),
        counts,
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 2) for value in box],
            "score": score,
            "segmentation": {"size": [height, width], "counts": each.decode()},
        }
        for box, score, label, each in rows
    ]


class _Images(Dataset[tuple[Tensor, Tensor | None]]):
    """A data set's images, transformed, and as they are stored if asked for."""

    def __init__(self, index: DataIndex, transform: Any, with_stored: bool) -> None:
        self.index = index
        self.transform = transform
        self.with_stored = with_stored

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor | None]:
        height, width = self.index.sizes[i].tolist()
        stored = read_image(self.index.image_path(i), (height, width))
        image, _ = self.transform(tv_tensors.Image(stored), {})
        return image.as_subclass(Tensor), stored if self.with_stored else None


@torch.inference_mode()
def _results(segmenter: nn.Module, images: _Images, workers: int) -> list[dict[str, Any]]:
    device = next(segmenter.parameters()).device
    index = images.index
    results = []
    for i, (image, stored) in enumerate(DataLoader(images, batch_size=None, num_workers=workers)):
        (detections,) = segmenter([image.to(device)])
        results += coco_results(
            detections,
            int(index.image_ids[i]),
            (int(index.sizes[i, 0]), int(index.sizes[i, 1])),
            index.category_ids,
            refine_to=None if stored is None else stored.to(device),
        )
    return results
