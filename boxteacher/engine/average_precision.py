"""COCO's average precision of results, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from boxteacher.data import DataIndex
from boxteacher.engine.segmenters import COCO_MAX_DETECTIONS

Metrics = dict[str, dict[str, float | None] | None]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        table: COCO's tables as text.
        metrics: AP, AP50 and AP75 in percent of "segm" and "bbox". "segm" is None if the annotations have no
            masks; a figure is None if there is no object. If more than 100 detections per image were
            compared, those of COCO's own 100 are beside them as AP@100, AP50@100 and AP75@100.
    """

    table: str
    metrics: Metrics


def coco_evaluation(
    index: DataIndex, results: list[dict[str, Any]], max_detections: int | None = None
) -> Evaluation:
    """COCO's evaluation of boxes, and of masks if any object has one.

    In the evaluation of masks, objects without a mask are ignored like crowds. Boxes are those of the index:
    cut to their image, where COCO's own evaluation takes them as the file has them.

    Args:
        index: ground truth, with its masks if they are to be compared.
        results: COCO results, as `coco_results` returns them.
        max_detections: number of detections per image and class, the best ones, that are compared besides
            COCO's 100 if it is more; if not given, the maximum number of objects in an image.
    """
    tables: list[str] = []
    metrics: Metrics = {"segm": None, "bbox": None}
    limit = max(COCO_MAX_DETECTIONS, max_detections or index.max_boxes()[0])
    for kind in ("bbox",) if index.masks is None else ("segm", "bbox"):
        # pycocotools writes into results, and takes a mask's area from its box if there is one.
        rows = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in results]
        table, metrics[kind] = _coco_table(_ground_truth(index, kind), rows, kind, limit)
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


def _coco_table(
    content: dict[str, Any], results: list[dict[str, Any]], kind: str, max_detections: int
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
        more = [max_detections] if max_detections > COCO_MAX_DETECTIONS else []
        evaluation.params.maxDets += more  # the summary is of the first three: 1, 10 and 100
        evaluation.evaluate()
        evaluation.accumulate()
        printed.truncate(0)
        printed.seek(0)
        evaluation.summarize()
    table, figures = printed.getvalue().rstrip(), _figures(evaluation.stats[:3])
    if more:
        lines, stats = _summary(evaluation)
        table = f"{lines}\n{table}"
        figures = _figures(stats) | {f"{name}@100": value for name, value in figures.items()}
    return table, figures


def _figures(stats: Sequence[float]) -> dict[str, float | None]:
    """AP, AP50 and AP75 in percent; pycocotools gives −1 if there is no object."""
    percent = (None if value < 0 else round(100 * float(value), 2) for value in stats)
    return dict(zip(("AP", "AP50", "AP75"), percent, strict=True))


def _summary(evaluation: COCOeval) -> tuple[str, list[float]]:
    """COCO's lines of AP for the largest number of detections, and the first three values."""
    params = evaluation.params
    precision = evaluation.eval["precision"][..., -1]  # (T, R, C, A): IoU, recall, class, area
    at_50, at_75 = (int(np.argmin(abs(params.iouThrs - iou))) for iou in (0.5, 0.75))
    rows = [("0.50:0.95", precision[:, :, :, 0], "all")]
    rows += [(iou, precision[i, :, :, 0], "all") for iou, i in (("0.50", at_50), ("0.75", at_75))]
    rows += [("0.50:0.95", precision[:, :, :, i], params.areaRngLbl[i]) for i in (1, 2, 3)]
    values = [float(part[part > -1].mean()) if (part > -1).any() else -1.0 for _, part, _ in rows]
    most = params.maxDets[-1]
    lines = [
        f" Average Precision  (AP) @[ IoU={iou:9} | area={area:>6} | maxDets={most:>3} ] = {value:0.3f}"
        for (iou, _, area), value in zip(rows, values, strict=True)
    ]
    return "\n".join(lines), values[:3]
