"""Masks of known boxes, which every adapter decodes from where the network would predict them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from boxteacher import MultiViewTeacher
from boxteacher.adapter import MaskGrid, Segmenter
from boxteacher_adapters.condinst import build_condinst
from boxteacher_adapters.fcos import DensePredictions, best_locations, pyramid_locations
from boxteacher_adapters.mask_rcnn import OUTSIDE, build_mask_rcnn
from boxteacher_adapters.solov2 import build_solov2
from boxteacher_adapters.solov2_targets import best_cells, grid_cells
from tests.support import seeded_images

Build = Callable[..., Segmenter]
IMAGES = seeded_images((96, 128), (64, 80))
BOXES = torch.tensor([[10.0, 12, 90, 80], [60, 4, 124, 60], [2, 3, 40, 60]])
LABELS = torch.tensor([0, 2, 1])
IMAGE = torch.tensor([0, 0, 1])


@pytest.mark.parametrize("build", [build_condinst, build_solov2, build_mask_rcnn])
def test_a_box_has_the_same_mask_alone_and_among_others(build: Build) -> None:
    torch.manual_seed(0)
    segmenter = build(3, backbone="resnet18", weights="none", image_size=128).eval()
    with torch.no_grad():
        decode: Any = segmenter.forward_teacher(IMAGES).decode_boxes
        logits = decode(BOXES, LABELS, IMAGE)
        order = torch.tensor([2, 0, 1])
        permuted = decode(BOXES[order], LABELS[order], IMAGE[order])
        alone = segmenter.forward_teacher(IMAGES[:1]).decode_boxes(BOXES[:1], LABELS[:1], IMAGE[:1])  # type: ignore[misc]
    assert logits.shape == (3, 24, 32)
    largest = float(logits.abs().max())
    assert_close(permuted, logits[order], rtol=0, atol=1e-5 * largest)
    assert_close(alone[0], logits[0], rtol=0, atol=1e-4 * largest)


def test_mask_rcnn_decodes_a_known_box_as_one_that_a_candidate_is_assigned_to() -> None:
    """Inside the box; beyond it the mask goes on for a cell, so that resampling loses none of it."""
    torch.manual_seed(0)
    segmenter = build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=128).eval()
    segmenter.model.roi_heads.score_thresh = 0.0  # type: ignore[attr-defined]
    with torch.no_grad():
        candidates = segmenter.forward_teacher(IMAGES[:1])
        assigned = candidates.decode_masks(torch.zeros(2, dtype=torch.int64), BOXES[:2], LABELS[:2])
        decode: Any = candidates.decode_boxes
        known = decode(BOXES[:2], LABELS[:2], IMAGE[:2])
    inside = assigned > OUTSIDE
    assert_close(known[inside], assigned[inside])
    assert inside.sum() < (known > OUTSIDE).sum()


def test_a_filled_mask_of_mask_rcnn_fills_its_box_in_a_round() -> None:
    segmenter = build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=128).eval()
    predictor: Any = segmenter.model.roi_heads.mask_predictor  # type: ignore[attr-defined]
    torch.nn.init.zeros_(predictor.mask_fcn_logits.weight)
    torch.nn.init.constant_(predictor.mask_fcn_logits.bias, 4.0)
    targets: Any = [{"boxes": torch.tensor([[10.0, 12, 18, 20], [40, 30, 64, 54]]), "labels": LABELS[:2]}]
    pseudo = MultiViewTeacher(segmenter, scales=(1.0,), refine=False)(
        IMAGES[:1], targets, MaskGrid(1, 96, 128)
    )
    assert pseudo.masks.sum((1, 2)).tolist() == [64, 576]


def test_a_box_without_positive_cell_is_predicted_by_the_nearest() -> None:
    cells = grid_cells([4], [(1, 1000)], torch.device("cpu"))
    logits = torch.zeros(1, 16, 1)
    logits[0, 15] = 9.0
    box = torch.tensor([[-3.0, 20, 0.5, 30]])  # its center lies left of the image
    zero = torch.zeros(1, dtype=torch.int64)
    assert best_cells(cells, logits, box, zero, zero, (64, 64)).tolist() == [4]


def best_location(distances: torch.Tensor, probability: torch.Tensor) -> int:
    """`best_locations` of one level of stride 8 and 4 × 4 locations, for a box of 16 pixels in its middle."""
    locations = pyramid_locations([torch.zeros(1, 1, 4, 4)], [8])
    predictions = DensePredictions(
        class_logits=probability.logit()[None, :, None],
        distances=distances[None],
        centerness=torch.full((1, 16), 20.0),
        controllers=torch.zeros(1, 16, 1),
    )
    box = torch.tensor([[8.0, 8, 24, 24]])
    zero = torch.zeros(1, dtype=torch.int64)
    return int(best_locations(predictions, locations, box, zero, zero, []))


def test_the_location_whose_box_and_class_fit_best_predicts_a_known_box() -> None:
    """The four inner locations are positive; location 6, at (20, 12), predicts the box exactly."""
    distances = torch.ones(16, 4) * 0.2
    distances[6] = torch.tensor([12.0, 4, 4, 12]) / 8
    assert best_location(distances, torch.full((16,), 0.64)) == 6


def test_a_location_that_is_not_positive_predicts_no_known_box_of_which_another_is() -> None:
    probability = torch.full((16,), 0.01)
    probability[0] = 0.99  # at the corner, outside the box
    assert best_location(torch.ones(16, 4), probability) in (5, 6, 9, 10)


def test_the_cell_at_the_center_with_the_most_probable_class_predicts_a_known_box() -> None:
    cells = grid_cells([4], [(1, 1000)], torch.device("cpu"))
    logits = torch.zeros(1, 16, 2)
    logits[0, 0, 1] = 9.0  # far from the box
    logits[0, 10, 1] = 2.0
    box = torch.tensor([[8.0, 8, 60, 60]])  # its center region reaches into cells 5, 6, 9 and 10
    one = torch.ones(1, dtype=torch.int64)
    assert best_cells(cells, logits, box, one, one * 0, (64, 64)).tolist() == [10]
