"""Training, evaluation and prediction through the command line, on real files."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils
from torch import Tensor

from boxteacher import BoxTeacher, InputError
from boxteacher.cli import main
from boxteacher.data import write_shapes
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint, save_checkpoint
from boxteacher.engine.devices import pick_device, to_device
from boxteacher.engine.drawing import contact_sheet, draw_detections
from boxteacher.engine.evaluate import coco_evaluation, coco_results, read_truth
from boxteacher.engine.files import write_atomically
from boxteacher.engine.segmenters import build_segmenter, segmenter_names
from boxteacher.engine.train import TrainSettings, supervise
from boxteacher.supervision import BoxSupervised, MaskSupervised

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=8, val=4, size=64)
    return root


def train_arguments(data: Path, output: Path, *more: str) -> list[str]:
    fixed = "--model condinst --backbone resnet18 --weights none --image-size 64 --workers 0 --device cpu"
    where = ["--data", str(data), "--output", str(output)]
    return ["train", *fixed.split(), "--batch-size", "2", "--steps", "3", *where, *more]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_arguments(shapes, output)) == 0
    return output


def log_of(output: Path, *left_out: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", *left_out)} for line in lines]


def edited(root: Path, copy: Path, split: str, change: Change) -> Path:
    """A copy of a data set whose annotation file has been changed."""
    shutil.copytree(root, copy)
    file = copy / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return copy


def without_masks(content: dict[str, Any]) -> None:
    for record in content["annotations"]:
        del record["segmentation"]


# Training.


def test_a_run_leaves_a_checkpoint_its_settings_and_a_line_per_step(run, shapes):
    assert {"last.pt", "settings.json", "log.jsonl"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.partial"))
    made_with = json.loads((run / "settings.json").read_text())
    assert made_with["data"] == str(shapes)
    assert (made_with["steps"], made_with["batch_size"], made_with["seed"]) == (3, 2, 0)
    assert made_with["torch"] == torch.__version__
    lines = log_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"classification", "box", "centerness", "projection", "pairwise", "pixel", "affinity"}
    for line in lines:
        losses = {k: v for k, v in line.items() if k.startswith("loss_")}
        assert set(losses) == {f"loss_{name}" for name in names}
        assert line["loss"] == pytest.approx(sum(losses.values()), rel=1e-4)
        assert line["pseudo_masks"] >= 0
        assert 0 <= line["confidence"] <= 1


def test_the_checkpoint_is_the_trained_teacher_in_a_file_of_plain_values(run):
    segmenter, info = load_checkpoint(run / "last.pt")
    assert info == SegmenterInfo(
        "condinst", "resnet18", 64, ["disc", "triangle", "star", "cross"], [1, 2, 3, 4]
    )
    assert not segmenter.training
    assert type(segmenter).__name__ == "CondInst"
    content = torch.load(run / "last.pt", weights_only=True)
    assert content["weights"].keys() == segmenter.state_dict().keys()


@pytest.mark.parametrize("supervision", ["teacher", "box"])
def test_training_without_masks_in_the_file_is_the_same_to_the_last_bit(shapes, run, tmp_path, supervision):
    stripped = edited(shapes, tmp_path / "stripped", "train", without_masks)
    assert main(train_arguments(stripped, tmp_path / "without", "--supervision", supervision)) == 0
    if supervision == "teacher":
        reference = run
    else:
        reference = tmp_path / "with"
        assert main(train_arguments(shapes, reference, "--supervision", supervision)) == 0
    assert log_of(tmp_path / "without") == log_of(reference)
    ours, theirs = (
        torch.load(folder / "last.pt", weights_only=True)["weights"]
        for folder in (tmp_path / "without", reference)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_seed_determines_a_run_and_another_seed_does_not(shapes, run, tmp_path):
    for seed in (0, 1):
        assert main(train_arguments(shapes, tmp_path / str(seed), "--seed", str(seed))) == 0
    assert log_of(tmp_path / "0") == log_of(run)
    assert log_of(tmp_path / "1") != log_of(run)


def test_mask_supervision_reads_masks(shapes, tmp_path, capsys):
    assert main(train_arguments(shapes, tmp_path / "run", "--supervision", "mask", "--steps", "1")) == 0
    (line,) = log_of(tmp_path / "run")
    assert line["loss_mask"] > 0
    assert "loss_projection" not in line
    stripped = edited(shapes, tmp_path / "stripped", "train", without_masks)
    message = error_of(train_arguments(stripped, tmp_path / "other", "--supervision", "mask"), capsys)
    assert "segmentation" in message


def test_the_settings_scale_with_the_length_of_a_run():
    def model_of(steps: int, supervision: str = "teacher", **more: Any) -> Any:
        made = TrainSettings(
            "condinst", "resnet18", Path(), Path(), supervision=supervision, steps=steps, **more
        )
        segmenter = build_segmenter("condinst", 2, backbone="resnet18", weights="none", image_size=64)
        return supervise(segmenter, made)

    short, long = model_of(500), model_of(90_000)
    assert isinstance(short, BoxTeacher)
    assert (short.momentum, short.warmup_steps, short.pseudo_warmup_steps) == (0.98, 100, 500)
    assert (long.momentum, long.warmup_steps, long.pseudo_warmup_steps) == (0.999, 10_000, 10_000)
    given = model_of(500, momentum=0.0, warmup_steps=0, pseudo_warmup_steps=7)
    assert (given.momentum, given.warmup_steps, given.pseudo_warmup_steps) == (0, 0, 7)
    assert type(model_of(500, "box")) is BoxSupervised
    assert model_of(500, "box").warmup_steps == 100
    assert type(model_of(500, "mask")) is MaskSupervised


def test_a_registered_segmenter_is_found_by_its_name():
    assert "condinst" in segmenter_names()
    with pytest.raises(InputError, match=r"no model 'condinsd'.*condinst"):
        build_segmenter("condinsd", 2, backbone="resnet18", weights="none", image_size=64)


# Evaluation.


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


def test_prediction_never_writes_over_an_image_that_it_reads(talkative, shapes, tmp_path, capsys):
    image = tmp_path / "photograph.png"
    shutil.copy(sorted((shapes / "val").iterdir())[0], image)
    before = image.read_bytes()
    error_of(["predict", str(talkative), str(image), "--output", str(tmp_path)], capsys)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "values", [["--lr", "-1"], ["--lr", "nan"], ["--momentum", "2"], ["--momentum", "-0.1"]]
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(shapes, tmp_path, capsys, values):
    try:
        code = main(train_arguments(shapes, tmp_path / "run", *values))
    except SystemExit as refused:  # by the parser
        code = refused.code
    error = capsys.readouterr().err
    assert code == 2
    assert values[0].strip("-") in error
    assert not (tmp_path / "run").exists()


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


# Prediction.


@pytest.fixture(scope="module")
def talkative(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that finds much, whatever it looks at."""
    segmenter, info = load_checkpoint(run / "last.pt")
    head = segmenter.box_head
    with torch.no_grad():
        head.class_logits.bias.fill_(2.0)
        head.centerness.bias.fill_(2.0)
        head.distances.bias.fill_(2.0)
        head.controller.bias.normal_()
    path = tmp_path_factory.mktemp("talkative") / "last.pt"
    save_checkpoint(path, segmenter, info)
    return path


def test_prediction_draws_each_image_and_writes_coco_results(talkative, shapes, tmp_path, capsys):
    images = sorted((shapes / "val").iterdir())[:2]
    large = tmp_path / "large.jpg"
    Image.fromarray((np.random.default_rng(0).random((90, 150, 3)) * 255).astype(np.uint8)).save(large)
    arguments = ["predict", str(talkative), *map(str, [*images, large]), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--score-threshold", "0.3"]) == 0
    file = tmp_path / "out" / "results.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    results = json.loads(file.read_text())
    assert {row["image_id"] for row in results} == {0, 1, 2}
    for number, path in enumerate([*images, large]):
        with Image.open(path) as stored, Image.open(tmp_path / "out" / f"{path.stem}.png") as drawn:
            width, height = stored.size
            assert drawn.mode == "RGB"
            assert drawn.size == stored.size
        rows = [row for row in results if row["image_id"] == number]
        assert rows
        for row in rows:
            assert row["file_name"] == str(path)
            assert row["category_id"] in (1, 2, 3, 4)
            assert 0.3 <= row["score"] <= 1
            assert row["segmentation"]["size"] == [height, width]
            assert mask_utils.decode(row["segmentation"]).shape == (height, width)
            x, y, w, h = row["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= width + 0.02
            assert y + h <= height + 0.02


def test_prediction_of_nothing_still_draws_the_image(run, shapes, tmp_path):
    image = sorted((shapes / "val").iterdir())[0]
    out = tmp_path / "out"
    assert (
        main(["predict", str(run / "last.pt"), str(image), "--output", str(out), "--score-threshold", "1"])
        == 0
    )
    assert json.loads((out / "results.json").read_text()) == []
    assert (out / f"{image.stem}.png").is_file()


def test_a_picture_without_detections_is_the_image():
    image = torch.rand(3, 20, 30)
    detections = {
        "boxes": torch.tensor([[2.0, 2, 12, 12]]),
        "labels": torch.tensor([0]),
        "scores": torch.tensor([0.4]),
        "masks": torch.ones(1, 1, 20, 30),
    }
    assert torch.equal(draw_detections(image, detections, ["a"], 0.5), (image * 255).to(torch.uint8))
    drawn = draw_detections(image, detections, ["a"], 0.4)
    assert (drawn != (image * 255).to(torch.uint8)).any(0).float().mean() > 0.9


def test_a_contact_sheet_holds_every_picture():
    pictures = [torch.full((3, 5 + i, 8), 10 * i, dtype=torch.uint8) for i in range(5)]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape == (3, 3 * (9 + 4) + 4, 2 * (8 + 4) + 4)
    for i, picture in enumerate(pictures):
        assert (sheet[0] == 10 * i).sum() == picture[0].numel()


# What can go wrong.


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("boxteacher:")]
    assert len(lines) == 1
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    if code == 2:
        assert error.splitlines() == lines
    return lines[0]


def annotation(content: dict[str, Any]) -> dict[str, Any]:
    return content["annotations"][2]


def drop_annotations(content: dict[str, Any]) -> None:
    content["annotations"] = []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_annotations, ["train.json", "box"]),
        (lambda c: annotation(c).update(category_id=99), ["train.json", "99", "annotations[2]"]),
        (lambda c: annotation(c).update(image_id=99), ["train.json", "99", "annotations[2]"]),
        (lambda c: annotation(c).update(bbox=[1, 2, 3]), ["train.json", "[1, 2, 3]"]),
        (lambda c: annotation(c).update(bbox=[1, 2, math.nan, 3]), ["train.json", "nan"]),
        (lambda c: c["images"][1].update(file_name="gone.png"), ["gone.png"]),
        (lambda c: c["images"][1].update(width=9), [".png", "9"]),
        (lambda c: c.pop("categories"), ["train.json", "categories"]),
    ],
)
def test_a_broken_annotation_file_is_named_in_one_line(shapes, tmp_path, capsys, change, named):
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
def test_a_setting_that_names_nothing_is_named(shapes, tmp_path, capsys, option, value):
    message = error_of(train_arguments(shapes, tmp_path / "run", option, value), capsys)
    assert value in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--steps", "0"), ("--batch-size", "-1"), ("--workers", "-1"), ("--image-size", "x")],
)
def test_numbers_out_of_range_are_refused_by_the_parser(shapes, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        main(train_arguments(shapes, tmp_path / "run", option, value))
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def broken_checkpoints(run: Path, folder: Path) -> dict[str, Path]:
    content = torch.load(run / "last.pt", weights_only=True)
    names = ("empty", "truncated", "picture", "foreign", "other", "nothing", "half", "info")
    paths = {name: folder / f"{name}.pt" for name in names}
    paths["empty"].write_bytes(b"")
    paths["truncated"].write_bytes((run / "last.pt").read_bytes()[:-5000])
    paths["picture"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300))
    torch.save({"conv1.weight": torch.zeros(3)}, paths["foreign"])
    torch.save([1, 2, 3], paths["other"])
    weights = dict(list(content["weights"].items())[:10])
    torch.save({**content, "weights": weights}, paths["half"])
    torch.save({**content, "info": {"model": "condinst"}}, paths["info"])
    return paths


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "picture", "foreign", "other", "nothing", "half", "info"]
)
def test_a_broken_checkpoint_is_named_in_one_line(run, shapes, tmp_path, capsys, kind):
    path = broken_checkpoints(run, tmp_path)[kind]
    assert str(path) in error_of(["evaluate", str(path), "--data", str(shapes), "--workers", "0"], capsys)
    assert not (tmp_path / "metrics.json").exists()


def test_an_evaluation_on_foreign_categories_is_refused(run, shapes, tmp_path, capsys):
    def renumber(content: dict[str, Any]) -> None:
        for record in content["categories"]:
            record["id"] += 10
        for record in content["annotations"]:
            record["category_id"] += 10

    data = edited(shapes, tmp_path / "foreign", "val", renumber)
    arguments = ["evaluate", str(run / "last.pt"), "--data", str(data), "--workers", "0"]
    assert "category_id" in error_of(arguments, capsys)


def test_prediction_of_broken_or_twin_images_writes_nothing(run, shapes, tmp_path, capsys):
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
        assert named in error_of(arguments, capsys)
        assert not out.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    shapes, tmp_path, capsys, monkeypatch
):
    forward = BoxTeacher.forward

    def poisoned(self: BoxTeacher, *args: Any) -> Any:
        losses = forward(self, *args)
        if self.training and self.optimizer_steps == 2:
            losses["loss_pixel"] = losses["loss_pixel"] * math.nan
        return losses

    monkeypatch.setattr(BoxTeacher, "forward", poisoned)
    message = error_of(train_arguments(shapes, tmp_path / "run"), capsys, code=3)
    assert "loss_pixel" in message
    assert "nan" in message
    assert "step 3" in message
    assert message.count(".png") == 2
    segmenter, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(p).all() for p in segmenter.parameters())
    assert len(log_of(tmp_path / "run")) == 2


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(shapes, tmp_path, capsys, monkeypatch):
    forward = BoxTeacher.forward

    def poisoned(self: BoxTeacher, *args: Any) -> Any:
        losses = forward(self, *args)
        if self.training and self.optimizer_steps == 2:
            scale = next(p for p in self.student.parameters() if p.requires_grad).sum()
            losses["loss_pixel"] = losses["loss_pixel"] + (scale * 0).sqrt()  # finite, its gradient is not
        return losses

    monkeypatch.setattr(BoxTeacher, "forward", poisoned)
    message = error_of(train_arguments(shapes, tmp_path / "run"), capsys, code=3)
    assert "gradient_norm" in message
    segmenter, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(p).all() for p in segmenter.parameters())


def test_a_picture_that_breaks_during_training_is_named_by_the_worker(shapes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    content = json.loads((data / "annotations" / "train.json").read_text())
    for record in content["images"]:  # the end that the quick check looks for is there, the middle is not
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


def test_settings_json_holds_what_was_resolved(run):
    settings = json.loads((run / "settings.json").read_text())
    for name in ("warmup_steps", "pseudo_warmup_steps", "momentum", "device", "torch", "torchvision"):
        assert settings[name] not in (None, "auto")


def test_a_broken_mask_stops_an_evaluation_before_it_begins(run, shapes, tmp_path, capsys):
    def break_mask(content: dict[str, Any]) -> None:
        annotation(content)["segmentation"] = [[1, 2, 3, 4]]

    data = edited(shapes, tmp_path / "data", "val", break_mask)
    assert "segmentation" in error_of(["evaluate", str(run / "last.pt"), "--data", str(data)], capsys)


def test_a_run_that_diverges_by_itself_stops(shapes, tmp_path, capsys):
    arguments = train_arguments(shapes, tmp_path / "run", "--lr", "1e30", "--steps", "8")
    message = error_of(arguments, capsys, code=3)
    assert "loss_" in message or "gradient_norm" in message
    path = tmp_path / "run" / "last.pt"
    if path.exists():
        segmenter, _ = load_checkpoint(path)
        assert all(torch.isfinite(p).all() for p in segmenter.parameters())


# Small parts.


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("first"))

    def crash(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, crash)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=name) as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    images, targets = to_device(
        [torch.zeros(3, 4, 4)], [{"boxes": torch.zeros(1, 4), "image_id": 5}], torch.device("meta")
    )
    assert images[0].device.type == targets[0]["boxes"].device.type == "meta"
    assert targets[0]["image_id"] == 5


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
