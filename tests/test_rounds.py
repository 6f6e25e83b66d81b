"""Training in rounds: pseudo masks of all training images, predicted now and then and kept in between."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from boxteacher import PseudoMasks
from boxteacher.cli import main
from boxteacher.data import InstanceDataset, read_split
from boxteacher.data.masks import decode_masks, encode_binary_masks
from boxteacher.engine.pseudo_masks import load_predicted_masks, predict_pseudo_masks, with_pseudo_masks
from boxteacher.engine.rounds import filled_share, round_starts
from boxteacher.engine.settings import TrainSettings
from boxteacher.grid import MaskGrid
from boxteacher.targets import box_masks
from tests.benchmarks.rounds import compare
from tests.data_support import Folder, filled_mask
from tests.engine_support import log_of, train_arguments


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def filled_boxes(images: list[Tensor], targets: list[dict[str, Tensor]], grid: MaskGrid) -> PseudoMasks:
    """A source whose masks are the boxes, with confidence 0.75, or 0 for boxes at the right border."""
    boxes = targets[0]["boxes"]
    rows, columns = (torch.arange(size) for size in grid.shape)
    beyond = boxes[:, 2:] - 0.5  # the last pixel
    masks = box_masks(torch.cat([boxes[:, :2].ceil(), beyond], 1), rows, columns)
    confidence = torch.where(boxes[:, 2] > images[0].shape[-1] - 1, 0.0, 0.75)
    return PseudoMasks(masks, confidence)


def predicted(folder: Folder, image_size: int = 40, **options: object):
    index = folder.index(**options)
    masks = predict_pseudo_masks(
        filled_boxes, index, image_size=image_size, shortest_side=None, device="cpu", workers=0
    )
    return index, masks


def test_masks_are_kept_at_the_size_of_the_stored_image(folder):
    _index, found = predicted(folder)
    assert found.confidence.tolist() == [0.75, 0.75, 0.0]
    assert found.masks[2] is None
    masks = decode_masks([mask for mask in found.masks if mask is not None], 24, 40)
    assert masks.sum((1, 2)).tolist() == [60, 72]  # 10 × 6 and 8 × 9 pixels
    assert masks[0, 2:8, 4:14].all()


def test_masks_are_cut_to_their_boxes(folder):
    def everywhere(images: list[Tensor], targets: list[dict[str, Tensor]], grid: MaskGrid) -> PseudoMasks:
        count = len(targets[0]["boxes"])
        return PseudoMasks(torch.ones(count, *grid.shape), torch.full((count,), 0.5))

    masks = predict_pseudo_masks(
        everywhere, folder.index(), image_size=20, shortest_side=None, device="cpu", workers=0
    ).masks
    mask = decode_masks(masks[:1], 24, 40)[0]
    assert not mask[:, :4].any()
    assert not mask[9:].any()
    assert mask[2:8, 4:14].all()


def test_a_box_that_resizing_left_empty_has_no_mask_and_the_others_keep_theirs(folder):
    x = float(np.nextafter(np.float32(20), np.float32(30)))
    folder.content["annotations"][1]["bbox"] = [20, 5, x - 20, 9]
    _, found = predicted(folder, image_size=13)
    assert found.masks[0] is not None
    assert found.confidence[0] == 0.75


def test_a_round_leaves_the_random_numbers_of_training_alone(folder):
    before = torch.get_rng_state()
    predicted(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_crowds_have_no_pseudo_mask(folder):
    folder.content["annotations"][0]["iscrowd"] = 1
    _, found = predicted(folder)
    assert found.masks[0] is None
    assert found.confidence[0] == 0
    assert found.masks[1] is not None


def test_the_data_set_serves_pseudo_masks_with_their_confidence(folder):
    index, found = predicted(folder)
    _, target = InstanceDataset(with_pseudo_masks(index, found))[0]
    assert target["mask_confidence"].tolist() == [0.75, 0.75, 0.0]
    assert target["has_mask"].tolist() == [True, True, False]
    assert target["masks"].sum((1, 2)).tolist() == [60, 72, 0]


def test_annotated_masks_stay(folder):
    del folder.content["annotations"][0]["segmentation"]
    index, found = predicted(folder, read_masks=True, masks_optional=True)
    both = with_pseudo_masks(index, found)
    assert both.mask_confidence.tolist() == [0.75, 1.0, 1.0]
    assert both.masks[1:] == index.masks[1:]
    assert both.masks[0] == found.masks[0]


def test_the_file_holds_every_mask(folder, tmp_path):
    _, found = predicted(folder)
    found.save(tmp_path / "pseudo_masks.npz", step=7)
    stored, step = load_predicted_masks(tmp_path / "pseudo_masks.npz")
    assert step == 7
    assert stored.confidence.tolist() == found.confidence.tolist()
    assert stored.masks == found.masks


@pytest.mark.parametrize(
    ("steps", "rounds", "expected"),
    [(900, 2, [300, 600]), (10, 0, []), (7, 3, [1, 3, 5]), (2, 5, [1])],
)
def test_rounds_are_spread_evenly_over_the_run(steps, rounds, expected, tmp_path):
    settings = TrainSettings(
        model="condinst", data=tmp_path, output=tmp_path, steps=steps, rounds=rounds, device="cpu"
    )
    assert round_starts(settings) == expected
    assert round_starts(replace(settings, supervision="box")) == []


def test_a_teacher_that_does_not_learn_predicts_once_before_the_first_step(tmp_path):
    settings = TrainSettings(model="condinst", data=tmp_path, output=tmp_path, teacher="sam", device="cpu")
    assert round_starts(settings) == [0]


def test_a_run_in_rounds_learns_from_pseudo_masks_after_the_first(shapes, tmp_path):
    output = tmp_path / "run"
    assert main(train_arguments(shapes, output)) == 0
    log = log_of(output)
    assert log[0]["loss_pixel"] == 0
    assert log[-1]["loss_pixel"] > 0
    assert sorted(path.name for path in output.glob("*.npz")) == [
        "pseudo_masks_000001.npz",
        "pseudo_masks_000002.npz",
    ]
    content = json.loads((output / "settings.json").read_text())
    assert (content["rounds"], content["augmentation"], content["pseudo_warmup_steps"]) == (2, "none", 0)
    index = read_split(shapes, "train")
    stored, step = load_predicted_masks(output / "pseudo_masks_000002.npz")
    assert len(stored.confidence) == len(index.labels)
    assert step == 2


def test_without_rounds_the_teacher_speaks_in_every_step(shapes, tmp_path):
    output = tmp_path / "run"
    assert main(train_arguments(shapes, output, "--rounds", "0")) == 0
    assert not list(output.glob("*.npz"))
    settings = json.loads((output / "settings.json").read_text())
    assert settings["augmentation"] == "color+blur"
    assert "pseudo_masks" in log_of(output)[0]


def test_masks_that_fill_little_of_their_boxes_are_noticed(folder):
    index, found = predicted(folder)
    assert filled_share(found, index) == pytest.approx(1, abs=0.01)
    outline = torch.zeros(1, 24, 40)
    outline[0, 2:8, 4] = 1  # a sixtieth of the image, a tenth of the box
    counts = encode_binary_masks(outline, 24, 40)[0]
    assert filled_share(replace(found, masks=[counts, None, None]), index) == pytest.approx(0.1)


def test_the_instrument_compares_pseudo_masks_with_annotated_ones(folder):
    """Two pseudo masks: the first is right, the second twice as large as the annotated one."""
    index, found = predicted(folder, read_masks=True)
    half = filled_mask(20, 5, 24, 14)
    counts = encode_binary_masks(torch.from_numpy(half)[None], 24, 40)[0]
    both = compare(found, replace(index, masks=[index.masks[0], counts, index.masks[2]]))
    assert both.overlap.tolist() == [1, 0.5]
    assert both.area.tolist() == [1, 2]
    assert both.precision().tolist() == pytest.approx([1, 0.5])
    assert both.recall().tolist() == pytest.approx([1, 1])
    assert both.calibration_error() == pytest.approx(0.25)
