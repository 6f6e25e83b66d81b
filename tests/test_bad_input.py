"""Bad input of every command ends in an error of one line, before anything is trained or written."""

import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from boxteacher.cli import main
from boxteacher.engine.batches import check_validation_split, training_data
from boxteacher.engine.settings import TrainSettings
from tests.engine_support import (
    annotation,
    drop_annotations,
    edited,
    error_of,
    train_arguments,
    without_masks,
)


@pytest.mark.parametrize(
    "values",
    [
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--momentum", "2"],
        ["--momentum", "-0.1"],
        ["--steps", "0"],
        ["--batch-size", "-1"],
        ["--workers", "-1"],
        ["--image-size", "x"],
        ["--teacher-size", "800", "640"],
        ["--supervision", "boxes"],
    ],
)
def test_invalid_values_of_options_are_refused_in_one_line(shapes, tmp_path, capsys, values):
    try:
        code = main(train_arguments(shapes, tmp_path / "run", *values))
    except SystemExit as refused:  # by the parser
        code = refused.code
    error = capsys.readouterr().err
    assert code == 2
    assert values[0].strip("-").replace("-", "_") in error.replace("-", "_")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_annotations, ["train.json", "box"]),
        (lambda c: annotation(c).update(category_id=99), ["train.json", "99", "annotations[2]"]),
        (lambda c: annotation(c).update(bbox=[1, 2, math.nan, 3]), ["train.json", "nan"]),
        (lambda c: c["images"][1].update(file_name="gone.png"), ["gone.png"]),
    ],
)
def test_an_invalid_annotation_file_is_named_in_one_line(shapes, tmp_path, capsys, change, named):
    data = edited(shapes, tmp_path / "data", "train", change)
    message = error_of(train_arguments(data, tmp_path / "run"), capsys)
    assert all(part in message for part in named)
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing_or_broken_are_named_in_one_line(shapes, tmp_path, capsys):
    def message(data: Path) -> str:
        text = error_of(train_arguments(data, tmp_path / "run"), capsys)
        assert not (tmp_path / "run").exists()
        return text

    assert str(tmp_path / "nowhere") in message(tmp_path / "nowhere")

    neither = tmp_path / "neither"
    neither.mkdir()
    assert str(neither) in message(neither)

    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    image = sorted((data / "train").iterdir())[3]
    image.write_bytes(image.read_bytes()[:-200])
    assert str(image) in message(data)
    image.unlink()
    assert str(image) in message(data)

    (data / "annotations" / "train.json").write_text("{'not': json")
    assert str(data / "annotations" / "train.json") in message(data)


def test_a_finished_run_is_never_overwritten(shapes, run, capsys):
    before = (run / "last.pt").read_bytes()
    assert str(run / "last.pt") in error_of(train_arguments(shapes, run), capsys)
    assert (run / "last.pt").read_bytes() == before


def test_an_output_that_is_a_file_is_named(shapes, tmp_path, capsys):
    output = tmp_path / "file"
    output.write_text("mine")
    assert str(output) in error_of(train_arguments(shapes, output), capsys)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "no_model"),
        ("--backbone", "no_backbone"),
        ("--weights", "no_weights.pth"),
        ("--device", "no_device"),
    ],
)
def test_an_unknown_name_is_named(shapes, tmp_path, capsys, option, value):
    message = error_of(train_arguments(shapes, tmp_path / "run", option, value), capsys)
    assert value in message
    assert not (tmp_path / "run").exists()


UNREADABLE = ("empty", "truncated", "picture", "foreign", "other", "nothing", "half", "info")
WRONG_INFO = {
    "size": {"image_size": "big"},
    "side": {"shortest_side": "x"},
    "classes": {"class_names": 5},
    "ids": {"category_ids": [1, 2]},
}


def break_checkpoint(run: Path, path: Path, kind: str) -> None:
    content = torch.load(run / "last.pt", weights_only=True)
    broken = {
        "empty": b"",
        "truncated": (run / "last.pt").read_bytes()[:-5000],
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(300),
        "foreign": {"conv1.weight": torch.zeros(3)},
        "other": [1, 2, 3],
        "half": {**content, "weights": dict(list(content["weights"].items())[:10])},
        "info": {**content, "info": {"model": "condinst"}},
        "text": {**content, "weights": {**content["weights"], "mean": "text"}},
        **{name: {**content, "info": {**content["info"], **wrong}} for name, wrong in WRONG_INFO.items()},
    }
    if isinstance(broken.get(kind), bytes):
        path.write_bytes(broken[kind])
    elif kind in broken:
        torch.save(broken[kind], path)


@pytest.mark.parametrize("kind", [*UNREADABLE, *WRONG_INFO, "text"])
def test_a_broken_checkpoint_is_named_in_one_line(run, shapes, tmp_path, capsys, kind):
    path = tmp_path / "broken.pt"
    break_checkpoint(run, path, kind)
    assert str(path) in error_of(["evaluate", str(path), "--data", str(shapes), "--workers", "0"], capsys)
    assert not (path.parent / "metrics.json").exists()


def renumber(content: dict[str, Any]) -> None:
    for record in content["categories"]:
        record["id"] += 10
    for record in content["annotations"]:
        record["category_id"] += 10


def renumber_and_rename(content: dict[str, Any]) -> None:
    renumber(content)
    for record in content["categories"]:
        record["name"] += "s"


def test_a_validation_split_of_other_categories_is_refused_before_and_after_training(
    run, shapes, tmp_path, capsys
):
    data = edited(shapes, tmp_path / "foreign", "val", renumber_and_rename)
    count = len(json.loads((data / "annotations" / "val.json").read_text())["annotations"])
    said = f"{count} of {count} annotations have a category that training does not: discs (id 11)"
    arguments = ["evaluate", str(run / "last.pt"), "--data", str(data), "--workers", "0"]
    assert said in error_of(arguments, capsys)
    assert said in error_of(train_arguments(data, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def few_masks(content: dict[str, Any]) -> None:
    annotation(content)["segmentation"] = [[]]
    del content["annotations"][4]["segmentation"]


def other_names(content: dict[str, Any]) -> None:
    for record, name in zip(content["categories"], ("circle", "wedge", "sun", "plus"), strict=True):
        record["name"] = name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            few_masks,
            ["annotations[2] (id 3): segmentation is no mask", "2 of 12 objects have no mask", "id 3"],
        ),
        (without_masks, ["no object has a mask: only boxes are evaluated"]),
        (renumber, ["12 of 12 annotations have another category id", "matched by name"]),
        (other_names, ["annotations have another category name", "1 is circle, not disc", "matched by id"]),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"][::2]], ["6 of 12 objects are crowds"]),
        (lambda c: [a.update(bbox=[0.1, 0.2, 0.5, 0.4]) for a in c["annotations"]], ["12 of 12 boxes"]),
    ],
)
def test_what_a_validation_split_lacks_is_said_before_the_training(shapes, tmp_path, caplog, change, said):
    data = edited(shapes, tmp_path / "data", "val", change)
    settings = TrainSettings("condinst", data, tmp_path, device="cpu")
    check_validation_split(settings, training_data(settings))
    assert all(part in caplog.text for part in said)
    assert all(str(data / "annotations" / "val.json") in record.message for record in caplog.records)


def test_prediction_of_broken_images_or_of_two_of_one_name_writes_nothing(run, shapes, tmp_path, capsys):
    good = sorted((shapes / "val").iterdir())[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:100])
    twin = tmp_path / good.name
    shutil.copy(good, twin)
    out = tmp_path / "out"
    for images, named in (
        ([good, broken], str(broken)),
        ([good, tmp_path / "gone.png"], "gone.png"),
        ([good, twin], good.stem),
    ):
        arguments = ["predict", str(run / "last.pt"), *map(str, images), "--output", str(out)]
        error = error_of(arguments, capsys)
        assert named in error
        assert "record" not in error
        assert not out.exists()


@pytest.mark.parametrize("threshold", ["nan", "-0.1", "60", "inf"])
def test_a_threshold_that_no_score_can_be_compared_with_is_refused(run, shapes, tmp_path, capsys, threshold):
    arguments = ["predict", str(run / "last.pt"), str(shapes / "val"), "--output", str(tmp_path / "out")]
    error = error_of([*arguments, f"--score-threshold={threshold}"], capsys)
    assert f"score_threshold={float(threshold)} is not in 0…1" in error
    assert not (tmp_path / "out").exists()


def test_a_broken_image_found_by_a_worker_during_training_is_named(shapes, tmp_path, capsys, monkeypatch):
    # Torch's timeout for a worker after an error in the loader, five seconds by default.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    content = json.loads((data / "annotations" / "train.json").read_text())
    for record in content["images"]:  # the end marker that the check before training reads stays
        path = data / "train" / record["file_name"]
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    arguments = train_arguments(data, tmp_path / "run")
    arguments[arguments.index("--workers") + 1] = "1"
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"boxteacher: error: {data / 'train'}")
    assert "Traceback" not in error
    gc.collect()


def test_a_broken_validation_image_is_found_before_training(shapes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    image = sorted((data / "val").iterdir())[1]
    image.write_bytes(image.read_bytes()[:-200])
    assert image.name in error_of(train_arguments(data, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_training_without_a_validation_split_logs_a_warning(shapes, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    shutil.rmtree(data / "val")
    (data / "annotations" / "val.json").unlink()
    assert main(train_arguments(data, tmp_path / "run")) == 0
    assert "nothing to evaluate" in caplog.text
