"""Values and gradients equal those of the released code in the reference files."""

import pytest
import torch
from torch.testing import assert_close

from boxteacher.assignment import assign_greedily, match_quality
from boxteacher.ema import ema_momentum
from boxteacher.grid import NEIGHBOR_DILATION, mask_grid, neighbor_offsets, shifted
from boxteacher.losses import (
    BoxRegions,
    affinity_relation,
    color_pairwise_loss,
    color_relation,
    dice_loss,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.losses.pairs import pair_term
from boxteacher.losses.pairwise import mask_affinity, smooth_masks
from boxteacher.scoring import mask_confidence, mask_quality, ranking_score
from boxteacher.targets import GridTargets, color_similarity, grid_targets
from tests.support import Script, ScriptedSegmenter, assert_relative, reference
from tests.teaching_support import box_teacher

OFFSETS = neighbor_offsets()


@pytest.fixture(scope="module")
def image_grid() -> tuple[list[torch.Tensor], GridTargets]:
    array = reference("box_targets")
    images = [array("image_rgb").float() / 255]
    target = {"boxes": array("boxes"), "labels": torch.zeros(4, dtype=torch.int64), "ignored_bottom_rows": 10}
    return images, grid_targets(images, [target], mask_grid(images, int(array("stride")), 32))


def test_box_masks_are_the_reference(image_grid):
    assert torch.equal(image_grid[1].box_masks.float(), reference("box_targets")("box_masks"))


def test_valid_cells_are_the_reference(image_grid):
    valid_pixels = reference("box_targets")("valid_pixels")
    assert torch.equal(image_grid[1].valid[0], valid_pixels[2::4, 2::4] > 0)
    assert torch.equal(image_grid[1].valid[0], reference("pseudo_mask_losses")("valid_pixels") > 0)


def test_color_similarity_is_the_reference(image_grid):
    array = reference("box_targets")
    images, targets = image_grid
    assert (int(array("kernel_size")), int(array("dilation"))) == (3, NEIGHBOR_DILATION)
    similarity = color_similarity(images, targets.valid, mask_grid(images, int(array("stride")), 32))
    expected = array("color_similarity")
    assert torch.equal(similarity == 0, expected == 0)
    assert_close(similarity, expected, rtol=1e-4, atol=1e-7)


def test_projection_loss_and_gradient_are_the_reference():
    array = reference("boxinst_losses")
    logits = array("mask_logits").requires_grad_()
    per_mask = projection_loss(logits, array("box_masks")[array("target_index")] > 0)
    assert_relative(per_mask, array("projection_per_mask"))
    assert_relative(per_mask.mean(), array("projection_loss"))
    (gradient,) = torch.autograd.grad(per_mask.mean(), logits)
    assert_relative(gradient, array("projection_grad"))


def test_pair_term_is_the_reference_and_0_outside_the_grid():
    array = reference("boxinst_losses")
    logits = array("mask_logits").double()
    ones = torch.ones_like(logits)
    terms = [pair_term(logits, shifted(logits, o)) * shifted(ones, o) for o in OFFSETS]
    assert_relative(torch.stack(terms, 1).float(), array("pairwise_term"))


def test_each_pair_of_the_kernel_is_the_reference_term():
    """With a relation of one offset alone, `pair_sums` adds up the terms of its pairs, once per cell."""
    array = reference("boxinst_losses")
    logits, terms = array("mask_logits"), array("pairwise_term")
    everywhere = BoxRegions(
        extents=torch.tensor([[0, 0, *logits.shape[1:]]]).expand(len(logits), -1),
        image_index=torch.zeros(len(logits), dtype=torch.int64),
        valid=torch.ones_like(logits[:1], dtype=torch.bool),
    )
    for k, only in enumerate(OFFSETS[4:], start=4):
        sums, _ = pair_sums(logits, everywhere, [lambda _, only=only: lambda o: torch.tensor(o == only)])
        assert_relative(sums[0], (terms[:, k] + terms[:, 7 - k]).sum((1, 2)))


def extents_of(box_masks: torch.Tensor) -> torch.Tensor:
    """First row, first column, end row and end column (T, 4) of rectangles (T, h, w)."""
    rows, columns = box_masks.any(2).int(), box_masks.any(1).int()
    first = torch.stack([rows.argmax(1), columns.argmax(1)], 1)
    return torch.cat([first, first + torch.stack([rows.sum(1), columns.sum(1)], 1)], 1)


def inst_regions(index: torch.Tensor) -> BoxRegions:
    array = reference("boxinst_losses")
    valid = reference("pseudo_mask_losses")("valid_pixels") > 0
    return BoxRegions(extents_of(array("box_masks") > 0)[index], torch.zeros_like(index), valid)


def test_color_pairwise_loss_and_gradient_are_the_reference():
    array = reference("boxinst_losses")
    logits, index = array("mask_logits").requires_grad_(), array("target_index")
    relation = color_relation(
        array("color_similarity"), torch.zeros_like(index), float(array("color_threshold"))
    )
    sums, counts = pair_sums(logits, inst_regions(index), [relation])
    loss = color_pairwise_loss(sums[0], counts[0])
    assert_relative(loss, array("pairwise_loss"))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_relative(gradient, array("pairwise_grad"))


def test_mask_affinity_is_the_reference():
    array = reference("pseudo_mask_losses")
    smooth = smooth_masks(array("pseudo_masks"))
    valid = array("valid_pixels").expand_as(smooth)
    affinity = torch.stack(
        [mask_affinity(smooth, shifted(smooth, o)) * shifted(valid, o) for o in OFFSETS], 1
    )
    assert_relative(affinity, array("affinity"))
    assert torch.equal(affinity == 0, array("affinity") == 0)


def test_pixel_loss_and_gradient_are_the_reference():
    array = reference("pseudo_mask_losses")
    logits, index = array("mask_logits").requires_grad_(), array("target_index")
    masks = array("pseudo_masks")[index]
    assert_relative(dice_loss(logits.sigmoid(), masks), array("dice_per_mask"))
    loss = noise_aware_pixel_loss(logits, masks, array("confidence")[index])
    assert_relative(loss, array("pixel_loss"))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_relative(gradient, array("pixel_grad"))


def test_affinity_loss_and_gradient_are_the_reference():
    array = reference("pseudo_mask_losses")
    logits, index = array("mask_logits").requires_grad_(), array("target_index")
    relation = affinity_relation(array("pseudo_masks"), index, float(array("affinity_threshold")))
    sums, counts = pair_sums(logits, inst_regions(index), [relation])
    loss = noise_reduced_affinity_loss(sums[0], counts[0], array("confidence")[index])
    assert_relative(loss, array("affinity_loss"))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_relative(gradient, array("affinity_grad"))


def test_both_pair_losses_in_one_pass_give_the_gradients_of_each():
    inst, pseudo = reference("boxinst_losses"), reference("pseudo_mask_losses")
    logits, index = inst("mask_logits").requires_grad_(), inst("target_index")
    relations = [
        color_relation(inst("color_similarity"), torch.zeros_like(index), 0.3),
        affinity_relation(pseudo("pseudo_masks"), index, 0.5),
    ]
    sums, counts = pair_sums(logits, inst_regions(index), relations)
    color = color_pairwise_loss(sums[0], counts[0])
    affinity = noise_reduced_affinity_loss(sums[1], counts[1], pseudo("confidence")[index])
    (gradient,) = torch.autograd.grad(color + affinity, logits)
    assert_relative(gradient, inst("pairwise_grad") + pseudo("affinity_grad"))


@pytest.mark.parametrize("case", range(12))
def test_scores_and_assignment_are_the_reference(case):
    arrays = reference("assignment")
    boxes, scores = arrays(f"{case}_boxes"), arrays(f"{case}_class_scores")
    gt_boxes = arrays(f"{case}_gt_boxes")
    quality = mask_quality(arrays(f"{case}_mask_probs"))
    assert_relative(quality, arrays(f"{case}_mask_quality"))
    assert_relative(ranking_score(scores, quality), arrays(f"{case}_ranking_score"))
    assert_relative(mask_confidence(scores, quality), arrays(f"{case}_confidence"))
    iou = match_quality(
        boxes,
        torch.zeros(len(boxes), dtype=torch.int64),
        gt_boxes,
        torch.zeros(len(gt_boxes), dtype=torch.int64),
        float(arrays("iou_threshold")),
    )
    chosen = assign_greedily(iou, ranking_score(scores, quality))
    assert torch.equal(chosen, arrays(f"{case}_chosen"))


def test_the_assignment_has_as_many_reference_cases_as_are_tested():
    assert int(reference("assignment")("cases")) == 12


@pytest.mark.parametrize("case", range(12))
def test_a_training_step_gives_each_box_the_confidence_and_mask_of_the_reference(case):
    arrays = reference("assignment")
    boxes, probabilities = arrays(f"{case}_boxes"), arrays(f"{case}_mask_probs")
    gt_boxes, chosen = arrays(f"{case}_gt_boxes"), arrays(f"{case}_chosen")
    plan = Script(
        boxes,
        arrays(f"{case}_class_scores"),
        torch.zeros(len(boxes), dtype=torch.int64),
        probabilities.logit(),
    )
    iou_threshold = float(arrays("iou_threshold"))
    model = box_teacher(ScriptedSegmenter(plan), iou_threshold=iou_threshold).train()
    target = {"boxes": gt_boxes, "labels": torch.zeros(len(gt_boxes), dtype=torch.int64)}
    image = torch.rand(3, 128, 160)
    model([image], [target])
    pseudo = model.last_pseudo_masks
    assert_relative(pseudo.confidence, arrays(f"{case}_gt_confidence"))
    box_masks = grid_targets([image], [target], mask_grid([image], 4, 32)).box_masks
    for n, k in enumerate(chosen.tolist()):
        expected = (probabilities[k] > 0.5) & box_masks[n] if k >= 0 else torch.zeros(32, 40).bool()
        assert torch.equal(pseudo.masks[n], expected)


def test_momentum_is_the_reference():
    arrays = reference("ema_schedule")
    momentum = [ema_momentum(step) for step in arrays("iteration").tolist()]
    assert_close(torch.tensor(momentum, dtype=torch.float64), arrays("momentum"), rtol=1e-12, atol=0)
