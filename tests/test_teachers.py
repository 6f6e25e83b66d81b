"""Teachers by name: weights from a folder, training with them, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher.cli import main
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.teachers import build_source
from boxteacher.engine.train import supervise
from boxteacher.grid import mask_grid
from boxteacher_adapters.sam import SamTeacher
from tests.engine_support import error_of, log_of, train_arguments
from tests.support import ScriptedSegmenter
from tests.teaching_support import IMAGES, TARGETS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of weights that `transformers` wrote, by name of the teacher."""
    pytest.importorskip(
        "transformers",
        minversion="4.56",
        reason="transformers 4.56 or newer (boxteacher[sam]) is not installed",
    )
    from tests.sam_support import KINDS, tiny_network

    root = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        tiny_network(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def edited_config(folder: Path, copy: Path, **changes: Any) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam-hq"])
def test_a_teacher_from_a_folder_gives_the_masks_of_the_saved_network(folders, kind):
    from tests.sam_support import tiny_network

    grid = mask_grid(IMAGES, 4, 16)
    found = build_source(kind, str(folders[kind]))(IMAGES, TARGETS, grid)
    expected = SamTeacher(tiny_network(kind))(IMAGES, TARGETS, grid)
    assert_close(found.masks, expected.masks)
    assert_close(found.confidence, expected.confidence)
    assert found.masks.std() > 0.1
    assert (found.confidence > 0).any()


def test_sam_2_is_also_taken_from_weights_of_its_video_model(folders, tmp_path):
    """As the released weights of SAM 2 describe themselves."""
    video = edited_config(folders["sam2"], tmp_path / "video", model_type="sam2_video")
    grid = mask_grid(IMAGES, 4, 16)
    found = build_source("sam2", str(video))(IMAGES, TARGETS, grid)
    expected = build_source("sam2", str(folders["sam2"]))(IMAGES, TARGETS, grid)
    assert_close(found.masks, expected.masks)


def test_a_run_with_a_teacher_s_weights_saves_the_student_alone(shapes, folders, tmp_path):
    more = ["--teacher", "sam2", "--teacher-weights", str(folders["sam2"]), "--teacher-dtype", "bfloat16"]
    assert main(train_arguments(shapes, tmp_path / "run", *more)) == 0
    lines = log_of(tmp_path / "run")
    assert len(lines) == 3
    assert any(line["pseudo_masks"] > 0 and line["loss_pixel"] > 0 for line in lines)
    student = build_segmenter("condinst", 4, backbone="resnet18", weights="none", image_size=64)
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["weights"]
    assert weights.keys() == student.state_dict().keys()
    load_checkpoint(tmp_path / "run" / "last.pt")
    written = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (written["teacher"], written["teacher_weights"]) == ("sam2", str(folders["sam2"]))


def test_without_transformers_the_command_to_install_it_is_named_and_no_folder_is_made(
    shapes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    more = ["--teacher", "sam2", "--teacher-weights", str(tmp_path)]
    message = error_of(train_arguments(shapes, tmp_path / "run", *more), capsys)
    assert "the teacher sam2 needs transformers" in message
    assert "pip install 'boxteacher[sam]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("sam", "sam2", r"weights .*sam2 are those of a sam2, not of sam: give --teacher sam2"),
        ("sam2", "sam-hq", r"those of a sam_hq, not of sam2: give --teacher sam-hq"),
        ("sam", "none", r"weights .*none of the teacher sam cannot be had \(.*give a folder"),
        ("sam", "other", r"those of a resnet, not of sam: give those of sam, sam2, sam-hq"),
        ("sam", "broken", r"broken of the teacher sam cannot be had \(.*give a folder"),
        ("sam", "incomplete", r"incomplete lack 1 entries of sam, such as mask_decoder\.iou_token\.weight"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_in_one_line(folders, tmp_path, kind, weights, message):
    from safetensors.torch import load_file, save_file

    folder = folders.get(weights, tmp_path / weights)
    if weights == "other":
        edited_config(folders["sam"], folder, model_type="resnet")
    if weights in ("broken", "incomplete"):
        edited_config(folders["sam"], folder)
        file = folder / "model.safetensors"
        entries = load_file(file)
        del entries["mask_decoder.iou_token.weight"]
        save_file(entries, file, metadata={"format": "pt"})
        if weights == "broken":
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=message) as caught:
        build_source(kind, str(folder))
    assert "\n" not in str(caught.value)


def test_a_teacher_without_weights_is_refused(folders):
    with pytest.raises(InputError, match=r"the teacher sam needs weights: give .* with --teacher-weights"):
        build_source("sam", "")


def test_an_unknown_teacher_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="no teacher 'sam3': take one of ema, sam, sam-hq, sam2"):
        build_source("sam3", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "sam2", "supervision": "box"}, "teacher is 'sam2', but supervision is 'box'"),
        ({"teacher_weights": "folder"}, "teacher_weights is 'folder', but .* moving average: give --teacher"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        supervise(ScriptedSegmenter(), TrainSettings("condinst", Path(), Path(), **given))
