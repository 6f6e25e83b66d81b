"""The maximum number of detections per image: of the four segmenters, of a run, and of its evaluation."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from boxteacher import BoxTeacher
from boxteacher.cli import main
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.segmenters import build_segmenter, limit_detections
from tests.engine_support import annotation, edited, error_of, train_arguments
from tests.support import seeded_images, target


def talkative(name: str, **options: Any) -> Any:
    """An untrained network that finds hundreds of objects."""
    torch.manual_seed(0)
    model: Any = build_segmenter(name, 3, backbone="resnet18", weights="none", image_size=128, **options)
    with torch.no_grad():
        if name == "condinst":
            model.box_head.class_logits.bias.fill_(2.0)
        if name == "solov2":
            for layer in (model.head.category, model.head.kernel):
                layer.weight.normal_(std=0.1)
            model.head.category.bias.zero_()
        if name == "mask_rcnn":
            model.model.roi_heads.nms_thresh = 1.0
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["condinst", "solov2", "mask2former", "mask_rcnn"])
def test_a_segmenter_detects_up_to_its_maximum(name):
    images = seeded_images((128, 128))
    default, more = talkative(name), talkative(name, max_detections=130)
    assert [len(found["scores"]) for found in default(images)] == [100]
    assert [len(found["scores"]) for found in more(images)] == [130]
    assert len(default.forward_teacher(images).scores) == 100
    assert len(more.forward_teacher(images).scores) == 130
    limit_detections(more, 7)
    assert [len(found["scores"]) for found in more(images)] == [7]


def test_a_network_without_a_maximum_is_left_as_it_is(caplog):
    network = nn.Linear(2, 2)
    limit_detections(network, 100)
    assert not caplog.records
    limit_detections(network, 101)
    assert "Linear has no attribute max_detections" in caplog.text
    assert not hasattr(network, "max_detections")


def test_a_teacher_says_once_that_it_proposes_fewer_masks_than_there_are_boxes(caplog):
    model = BoxTeacher(talkative("condinst").requires_grad_(True)).train()
    images = seeded_images((128, 128))
    model(images, [target(*[(8, 8, 72, 72)] * 100)])
    assert not caplog.records
    for _ in range(2):
        model(images, [target(*[(8, 8, 72, 72)] * 101)])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has 101 boxes, but the teacher proposes at most 100" in caplog.text


def with_more(number: int):
    def change(content: dict[str, Any]) -> None:
        record = annotation(content)
        content["annotations"] += [{**record, "id": 10**6 + i} for i in range(number)]

    return change


@pytest.fixture(scope="module")
def dense(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with more than 110 boxes in the training split, and one with more than 130 for validation."""
    folder = tmp_path_factory.mktemp("dense")
    train = edited(shapes, folder / "train", "train", with_more(110))
    return edited(train, folder / "both", "val", with_more(130))


def most_boxes(data: Path, split: str) -> int:
    content = json.loads((data / "annotations" / f"{split}.json").read_text())
    owners = [record["image_id"] for record in content["annotations"]]
    return max(map(owners.count, owners))


def test_a_run_and_its_evaluation_detect_as_many_objects_as_images_have(dense, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    assert main([*train_arguments(dense, tmp_path / "run"), "--steps", "1"]) == 0
    most = most_boxes(dense, "val")
    assert most > most_boxes(dense, "train") > 110
    assert f"has {most} boxes: up to {most} objects are detected" in caplog.text
    checkpoint = tmp_path / "run" / "last.pt"
    segmenter, info = load_checkpoint(checkpoint)
    assert (segmenter.max_detections, info.max_detections) == (most, most)
    assert main(["evaluate", str(checkpoint), "--data", str(dense), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"maxDets={most}" in printed
    assert set(json.loads(printed.splitlines()[-1])["segm"]) == {
        *("AP", "AP50", "AP75"),
        *("AP@100", "AP50@100", "AP75@100"),
    }


def test_a_given_maximum_below_the_number_of_boxes_is_said_before_the_training(dense, tmp_path, caplog):
    arguments = [*train_arguments(dense, tmp_path / "run"), "--steps", "1", "--max-detections", "120"]
    assert main(arguments) == 0
    assert f"has {most_boxes(dense, 'val')} boxes, but at most 120 objects" in caplog.text
    assert load_checkpoint(tmp_path / "run" / "last.pt")[1].max_detections == 120


def test_queries_are_enough_unless_a_maximum_says_otherwise(dense, tmp_path, capsys):
    arguments = [*train_arguments(dense, tmp_path / "few"), "--model", "mask2former"]
    message = error_of([*arguments, "--max-detections", "100"], capsys)
    assert "mask2former detects at most 100 objects" in message
    assert "raise --max-detections" in message
    content = json.loads((dense / "annotations" / "train.json").read_text())
    image = annotation(content)["image_id"]
    assert next(each["file_name"] for each in content["images"] if each["id"] == image) in message
    assert not (tmp_path / "few").exists()
    assert talkative("mask2former", max_detections=140).num_queries == 140


def test_predictions_are_limited(checkpoint_with_detections, shapes, tmp_path):
    image = sorted((shapes / "val").iterdir())[0]
    options = ["--output", str(tmp_path / "out"), "--score-threshold", "0", "--max-detections", "3"]
    assert main(["predict", str(checkpoint_with_detections), str(image), *options]) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 3
