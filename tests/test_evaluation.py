"""COCO evaluation, against known ground truth and pycocotools."""

import contextlib
import io
import json
import math
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from boxteacher.cli import main
from boxteacher.data import DataIndex
from boxteacher.data.index import IndexedImage, IndexedObject, build_index
from boxteacher.engine.average_precision import coco_evaluation
from boxteacher.engine.evaluate import coco_results, read_truth
from tests.data_support import compressed
from tests.engine_support import annotation, edited, without_masks

FULL = {"AP": 100.0, "AP50": 100.0, "AP75": 100.0}


def test_evaluate_prints_a_line_of_json_and_writes_it(run, shapes, capsys):
    assert main(["evaluate", str(run / "last.pt"), "--data", str(shapes), "--workers", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    metrics = json.loads(printed[-1])
    assert set(metrics) == {"segm", "bbox"}
    for figures in metrics.values():
        assert set(figures) == {"AP", "AP50", "AP75"}
        assert all(0 <= value <= 100 for value in figures.values())
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert sum("Average Precision" in line for line in printed) == 12


def test_evaluation_finds_files_however_their_names_are_composed(run, shapes, tmp_path):
    def rename(content: dict[str, Any]) -> None:
        for record in content["images"]:
            record["file_name"] = unicodedata.normalize("NFC", f"ü{record['file_name']}")

    data = edited(shapes, tmp_path / "data", "val", rename)
    for path in (data / "val").iterdir():
        path.rename(path.with_name(unicodedata.normalize("NFD", f"ü{path.name}")))
    checkpoint = shutil.copy(run / "last.pt", tmp_path)
    assert main(["evaluate", str(checkpoint), "--data", str(data), "--workers", "0"]) == 0


def truth(root: Path) -> DataIndex:
    return read_truth(root, ["disc", "triangle", "star", "cross"], [1, 2, 3, 4])


def truth_as_results(root: Path) -> list[dict[str, Any]]:
    content = json.loads((root / "annotations" / "val.json").read_text())
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: record[key] for key in keys}, "score": 0.9} for record in content["annotations"]]


def random_results(root: Path) -> list[dict[str, Any]]:
    """Three shifted copies of each ground-truth object, some of another class."""
    generator = np.random.default_rng(0)
    results = []
    for row in truth_as_results(root) * 3:
        dx, dy = (int(value) for value in generator.normal(0, 3, 2))
        x, y, width, height = row["bbox"]
        mask = np.roll(mask_utils.decode(row["segmentation"]), (dy, dx), (0, 1))
        moved = {"bbox": [x + dx, y + dy, width + dy, height], "segmentation": compressed(mask)}
        category = row["category_id"] if generator.random() < 0.8 else 1
        results.append({**row, **moved, "category_id": category, "score": generator.random()})
    return results


def test_the_ground_truth_as_results_has_full_precision(shapes):
    metrics = coco_evaluation(truth(shapes), truth_as_results(shapes)).metrics
    assert metrics == {"segm": FULL, "bbox": FULL}


def with_crowds(content: dict[str, Any]) -> None:
    """Every third annotation is a crowd, every other mask a polygon, and no id equals its position."""
    for k, record in enumerate(content["annotations"]):
        x, y, width, height = record["bbox"]
        record.update(id=7 * (k + 3), iscrowd=int(k % 3 == 0))
        if k % 2:
            record["segmentation"] = [[x, y, x + width, y, x + width / 2, y + height + 0.25]]


def test_the_tables_are_those_of_pycocotools_on_the_same_file(shapes, tmp_path):
    data = edited(shapes, tmp_path / "crowds", "val", with_crowds)
    results = random_results(shapes)
    evaluation = coco_evaluation(truth(data), results)
    expected = []
    for kind, title in (("segm", "Masks"), ("bbox", "Boxes")):
        rows = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in results]
        printed = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            content = COCO(str(data / "annotations" / "val.json"))
            content.dataset["info"] = {}
            reference = COCOeval(content, content.loadRes(rows), kind)
            reference.evaluate()
            reference.accumulate()
        with contextlib.redirect_stdout(printed):
            reference.summarize()
        assert 0.05 < reference.stats[0] < 0.95
        expected.append(f"{title}\n{printed.getvalue().rstrip()}")
    assert evaluation.table == "\n".join(expected)


def test_no_results_have_precision_0(shapes):
    metrics = coco_evaluation(truth(shapes), []).metrics
    none = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    assert metrics == {"segm": none, "bbox": none}


def test_filled_boxes_as_masks_have_full_box_ap_but_low_mask_ap(shapes):
    results = truth_as_results(shapes)
    for row in results:
        height, width = row["segmentation"]["size"]
        x, y, w, h = row["bbox"]
        mask = np.zeros((height, width), dtype=np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        row["segmentation"] = compressed(mask)
    metrics = coco_evaluation(truth(shapes), results).metrics
    assert metrics["bbox"]["AP"] == 100
    assert metrics["segm"]["AP"] < 60


@pytest.mark.parametrize("area", [200, math.nan])
def test_the_size_class_of_a_mask_is_that_of_its_own_area(area):
    """A misplaced thin diagonal is a small false positive, although its box is large."""
    true, false = np.eye(200), np.eye(200)[:, ::-1]
    index = build_index(
        Path("images"),
        Path("val.json"),
        [IndexedImage(1, "1.png", (200, 200))],
        [IndexedObject(0, (0, 0, 200, 200), 0, 1, False, area, compressed(true)["counts"].encode())],
        class_names=["line"],
        category_ids=[1],
        problems=[],
    )
    results = [
        {
            "image_id": 1,
            "category_id": 1,
            "bbox": [0, 0, 200, 200],
            "score": score,
            "segmentation": compressed(m),
        }
        for score, m in ((0.9, false), (0.8, true))
    ]
    table = coco_evaluation(index, results).table.split("Boxes")[0]
    (small,) = [line for line in table.splitlines() if "Precision" in line and "small" in line]
    assert float(small.split("=")[-1]) == pytest.approx(0.5, abs=0.01)


def test_the_ground_truth_as_detections_has_full_precision(shapes):
    """`coco_results` loses nothing of detections at the stored size."""
    content = json.loads((shapes / "annotations" / "val.json").read_text())
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
    metrics = coco_evaluation(truth(shapes), results).metrics
    assert metrics["segm"]["AP"] == metrics["bbox"]["AP"] == 100


def test_results_have_the_size_of_the_stored_image():
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
    assert decoded.sum() >= 0.98 * 24 * 30  # bilinear enlargement rounds off the corners


def test_no_detections_give_no_results():
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 10, 20),
    }
    assert coco_results(empty, 0, (40, 60), [1]) == []


def bare(content: dict[str, Any]) -> None:
    for record in content["annotations"]:
        del record["area"], record["iscrowd"]


def loosely_typed(content: dict[str, Any]) -> None:
    for record in content["annotations"]:
        record.update(area=None, iscrowd="0")


def without_values(content: dict[str, Any]) -> None:
    content.update(info=None, licenses=None)
    for record in content["annotations"]:
        record.update(area=None, iscrowd=None)


def numbered_from_0(content: dict[str, Any]) -> None:
    for k, record in enumerate(content["annotations"]):
        record["id"] = k


def numbered_from_0_downwards(content: dict[str, Any]) -> None:
    for k, record in enumerate(content["annotations"]):
        record["id"] = -k


def with_other_category_ids(content: dict[str, Any]) -> None:
    for record in content["categories"]:
        record["id"] = 4 - record["id"]
    for record in content["annotations"]:
        record["category_id"] = 4 - record["category_id"]


def with_a_crowd_without_a_box(content: dict[str, Any]) -> None:
    crowd = {**content["annotations"][0], "id": 999, "iscrowd": 1}
    del crowd["bbox"]
    content["annotations"].insert(0, crowd)


def test_detections_in_a_crowd_without_a_box_are_ignored(shapes, tmp_path):
    found = truth_as_results(shapes)
    mask = np.zeros(found[0]["segmentation"]["size"])
    mask[:3, :4] = 1
    inside = {**found[0], "bbox": [0, 0, 4, 3], "segmentation": compressed(mask), "score": 1.0}

    def add_crowd(content: dict[str, Any]) -> None:
        crowd = {**content["annotations"][0], "id": 999, "iscrowd": 1, "segmentation": compressed(mask)}
        del crowd["bbox"], crowd["area"]
        content["annotations"].append(crowd)

    metrics = coco_evaluation(truth(shapes), [*found, inside]).metrics
    assert metrics["segm"]["AP"] < 100
    assert metrics["bbox"]["AP"] < 100
    index = truth(edited(shapes, tmp_path / "data", "val", add_crowd))
    assert coco_evaluation(index, [*found, inside]).metrics == {"segm": FULL, "bbox": FULL}


def with_a_box_outside(content: dict[str, Any]) -> None:
    first = content["annotations"][0]
    content["annotations"].insert(0, {**first, "id": 999, "bbox": [1000, 5, 9, 9]})


@pytest.mark.parametrize(
    "change",
    [
        *(bare, loosely_typed, without_values, numbered_from_0, numbered_from_0_downwards),
        *(with_other_category_ids, with_a_crowd_without_a_box, with_a_box_outside),
    ],
)
def test_unusual_but_valid_files_change_no_precision(shapes, tmp_path, change):
    data = edited(shapes, tmp_path / "data", "val", change)
    assert coco_evaluation(truth(data), truth_as_results(shapes)).metrics == {"segm": FULL, "bbox": FULL}


def test_without_masks_in_the_annotations_only_boxes_are_evaluated(shapes, tmp_path, caplog):
    index = truth(edited(shapes, tmp_path / "stripped", "val", without_masks))
    results = random_results(shapes)
    metrics = coco_evaluation(index, results).metrics
    assert metrics == {"segm": None, "bbox": coco_evaluation(truth(shapes), results).metrics["bbox"]}
    assert "only boxes are evaluated" in caplog.text


def partly_masked(content: dict[str, Any]) -> None:
    annotation(content)["segmentation"] = [[1, 2, 3, 4]]
    del content["annotations"][4]["segmentation"]


def test_objects_without_a_valid_mask_are_ignored_in_mask_ap(shapes, tmp_path, caplog):
    index = truth(edited(shapes, tmp_path / "data", "val", partly_masked))
    assert "annotations[2]" in caplog.text
    assert "segmentation is no mask" in caplog.text
    found = truth_as_results(shapes)
    assert coco_evaluation(index, found).metrics == {"segm": FULL, "bbox": FULL}
    assert "2 of 12 objects have no mask, the first the annotation of id 3" in caplog.text
    missed = [row for k, row in enumerate(found) if k not in (2, 4)]
    metrics = coco_evaluation(index, missed).metrics
    assert metrics["segm"] == FULL
    assert metrics["bbox"]["AP"] < 100
    results = random_results(shapes)
    expected = coco_evaluation(truth(shapes), results).metrics["bbox"]
    assert coco_evaluation(index, results).metrics["bbox"] == expected


def rectangle(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


ODD_MASKS: dict[str, Any] = {
    "null": lambda box: None,
    "no ring": lambda box: [],
    "empty ring": lambda box: [[]],
    "empty rings": lambda box: [[], []],
    "a box": lambda box: box,
    "a box as ring": lambda box: [box],
    "a point": lambda box: [box[:2]],
    "no pixel": lambda box: [[box[0], box[1]] * 3],
    "a ring and a point": lambda box: [rectangle(box), box[:2]],
}


@pytest.mark.parametrize("name", ODD_MASKS)
@pytest.mark.parametrize("objects", [slice(0, 1), slice(None)], ids=["one", "all"])
def test_box_ap_never_depends_on_masks(shapes, tmp_path, name, objects):
    def change(content: dict[str, Any]) -> None:
        for record in content["annotations"][objects]:
            record["segmentation"] = ODD_MASKS[name](record["bbox"])

    index = truth(edited(shapes, tmp_path / "data", "val", change))
    expected = coco_evaluation(truth(shapes), random_results(shapes)).metrics["bbox"]
    assert coco_evaluation(index, random_results(shapes)).metrics["bbox"] == expected
    found = truth_as_results(shapes)
    if name == "a ring and a point":
        for row in found[objects]:
            height, width = row["segmentation"]["size"]
            rings = mask_utils.frPyObjects([rectangle(row["bbox"])], height, width)
            row["segmentation"] = {**rings[0], "counts": rings[0]["counts"].decode()}
        assert coco_evaluation(index, found).metrics == {"segm": FULL, "bbox": FULL}
    else:
        segm = FULL if objects.stop else None
        assert coco_evaluation(index, found).metrics == {"segm": segm, "bbox": FULL}


@pytest.mark.parametrize("count", [1, 5])
def test_one_object_of_id_0_is_found(count):
    """To pycocotools an object of id 0 is never matched."""
    index, results = squares(count)
    assert index.annotation_ids[0] == 0
    assert coco_evaluation(index, results).metrics == {"segm": FULL, "bbox": FULL}


def squares(count: int) -> tuple[DataIndex, list[dict[str, Any]]]:
    """Objects of 8 × 8 pixels in rows of 15 in one image, and perfect results."""
    objects, results = [], []
    for i in range(count):
        x, y = 16 * (i % 15), 16 * (i // 15)
        mask = np.zeros((240, 240), dtype=np.uint8)
        mask[y : y + 8, x : x + 8] = 1
        rle = compressed(mask)
        counts = rle["counts"].encode()
        objects.append(IndexedObject(0, (x, y, x + 8, y + 8), 0, i, False, 64, counts))
        row = {"image_id": 3, "category_id": 1, "bbox": [x, y, 8, 8], "segmentation": rle}
        results.append({**row, "score": 1 - i / 1000})
    image = IndexedImage(3, "3.png", (240, 240))
    options = {"class_names": ["cell"], "category_ids": [1], "problems": []}
    return build_index(Path("images"), Path("val.json"), [image], objects, **options), results


def test_all_objects_of_an_image_are_compared_beside_coco_s_100():
    index, results = squares(225)
    index = replace(index, masks=None)
    evaluation = coco_evaluation(index, results)
    # Recall 100 / 225 reaches 45 of COCO's 101 recall levels.
    at_100 = dict.fromkeys(("AP@100", "AP50@100", "AP75@100"), 44.55)
    assert evaluation.metrics == {"segm": None, "bbox": FULL | at_100}
    limited = coco_evaluation(index, results, max_detections=100)
    assert limited.metrics == {"segm": None, "bbox": dict.fromkeys(FULL, 44.55)}


def test_the_lines_of_more_detections_are_those_of_pycocotools(shapes):
    results = random_results(shapes)
    lines = coco_evaluation(truth(shapes), results, max_detections=225).table.split("Boxes\n")[1].splitlines()
    with contextlib.redirect_stdout(io.StringIO()):
        content = COCO(str(shapes / "annotations" / "val.json"))
        content.dataset["info"] = {}
        reference = COCOeval(content, content.loadRes(results), "bbox")
        reference.params.maxDets = [1, 10, 225]
        reference.evaluate()
        reference.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        reference.summarize()
    # Its first line is always of 100 detections, of which it knows nothing here.
    assert lines[1:6] == printed.getvalue().splitlines()[1:6]
    assert lines[0] == lines[6].replace("maxDets=100", "maxDets=225")  # no image has more than 100 results


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 40), st.integers(4, 40), st.integers(0, 100))
def test_resizing_keeps_the_share_of_the_image_that_a_mask_covers(h, w, height, width, seed):
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
