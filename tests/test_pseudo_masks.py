"""Pseudo masks: the candidate of each box, the mask that is decoded for it, and its confidence."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.grid import mask_grid
from boxteacher.targets import box_masks, grid_targets
from tests.support import (
    Script,
    ScriptedSegmenter,
    script,
    seeded_images,
    target,
)
from tests.teaching_support import (
    IMAGE,
    IMAGES,
    PLAN,
    TARGETS,
    box_teacher,
    plateau,
    teacher_of,
)


def test_a_candidate_whose_best_box_is_taken_gets_its_second_best():
    """Two similar boxes, and two candidates whose IoU is higher with the first."""
    plan = script(
        (0, (4, 4, 30, 30), 0.9),
        (0, (4, 4, 30, 30), 0.8),
        logits=plateau((1, 1, 8, 8), (1, 1, 8, 8)),
    )
    model = teacher_of(plan)
    model(IMAGES, [target((4, 4, 30, 30), (4, 4, 30, 32)), target((10, 10, 40, 36))])
    confidence = model.last_pseudo_masks.confidence
    assert confidence[0] > confidence[1] > 0
    assert confidence[2] == 0


def test_pseudo_masks_are_the_assigned_candidates_masks_cut_to_their_boxes():
    model = teacher_of(PLAN)
    model(IMAGES, TARGETS)
    pseudo = model.last_pseudo_masks
    boxes = grid_targets(IMAGES, TARGETS, mask_grid(IMAGES, 4, 16)).box_masks
    for n in range(3):
        assert torch.equal(pseudo.masks[n], (PLAN.logits[n] > 0) & boxes[n])
        assert pseudo.masks[n].any()
    # Quality is σ(3) for all, as no mask reaches into the padding's zeros.
    expected = (PLAN.scores.sqrt() * torch.sigmoid(torch.tensor(3.0))).sqrt()
    assert_close(pseudo.confidence, expected)


def test_a_higher_quality_mask_is_preferred_to_a_higher_score():
    """√(score · quality): 0.8 · σ(4) is more than 0.9 · σ(0.5)."""
    box = (4, 4, 30, 30)
    logits = torch.tensor([0.5, 4.0]).view(2, 1, 1)
    model = teacher_of(script((0, box, 0.9), (0, box, 0.8), logits=logits), confidence="paper")
    model([IMAGES[0]], [target(box)])
    expected = (0.8 * torch.sigmoid(torch.tensor([4.0]))).sqrt()
    assert_close(model.last_pseudo_masks.confidence, expected)


def test_confidence_by_the_paper_s_formula():
    model = teacher_of(PLAN, confidence="paper")
    model(IMAGES, TARGETS)
    expected = (PLAN.scores * torch.sigmoid(torch.tensor(3.0))).sqrt()
    assert_close(model.last_pseudo_masks.confidence, expected)


def test_the_padding_of_an_image_does_not_count_in_mask_quality():
    """Image 1 is smaller than the padded batch: the mask's cells beyond it do not count."""
    logits = plateau((0, 0, 16, 12))
    logits[0, :, 13:] = 9.0  # columns from pixel 54, beyond the 50 of the image
    plan = script((1, (10, 10, 40, 36), 0.81), logits=logits)
    model = teacher_of(plan, confidence="paper")
    model(IMAGES, TARGETS)
    expected = (0.81 * torch.sigmoid(torch.tensor(3.0))).sqrt()
    assert_close(model.last_pseudo_masks.confidence[2], expected)


def test_masks_are_decoded_once_and_only_for_candidates_that_may_be_assigned():
    plan = script(
        (0, (4, 4, 30, 30), 0.9),
        (0, (30, 30, 60, 47), 0.9),  # IoU with the second box below 0.5
        (1, (4, 4, 30, 30), 0.9),  # fits a box of image 0 only
        (1, (10, 10, 40, 30), 0.8),
        (1, (10, 10, 40, 36), 0.0),  # does not score above the threshold
        level=2.0,
    )
    model = teacher_of(plan)
    model(IMAGES, TARGETS)
    (decoded,) = model.teacher.model.decoded
    assert decoded.tolist() == [0, 3]


@pytest.mark.parametrize("scale", [1, 2])
def test_masks_are_decoded_for_the_box_that_a_candidate_overlaps_most(scale):
    candidates = [(0, (4, 4, 30, 30), 0.9), (0, (20, 4, 46, 30), 0.8), (0, (5, 4, 30, 30), 0.7)]
    plan = script(*((i, [scale * v for v in box], score) for i, box, score in candidates), level=1.0)
    size = None if scale == 1 else (64, 96)
    model = box_teacher(ScriptedSegmenter(plan), image_size=size).train()
    boxes, labels = torch.tensor([(20.0, 4.0, 46.0, 31.0), (4.0, 4.0, 30.0, 31.0)]), torch.tensor([3, 5])
    model([IMAGE], [{"boxes": boxes, "labels": labels}])
    ((decoded_boxes, names),) = model.teacher.model.decoded_for
    assert_close(decoded_boxes, scale * boxes[[1, 0, 1]])
    assert names.tolist() == [5, 3, 5]


class BoxAligned(ScriptedSegmenter):
    """A segmenter whose masks fill the box that they are decoded for."""

    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        rows, columns = (torch.arange(2, side, 4) for side in (32, 48))
        return replace(
            found, decode_masks=lambda _, boxes, labels: 20.0 * box_masks(boxes, rows, columns) - 10
        )


def test_a_candidate_assigned_to_its_second_best_box_is_decoded_in_that_box():
    plan = script((0, (4, 4, 30, 30), 0.9), (0, (5, 4, 31, 30), 0.8))
    model = box_teacher(BoxAligned(plan)).train()
    model([IMAGE], [target((4, 4, 30, 30), (10, 4, 36, 30))])
    pseudo = model.last_pseudo_masks
    assert (pseudo.confidence > 0.8).all()
    boxes = torch.tensor([[4, 4, 30, 30], [10, 4, 36, 30]])
    assert torch.equal(pseudo.masks, box_masks(boxes, torch.arange(2, 32, 4), torch.arange(2, 48, 4)))


def test_a_candidate_of_another_image_is_never_used():
    plan = script((1, (4, 4, 30, 30), 0.9), (0, (10, 10, 40, 36), 0.9), level=2.0)
    images = seeded_images((48, 64), (48, 64))
    model = teacher_of(plan, iou_threshold=0.9)
    losses = model(images, TARGETS)
    assert not model.last_pseudo_masks.masks.any()
    assert model.last_pseudo_masks.confidence.tolist() == [0, 0, 0]
    assert losses["loss_pixel"] == losses["loss_affinity"] == 0


def test_a_teacher_in_training_mode_labels_with_the_batch_s_statistics_and_keeps_its_own():
    """Its running statistics are those of the images as they are; only parameters are averaged."""
    model = teacher_of(PLAN, mode="train", momentum=0.0)
    network, own = model.teacher.model, copy.deepcopy(model.teacher.model)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    images = [image / 2 for image in IMAGES]
    for batch in (images, IMAGES):
        losses = model(batch, TARGETS)
        own.train().maps(batch)
        assert not any(module.training for module in network.modules())
        assert_close(network.norm.running_mean, own.norm.running_mean)
        assert_close(network.norm.running_var, own.norm.running_var)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        own.load_state_dict(dict(model.student.named_parameters()), strict=False)
        model.synchronize()
        assert torch.equal(network.norm.weight, model.student.norm.weight)
    assert model.student.norm.num_batches_tracked == network.norm.num_batches_tracked == 2


@pytest.mark.parametrize("name", ["condinst", "solov2", "mask2former", "mask_rcnn"])
def test_every_segmenter_s_teacher_can_label_in_training_mode(name):
    segmenter = build_segmenter(name, 3, backbone="resnet18", weights="none", image_size=96)
    model = box_teacher(segmenter, mode="train").train()
    before = model.teacher.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    losses = model([torch.rand(3, 96, 96)] * 2, [target((4, 4, 60, 60))] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    moved = {key for key, value in model.teacher.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all("running" in key or "num_batches" in key for key in moved)


def test_a_teacher_in_training_mode_refuses_a_batch_of_one_cell():
    model = teacher_of(script(), mode="train", image_size=(16, 16))
    with pytest.raises(InputError, match="batch of one image of"):
        model([torch.rand(3, 32, 32)], [target((4, 4, 30, 30))])
    assert not model.teacher.model.training


def test_the_score_threshold_is_exclusive():
    plan = script((0, (4, 4, 30, 30), 0.5), (1, (10, 10, 40, 36), 0.75), level=2.0)
    model = teacher_of(plan, score_threshold=0.5)
    model(IMAGES, TARGETS)
    assert (model.last_pseudo_masks.confidence > 0).tolist() == [False, False, True]


def test_an_annotated_mask_is_used_as_it_is_with_confidence_1():
    annotated = torch.rand(2, 48, 64) < 0.5
    targets = [{**TARGETS[0], "masks": annotated}, TARGETS[1]]
    model = teacher_of(PLAN)
    model(IMAGES, targets)
    pseudo = model.last_pseudo_masks
    assert torch.equal(pseudo.masks[:2], annotated[:, 2::4, 2::4])
    assert pseudo.confidence[:2].tolist() == [1, 1]
    assert 0 < pseudo.confidence[2] < 1


def test_only_masks_with_has_mask_are_used():
    annotated = torch.rand(2, 48, 64) < 0.5
    targets = [{**TARGETS[0], "masks": annotated, "has_mask": torch.tensor([False, True])}, TARGETS[1]]
    model, plain = teacher_of(PLAN), teacher_of(PLAN)
    model(IMAGES, targets)
    plain(IMAGES, TARGETS)
    ours, theirs = model.last_pseudo_masks, plain.last_pseudo_masks
    assert torch.equal(ours.masks[1], annotated[1, 2::4, 2::4])
    assert ours.confidence[1] == 1
    for n in (0, 2):
        assert torch.equal(ours.masks[n], theirs.masks[n])
        assert ours.confidence[n] == theirs.confidence[n]


def test_images_do_not_influence_each_other_s_pseudo_masks():
    """Alone and beside a larger image: the same masks inside the image."""
    plan = script((0, (4, 4, 30, 30), 0.9), (0, (22, 10, 60, 44), 0.6))
    alone = teacher_of(plan)
    alone([IMAGES[0]], [TARGETS[0]])
    beside = teacher_of(Script(plan.boxes, plan.scores, plan.image_index + 1))
    beside([seeded_images((90, 100), seed=4)[0], IMAGES[0]], [target(), TARGETS[0]])
    ours, theirs = alone.last_pseudo_masks, beside.last_pseudo_masks
    assert torch.equal(theirs.masks[:, :12, :16], ours.masks)
    assert theirs.masks.sum() == ours.masks.sum() > 0
    assert_close(theirs.confidence, ours.confidence)
