"""COCO's average precision of a segmenter on a data set."""

import contextlib
import io
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from boxteacher.data import DataIndex, InstanceDataset, collate, evaluation_transform, read_split
from boxteacher.data.masks import encode_binary_masks
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.devices import pick_device
from boxteacher.engine.files import write_atomically
from boxteacher.protocol import Detections
from boxteacher.refinement import refine_detections

logger = logging.getLogger(__name__)

Refinement = Literal["color", "none"]
Metrics = dict[str, dict[str, float | None] | None]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        table: COCO's tables as text.
        metrics: AP, AP50 and AP75 in percent of "segm" and "bbox". "segm" is None if the annotations have no
            masks; a figure is None if there is no object.
    """

    table: str
    metrics: Metrics


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    refinement: Refinement | None = None,
    device: str = "auto",
    workers: int = 2,
) -> Evaluation:
    """Evaluates a checkpoint on the validation split of `data`, and writes `metrics.json` beside it.

    Where that file cannot be written, a warning is logged.

    Args:
        checkpoint: checkpoint that `train` wrote.
        data: folder of the data set.
        refinement: "color" or "none"; what the run was made with if not given.
        device: name of the device (see `pick_device`).
        workers: number of processes that load images.

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
) -> Evaluation:
    """Evaluates any segmenter on the validation split of `data`, on the device of its parameters.

    Args:
        segmenter: model in evaluation mode that returns torchvision's detections of a list of images.
        data: folder of the data set.
        image_size: longest side of the images in pixels.
        class_names: names of labels 0 … C−1; a warning is logged if those of the data differ.
        category_ids: COCO category id of each label.
        shortest_side: shortest side of the images in pixels (see `evaluation_transform`).
        refinement: "color" to fit masks to the colors of the stored images (see `boxteacher.refinement`).
        workers: number of processes that load images.

    Raises:
        InputError: the data cannot be used.
    """
    index = read_split(data, "val", read_masks=True, masks_optional=True, category_ids=category_ids)
    if index.class_names != class_names:
        logger.warning(
            "%s has the classes %s, the segmenter %s: they are matched by category id",
            index.annotations,
            index.class_names,
            class_names,
        )
    # Annotated masks are compared as RLE, so no worker has to decode them.
    transform = WithStoredImage(evaluation_transform(image_size, shortest_side))
    images = InstanceDataset(replace(index, masks=None), transform=transform)
    logger.info("masks are %s", "refined by colors" if refinement == "color" else "as predicted")
    return coco_evaluation(index, _results(segmenter, images, refinement, workers))


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


def coco_evaluation(index: DataIndex, results: list[dict[str, Any]]) -> Evaluation:
    """COCO's evaluation of boxes, and of masks if any object has one.

    In the evaluation of masks, objects without a mask are ignored like crowds. Boxes are those of the index:
    cut to their image, where COCO's own evaluation takes them as the file has them.

    Args:
        index: ground truth, with its masks if they are to be compared.
        results: COCO results, as `coco_results` returns them.
    """
    tables: list[str] = []
    metrics: Metrics = {"segm": None, "bbox": None}
    if index.masks is None:
        logger.warning("%s: no object has a mask: only boxes are evaluated", index.annotations)
    elif missing := sum(
        mask is None for mask, crowd in zip(index.masks, index.crowd, strict=True) if not crowd
    ):
        logger.warning("%s: %d objects have no mask: mask AP ignores them", index.annotations, missing)
    for kind in ("bbox",) if index.masks is None else ("segm", "bbox"):
        # pycocotools writes into results, and takes a mask's area from its box if there is one.
        rows = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in results]
        table, metrics[kind] = _coco_table(_ground_truth(index, kind), rows, kind)
        tables.append(f"{'Masks' if kind == 'segm' else 'Boxes'}\n{table}")
    return Evaluation("\n".join(tables), metrics)


def _ground_truth(index: DataIndex, kind: str) -> dict[str, Any]:
    """The content of a COCO JSON file with the index's objects."""
    owners = np.repeat(np.arange(len(index)), np.diff(index.starts))  # (M,)
    columns = {
        "id": range(1, len(owners) + 1),  # to pycocotools the id 0 means unmatched
        "image_id": index.image_ids[owners].tolist(),
        "category_id": np.asarray(index.category_ids)[index.labels].tolist(),
        "bbox": box_convert(torch.from_numpy(index.boxes).double(), "xyxy", "xywh").tolist(),
        "area": index.area.tolist(),
        "iscrowd": index.crowd.tolist(),
    }
    annotations = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind == "segm" and index.masks is not None:
        sizes = index.sizes[owners].tolist()
        for annotation, mask, size in zip(annotations, index.masks, sizes, strict=True):
            annotation["segmentation"] = {"size": size, "counts": mask}
            if mask is None:  # ignored, and so are detections in its box
                annotation["iscrowd"] = True
                (annotation["segmentation"],) = mask_utils.frPyObjects(np.array([annotation["bbox"]]), *size)
    return {
        "info": {},
        "images": [
            {"id": image_id, "height": height, "width": width}
            for image_id, (height, width) in zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True)
        ],
        "categories": [{"id": each} for each in index.category_ids],
        "annotations": annotations,
    }


class WithStoredImage:
    """A transform of images that also keeps each image as it was stored, as `stored_image` of its target."""

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
        detections = segmenter([image.to(device) for image in images])
        if refinement == "color":
            detections = refine_detections([targets[0]["stored_image"].to(device)], detections)
        height, width = dataset.index.sizes[i].tolist()
        category_ids = dataset.index.category_ids
        results += coco_results(detections[0], targets[0]["image_id"], (height, width), category_ids)
    return results


def _coco_table(
    content: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> tuple[str, dict[str, float | None]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # pycocotools prints
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**content, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        printed.truncate(0)
        printed.seek(0)
        evaluation.summarize()
    # pycocotools gives −1 if there is no object.
    ap, ap50, ap75 = (None if value < 0 else round(100 * float(value), 2) for value in evaluation.stats[:3])
    return printed.getvalue().rstrip(), {"AP": ap, "AP50": ap50, "AP75": ap75}
