"""COCO evaluation, against truths that are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from torch import Tensor

from boxteacher.cli import main
from boxteacher.engine.evaluate import coco_evaluation, coco_results, read_truth
from tests.engine_support import (
    annotation,
    edited,
    error_of,
    without_masks,
)


def test_evaluation_ends_with_a_line_of_json_and_keeps_it(run, shapes, capsys):
    assert main(["evaluate", str(run / "last.pt"), "--data", str(shapes), "--workers", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    metrics = json.loads(printed[-1])
    assert set(metrics) == {"segm", "bbox"}
    for figures in metrics.values():
        assert set(figures) == {"AP", "AP50", "AP75"}
        assert all(0 <= value <= 100 for value in figures.values())
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert sum("Average Precision" in line for line in printed) == 12


def truth_as_results(file: Path) -> list[dict[str, Any]]:
    content = json.loads(file.read_text())
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: record[key] for key in keys}, "score": 0.9} for record in content["annotations"]]


def test_the_truth_itself_has_full_precision(shapes):
    file = shapes / "annotations" / "val.json"
    metrics = coco_evaluation(read_truth(file), truth_as_results(file)).metrics
    full = {"AP": 100.0, "AP50": 100.0, "AP75": 100.0}
    assert metrics == {"segm": full, "bbox": full}


def test_nothing_found_has_no_precision(shapes):
    metrics = coco_evaluation(read_truth(shapes / "annotations" / "val.json"), []).metrics
    none = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    assert metrics == {"segm": none, "bbox": none}


def test_boxes_drawn_as_masks_are_right_boxes_but_wrong_masks(shapes):
    file = shapes / "annotations" / "val.json"
    results = truth_as_results(file)
    for row in results:
        height, width = row["segmentation"]["size"]
        x, y, w, h = row["bbox"]
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        row["segmentation"] = rle_of(mask)
    metrics = coco_evaluation(read_truth(file), results).metrics
    assert metrics["bbox"]["AP"] == 100
    assert metrics["segm"]["AP"] < 60


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def test_the_size_of_a_mask_is_its_own_not_its_box_s(tmp_path):
    """A thin diagonal found in the wrong place is a small false mask, however large its box is."""
    true, false = np.eye(200), np.eye(200)[:, ::-1]
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "area": 200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 200}],
        "annotations": [{**record, "segmentation": rle_of(true)}],
        "categories": [{"id": 1, "name": "line"}],
    }
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "score": score, "segmentation": rle_of(m)}
        for score, m in ((0.9, false), (0.8, true))
    ]
    table = coco_evaluation(read_truth(file), results).table.split("Boxes")[0]
    (small,) = [line for line in table.splitlines() if "Precision" in line and "small" in line]
    assert float(small.split("=")[-1]) == pytest.approx(0.5, abs=0.01)


def test_the_truth_goes_through_coco_results_unharmed(shapes):
    """As detections at the stored size, the truth still has full precision."""
    file = shapes / "annotations" / "val.json"
    content = json.loads(file.read_text())
    results = []
    for image in content["images"]:
        mine = [record for record in content["annotations"] if record["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in mine], dtype=torch.float32)
        masks = torch.stack([torch.from_numpy(mask_utils.decode(r["segmentation"])) for r in mine])
        detections = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "labels": torch.tensor([r["category_id"] - 1 for r in mine]),
            "scores": torch.full((len(mine),), 0.7),
            "masks": masks[:, None].float(),
        }
        results += coco_results(detections, image["id"], (image["height"], image["width"]), [1, 2, 3, 4])
    metrics = coco_evaluation(read_truth(file), results).metrics
    assert metrics["segm"]["AP"] == metrics["bbox"]["AP"] == 100


def test_results_are_at_the_size_of_the_stored_image():
    mask = torch.zeros(1, 1, 10, 20)
    mask[0, 0, 2:8, 5:15] = 1.0
    detections = {
        "boxes": torch.tensor([[5.0, 2, 15, 8]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": mask,
    }
    (row,) = coco_results(detections, 7, (40, 60), [11, 22])
    assert (row["image_id"], row["category_id"], row["score"]) == (7, 22, 0.5)
    assert row["bbox"] == [15, 8, 30, 24]
    assert row["segmentation"]["size"] == [40, 60]
    decoded = mask_utils.decode(row["segmentation"])
    assert decoded.sum() == decoded[8:32, 15:45].sum()
    assert decoded.sum() >= 0.98 * 24 * 30  # bilinear enlargement rounds the corners


def test_no_detections_are_no_results():
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 10, 20),
    }
    assert coco_results(empty, 0, (40, 60), [1]) == []


def test_without_masks_in_the_annotations_only_boxes_are_evaluated(run, shapes, tmp_path, capsys):
    data = edited(shapes, tmp_path / "stripped", "val", without_masks)
    checkpoint = tmp_path / "last.pt"
    shutil.copy(run / "last.pt", checkpoint)
    assert main(["evaluate", str(checkpoint), "--data", str(data), "--workers", "0"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["segm"] is None
    assert set(metrics["bbox"]) == {"AP", "AP50", "AP75"}


def test_annotations_without_area_or_crowd_flag_are_evaluated(shapes, tmp_path):
    def bare(content: dict[str, Any]) -> None:
        for record in content["annotations"]:
            del record["area"], record["iscrowd"]

    data = edited(shapes, tmp_path / "bare", "val", bare)
    results = truth_as_results(shapes / "annotations" / "val.json")
    metrics = coco_evaluation(read_truth(data / "annotations" / "val.json"), results).metrics
    assert metrics["segm"]["AP"] == metrics["bbox"]["AP"] == 100


def test_a_broken_mask_stops_an_evaluation_before_it_begins(run, shapes, tmp_path, capsys):
    def break_mask(content: dict[str, Any]) -> None:
        annotation(content)["segmentation"] = [[1, 2, 3, 4]]

    data = edited(shapes, tmp_path / "data", "val", break_mask)
    assert "segmentation" in error_of(["evaluate", str(run / "last.pt"), "--data", str(data)], capsys)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 40), st.integers(4, 40), st.integers(0, 100))
def test_results_keep_the_share_of_the_image_that_a_mask_covers(h, w, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    left = int(torch.randint(0, w, (), generator=generator))
    mask: Tensor = torch.zeros(1, 1, h, w)
    mask[..., left:] = 1.0
    detections = {
        "boxes": torch.tensor([[float(left), 0, w, h]]),
        "labels": torch.tensor([0]),
        "scores": torch.tensor([0.5]),
        "masks": mask,
    }
    (row,) = coco_results(detections, 0, (height, width), [1])
    area = mask_utils.area(row["segmentation"]) / (height * width)
    assert abs(area - (w - left) / w) <= 1 / width + 1 / w
    assert row["bbox"][0] + row["bbox"][2] == pytest.approx(width, abs=0.011)
