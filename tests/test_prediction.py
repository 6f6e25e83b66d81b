"""Prediction: images with masks drawn on them, and COCO results."""

import json
import shutil

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from boxteacher.cli import main
from boxteacher.engine.drawing import draw_detections, picture_grid
from tests.engine_support import (
    error_of,
)


def test_prediction_never_overwrites_its_input(checkpoint_with_detections, shapes, tmp_path, capsys):
    image = tmp_path / "photograph.png"
    shutil.copy(sorted((shapes / "val").iterdir())[0], image)
    before = image.read_bytes()
    error_of(["predict", str(checkpoint_with_detections), str(image), "--output", str(tmp_path)], capsys)
    assert image.read_bytes() == before


def test_prediction_draws_masks_on_each_image_and_writes_coco_results(
    checkpoint_with_detections, shapes, tmp_path, capsys
):
    images = sorted((shapes / "val").iterdir())[:2]
    large = tmp_path / "large.jpg"
    Image.fromarray((np.random.default_rng(0).random((90, 150, 3)) * 255).astype(np.uint8)).save(large)
    arguments = [str(checkpoint_with_detections), *map(str, [*images, large])]
    output = ["--output", str(tmp_path / "out")]
    assert main(["predict", *arguments, *output, "--score-threshold", "0.3"]) == 0
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


def test_prediction_without_detections_writes_the_image(run, shapes, tmp_path):
    image = sorted((shapes / "val").iterdir())[0]
    out = tmp_path / "out"
    assert (
        main(["predict", str(run / "last.pt"), str(image), "--output", str(out), "--score-threshold", "1"])
        == 0
    )
    assert json.loads((out / "results.json").read_text()) == []
    assert (out / f"{image.stem}.png").is_file()


def test_detections_below_the_threshold_are_not_drawn():
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


def test_a_picture_grid_holds_every_picture():
    pictures = [torch.full((3, 5 + i, 8), 10 * i, dtype=torch.uint8) for i in range(5)]
    grid = picture_grid(pictures, columns=2)
    assert grid.shape == (3, 3 * (9 + 4) + 4, 2 * (8 + 4) + 4)
    for i, picture in enumerate(pictures):
        assert (grid[0] == 10 * i).sum() == picture[0].numel()
