"""FCOS: matching, losses and detections against loops and closed forms."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_iou, generalized_box_iou_loss

from boxteacher_adapters.fcos import (
    DensePredictions,
    DenseTargets,
    Locations,
    centerness_of,
    fcos_losses,
    giou_loss,
    match_locations,
    pyramid_locations,
    sample_positives,
    select_detections,
)
from tests.support import target

TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]
corner = st.tuples(st.integers(0, 80), st.integers(0, 50), st.integers(1, 60), st.integers(1, 60))


def test_locations_are_the_middles_of_the_cells():
    pyramid = [torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 2)]
    locations = pyramid_locations(pyramid, (8, 16))
    fine = [[8 * j + 4, 8 * i + 4] for i in range(3) for j in range(4)]
    coarse = [[8, 8], [24, 8], [8, 24], [24, 24]]
    assert locations.centers.tolist() == fine + coarse
    assert locations.level.tolist() == [0] * 12 + [1] * 4
    assert locations.stride.tolist() == [8] * 12 + [16] * 4
    assert locations.counts == (12, 4)


def small_pyramid() -> Locations:
    return pyramid_locations([torch.zeros(1, 1, 64 // s, 96 // s) for s in (8, 16, 32)], (8, 16, 32))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(corner, max_size=4), min_size=1, max_size=3), st.sampled_from([(16, 32), (32, 64)]))
@example([[(0, 0, 32, 32)]], (32, 64))  # locations exactly at the radius
def test_locations_are_matched_as_by_a_loop(rows, sizes):
    boxes = [[(x, y, min(x + w, 96), min(y + h, 64)) for x, y, w, h in image] for image in rows]
    locations = small_pyramid()
    targets = [target(*image) for image in boxes]
    for t in targets:
        t["labels"] = torch.arange(len(t["boxes"])) % 3
    matched = match_locations(locations, targets, sizes, 3)
    first = 0
    for b, image in enumerate(boxes):
        for i, (x, y) in enumerate(locations.centers.tolist()):
            level, stride = int(locations.level[i]), float(locations.stride[i])
            lower, upper = [-1, *sizes][level], [*sizes, math.inf][level]
            fitting = []
            for n, (x0, y0, x1, y1) in enumerate(image):
                sides = (x - x0, y - y0, x1 - x, y1 - y)
                near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
                if min(sides) > 0 and near and lower <= max(sides) <= upper:
                    fitting.append(((x1 - x0) * (y1 - y0), n, sides))
            if not fitting:
                assert matched.target_index[b, i] == -1
                assert matched.labels[b, i] == 3
                continue
            _, n, sides = min(fitting)
            assert matched.target_index[b, i] == first + n
            assert matched.labels[b, i] == n % 3
            assert matched.distances[b, i].tolist() == pytest.approx([side / stride for side in sides])
        first += len(image)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=12, max_size=12), min_size=2, max_size=2),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_too_many_positives_are_cut_fairly(rows, max_samples, seed):
    """Each target keeps its best locations, up to the same number for all targets of its image."""
    # Image 1's targets come after the four of image 0.
    index = torch.tensor([rows[0], [n + 4 if n >= 0 else -1 for n in rows[1]]])
    generator = torch.Generator().manual_seed(seed)
    logits, center = torch.randn(2, 12, 3, generator=generator), torch.randn(2, 12, generator=generator)
    predictions = DensePredictions(logits, torch.ones(2, 12, 4), center, torch.zeros(2, 12, 1))
    targets = DenseTargets(index, index, torch.ones(2, 12, 4))
    image, location = sample_positives(predictions, targets, max_samples)
    kept = set(zip(image.tolist(), location.tolist(), strict=True))
    assert len(kept) == len(image)
    score = logits.sigmoid().amax(2) * center.sigmoid()
    for b in range(2):
        positives = [i for i in range(12) if index[b, i] >= 0]
        own_targets = {int(index[b, i]) for i in positives}
        share = max(1, max_samples // max(1, len(own_targets)))
        expected = set()
        for n in own_targets:
            best = sorted((i for i in positives if index[b, i] == n), key=lambda i: -score[b, i])
            expected |= {(b, i) for i in best[:share]}
        assert {pair for pair in kept if pair[0] == b} == expected


def test_centerness_is_one_in_the_middle_and_known_elsewhere():
    distances = torch.tensor([[2.0, 3, 2, 3], [1, 1, 3, 1], [1, 2, 4, 8], [9, 1, 1, 9]])
    assert_close(centerness_of(distances), torch.tensor([1, (1 / 3) ** 0.5, 0.25, 1 / 9]))


def test_box_loss_of_equal_of_empty_and_of_crossing_boxes():
    wanted = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [3, 1, 3, 1]])
    found = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [1, 3, 1, 3]])
    crossing = 1 - (4 + 1) / (20 + 1) + (36 - 20) / 36  # 6 × 2 across 2 × 6
    assert_close(giou_loss(found, wanted), torch.tensor([0, 1 - 1 / 25, crossing]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_box_loss_is_the_generalized_iou_of_large_boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    found, wanted = (1000 * (torch.rand(5, 4, generator=generator) + 0.1) for _ in range(2))
    a, b = (torch.cat([-d[:, :2], d[:, 2:]], 1) for d in (found, wanted))
    # The stride that is added to both areas is 1e-5 of them.
    assert_close(giou_loss(found, wanted), generalized_box_iou_loss(a, b), rtol=1e-4, atol=1e-4)


def test_box_loss_of_points_has_a_finite_gradient():
    found = torch.zeros(2, 4, requires_grad=True)
    giou_loss(found, torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]])).sum().backward()
    assert torch.isfinite(found.grad).all()


def perfect(matched: DenseTargets, classes: int) -> DensePredictions:
    logits = F.one_hot(matched.labels, classes + 1)[..., :classes].float() * 60 - 30
    positive = matched.target_index >= 0
    distances = torch.where(positive[..., None], matched.distances, 1.0)
    centerness = torch.where(positive, centerness_of(distances.flatten(0, 1)).view_as(positive.float()), 0.5)
    return DensePredictions(logits, distances, centerness.logit(), torch.zeros(*positive.shape, 1))


def test_perfect_predictions_have_no_loss_but_centerness_s_entropy():
    matched = match_locations(small_pyramid(), TARGETS, (16, 32), 3)
    predictions = perfect(matched, 3)
    losses = fcos_losses(predictions, matched)
    positive = matched.target_index >= 0
    assert positive.sum() > 5
    assert losses["loss_classification"] < 1e-6
    assert abs(losses["loss_box"]) < 1e-6
    p = predictions.centerness[positive].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).clamp(min=1e-12).log()).mean()
    assert_close(losses["loss_centerness"], entropy, rtol=1e-4, atol=1e-5)


def test_perfect_predictions_are_found_again():
    locations = small_pyramid()
    matched = match_locations(locations, TARGETS, (16, 32), 3)
    found = select_detections(perfect(matched, 3), locations, [(64, 96), (64, 96)])
    assert sorted(found.image_index.tolist()) == [0, 0, 1]
    assert_close(found.boxes[found.image_index == 1], TARGETS[1]["boxes"])
    first = found.boxes[found.image_index == 0]
    assert_close(first[first[:, 0].argsort()], TARGETS[0]["boxes"])
    assert torch.equal(
        matched.target_index[found.image_index, found.location] >= 0, torch.ones(3, dtype=torch.bool)
    )


def test_as_many_objects_are_found_as_there_may_be():
    boxes = [(16 * j, 16 * i, 16 * j + 16, 16 * i + 16) for i in range(20) for j in range(20)]
    locations = pyramid_locations([torch.zeros(1, 1, 80, 80)], (4,))
    predictions = perfect(match_locations(locations, [target(*boxes)], (), 3), 3)
    few, many = (select_detections(predictions, locations, [(320, 320)], limit) for limit in (100, 400))
    assert len(few.boxes) == 100
    assert sorted(many.boxes.tolist()) == sorted([float(side) for side in box] for box in boxes)


def test_the_same_object_in_two_images_is_found_in_both_and_two_classes_do_not_hide_each_other():
    locations = small_pyramid()
    matched = match_locations(locations, [TARGETS[1], TARGETS[1]], (16, 32), 3)
    predictions = perfect(matched, 3)
    found = select_detections(predictions, locations, [(64, 96), (64, 96)])
    assert found.image_index.tolist() == [0, 1]
    predictions.class_logits[..., 2] = predictions.class_logits[..., 0]
    found = select_detections(predictions, locations, [(64, 96), (64, 96)])
    assert sorted(zip(found.image_index.tolist(), found.labels.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 2),
    ]


def test_detections_are_few_good_first_and_no_duplicates():
    torch.manual_seed(0)
    locations = small_pyramid()
    count = len(locations.centers)
    predictions = DensePredictions(
        torch.randn(2, count, 3), 3 * torch.rand(2, count, 4), torch.randn(2, count), torch.zeros(2, count, 1)
    )
    found = select_detections(predictions, locations, [(64, 96), (40, 50)])
    for image, (height, width) in enumerate([(64, 96), (40, 50)]):
        mine = found.image_index == image
        scores, boxes, labels = found.scores[mine], found.boxes[mine], found.labels[mine]
        assert 0 < len(scores) <= 100
        assert (scores.diff() <= 0).all()
        same_class = labels[:, None] == labels
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        whole = (boxes[:, 0::2] < width).all(1) & (boxes[:, 1::2] < height).all(1) & (boxes > 0).all(1)
        overlap = box_iou(boxes, boxes).fill_diagonal_(0) * same_class * (whole[:, None] & whole)
        assert overlap.max() <= 0.6 + 1e-6  # boxes that the image cut were compared whole
        assert boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width
        assert boxes[:, 1::2].max() <= height
        assert set(labels.tolist()) <= {0, 1, 2}
    assert (found.image_index.diff() >= 0).all()


def part_of_losses(images: list[int]) -> dict[str, torch.Tensor]:
    """FCOS's losses of some of three images, of which the last has no positive location."""
    generator = torch.Generator().manual_seed(0)
    logits, distances = (
        torch.randn(3, 6, 2, generator=generator),
        torch.rand(3, 6, 4, generator=generator) + 1,
    )
    center, sides = torch.randn(3, 6, generator=generator), torch.rand(3, 6, 4, generator=generator) + 1
    index = torch.tensor([[0, 0, 1, -1, -1, -1], [2, -1, -1, -1, -1, -1], [-1] * 6])
    labels = torch.where(index < 0, 2, index % 2)
    predictions = DensePredictions(
        logits[images], distances[images], center[images], torch.zeros(len(images), 6, 1)
    )
    return fcos_losses(predictions, DenseTargets(index[images], labels[images], sides[images]))


def losses_of_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(part_of_losses([[0], [1, 2]][rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_losses_are_normalized_over_all_processes(tmp_path):
    """The mean of two processes' losses, which data-parallel training minimizes, is the whole batch's."""
    mp.start_processes(losses_of_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in part_of_losses([0, 1, 2]).items():
        assert_close((first[name] + second[name]) / 2, expected)
        assert (first[name] - expected).abs() > 1e-2
