"""Prediction: images with masks drawn on them, and COCO results."""

import contextlib
import io
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from pycocotools import mask as mask_utils

from boxteacher.cli import main
from boxteacher.engine import fonts
from boxteacher.engine.drawing import draw_detections, picture_grid
from boxteacher.engine.predict import predict
from tests.engine_support import error_of


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


def save_noise(path: Path, **options: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def test_a_folder_stands_for_the_images_in_it(run, tmp_path):
    folder, alone = tmp_path / "photographs", tmp_path / "0.png"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "b.JPG", folder / "a.png", folder / "below" / "d.png", alone):
        save_noise(path)
    for name in ("notes.txt", "a.json", "._b.jpg"):
        (folder / name).write_text("not an image")
    arguments = ["predict", str(run / "last.pt"), str(alone), str(folder), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--score-threshold", "0"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {0: alone, 1: folder / "a.png", 2: folder / "b.JPG"}
    assert {row["image_id"]: row["file_name"] for row in results} == {i: str(p) for i, p in expected.items()}
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"0.png", "a.png", "b.png", "results.json"}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", ["photographs", "photographs/b.png"])
def test_one_path_is_enough(run, tmp_path, kind, name):
    (tmp_path / "photographs").mkdir()
    save_noise(tmp_path / "photographs" / "b.png")
    file = predict(run / "last.pt", kind(tmp_path / name), tmp_path / "out", device="cpu")
    assert {each.name for each in file.parent.iterdir()} == {"b.png", "results.json"}


def test_the_white_that_a_deep_image_leaves_open_is_said(run, tmp_path, caplog):
    ramp = np.tile(np.linspace(0, 1, 40), (24, 1))
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, white in (("a.png", 4095), ("b.png", 4000), ("c.png", 255), ("d.png", 65535)):
        Image.fromarray(np.uint16(ramp * white)).save(folder / name)
    save_noise(folder / "e.png")
    predict(run / "last.pt", folder, tmp_path / "out", device="cpu")
    of_4095, of_255 = (each for each in caplog.messages if "taken as white" in each)
    assert of_4095.startswith(f"{folder / 'a.png'}: no value in this file of 16 bits per sample exceeds 4095")
    assert of_4095.endswith("(1 more like this)")
    assert of_255.startswith(f"{folder / 'c.png'}: no value in this file of 16 bits per sample exceeds 255")
    assert not of_255.endswith("like this)")


def test_a_folder_without_images_is_an_error(run, tmp_path, capsys):
    (tmp_path / "photographs" / "below").mkdir(parents=True)
    save_noise(tmp_path / "photographs" / "below" / "a.png")
    arguments = ["predict", str(run / "last.pt"), "--output", str(tmp_path / "out")]
    error = error_of([*arguments, str(tmp_path / "photographs")], capsys)
    assert f"{tmp_path / 'photographs'}: no image directly in this folder" in error
    assert not (tmp_path / "out").exists()


def test_pictures_of_images_that_differ_in_the_suffix_alone_have_it_in_their_names(run, tmp_path):
    names = ["a.jpg", "a.jpg.png", "a.png", "b.png"]
    (tmp_path / "photographs").mkdir()
    for name in names:
        save_noise(tmp_path / "photographs" / name)
    arguments = ["predict", str(run / "last.pt"), str(tmp_path / "photographs")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    expected = {f"{name}.png" for name in names} | {"results.json"}
    assert {each.name for each in (tmp_path / "out").iterdir()} == expected


def test_prediction_turns_images_upright(checkpoint_with_detections, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_noise(tmp_path / "photograph.jpg", exif=exif)  # 40 x 24 as stored
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint_with_detections), str(tmp_path), "--output", str(out)]) == 0
    with Image.open(out / "photograph.png") as drawn:
        assert drawn.size == (24, 40)
        assert drawn.getexif().get(0x0112, 1) == 1
    results = json.loads((out / "results.json").read_text())
    assert results
    assert all(row["segmentation"]["size"] == [40, 24] for row in results)


def printed_in_western_europe(*arguments: str) -> str:
    """What a command prints to a terminal that can show cp1252's letters alone."""
    printed = io.BytesIO()
    terminal = io.TextIOWrapper(printed, encoding="cp1252", newline="\n", write_through=True)
    with contextlib.redirect_stdout(terminal):
        assert main(arguments) == 0
    return printed.getvalue().decode("cp1252")


def test_a_path_that_the_terminal_cannot_show_ends_no_command(run, shapes, tmp_path):
    image = tmp_path / "照片.png"
    shutil.copy(sorted((shapes / "val").iterdir())[0], image)
    out = tmp_path / "输出"
    printed = printed_in_western_europe("predict", str(run / "last.pt"), str(image), "--output", str(out))
    assert (out / "照片.png").is_file()
    assert printed.endswith(f"\\u8f93\\u51fa{os.sep}results.json\n")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "convert", "export", "demo", "recipes"])
def test_help_can_be_printed_to_any_terminal(command):
    with contextlib.suppress(SystemExit):
        pytest.fail(printed_in_western_europe(command, "--help"))


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


def drawn_names(*class_names: str) -> torch.Tensor:
    """A picture of an object of each class."""
    count = len(class_names)
    corners = torch.tensor([[4.0, 24 * i + 2, 110, 24 * i + 22] for i in range(count)])
    detections = {
        "boxes": corners,
        "labels": torch.arange(count),
        "scores": torch.full((count,), 0.9),
        "masks": torch.zeros(count, 1, 24 * count, 120),
    }
    return draw_detections(torch.zeros(3, 24 * count, 120), detections, class_names, 0.5)


@pytest.fixture
def no_system_fonts(monkeypatch):
    fonts.font_and_names.cache_clear()
    monkeypatch.setattr(fonts, "_SYSTEM_FONTS", ("no such font.ttf",))
    yield
    fonts.font_and_names.cache_clear()


@pytest.mark.usefixtures("no_system_fonts")
def test_a_name_that_no_font_can_show_is_drawn_as_its_label(caplog):
    with caplog.at_level(logging.WARNING):
        picture = drawn_names("cat", "猫")
        assert torch.equal(drawn_names("cat", "猫"), picture)
    assert torch.equal(picture, drawn_names("cat", "class 1"))
    assert not torch.equal(picture, drawn_names("cat", "class 2"))
    (message,) = caplog.messages
    assert "class 1 for '猫'" in message
    assert "cat" not in message


def test_names_in_other_scripts_are_drawn_with_a_font_that_has_them(caplog):
    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("this system lacks DejaVu")
    names = ["кот", "Füchse", "γάτα"]
    assert fonts.font_and_names(tuple(names)) == ("DejaVuSans.ttf", names)
    placeholders = drawn_names("\uffff" * 3, "F\uffffchse", "\uffff" * 4)
    for i, label in enumerate(names):
        rows = slice(24 * i, 24 * i + 24)
        assert not torch.equal(drawn_names(*names)[:, rows], placeholders[:, rows]), label
    assert not [each for each in caplog.messages if "кот" in each]


def test_names_in_ascii_need_no_font_of_the_system():
    assert fonts.font_and_names(("traffic light", "dog")) == (None, ["traffic light", "dog"])


def test_a_picture_grid_holds_every_picture():
    pictures = [torch.full((3, 5 + i, 8), 10 * i, dtype=torch.uint8) for i in range(5)]
    grid = picture_grid(pictures, columns=2)
    assert grid.shape == (3, 3 * (9 + 4) + 4, 2 * (8 + 4) + 4)
    for i, picture in enumerate(pictures):
        assert (grid[0] == 10 * i).sum() == picture[0].numel()
