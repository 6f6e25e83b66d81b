"""A training step of BoxTeacher: its losses, their weights and warm-ups, and invariances."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, MaskSupervised
from boxteacher.losses import dice_loss
from tests.support import (
    Script,
    ScriptedSegmenter,
    script,
    target,
)
from tests.teaching_support import (
    IMAGES,
    PLAN,
    TARGETS,
    TEACHER_LOSSES,
    numbers,
    teacher_of,
)


def test_a_step_returns_every_loss_once_and_finite():
    losses = teacher_of(PLAN)(IMAGES, TARGETS)
    assert set(losses) == TEACHER_LOSSES
    assert all(loss.ndim == 0 and torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_the_teacher_is_frozen_and_runs_in_evaluation_mode():
    model = teacher_of(PLAN)
    torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
    assert model.teacher.model.teacher_calls == [(False, False)]
    assert model.student.teacher_calls == []
    assert not any(module.training for module in model.teacher.modules())
    assert all(module.training for module in model.student.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_only_the_student_sees_augmented_images():
    class Negative(nn.Module):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [1 - image for image in images]

    plan = script((0, (4, 4, 30, 30), 0.9))
    plain, negative = teacher_of(plan), teacher_of(plan, augmentation=Negative())
    images = [image.clone() for image in IMAGES]
    for model in (plain, negative):
        model(images, TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(images, IMAGES, strict=True))
    for seen, image in zip(negative.student.student_images[0], IMAGES, strict=True):
        assert torch.equal(seen, 1 - image)
    assert torch.equal(negative.last_pseudo_masks.masks, plain.last_pseudo_masks.masks)


ANNOTATED = torch.rand(2, 48, 64, generator=torch.Generator().manual_seed(3)) < 0.5


def test_an_annotated_mask_has_a_loss_of_its_own_that_neither_warms_up_nor_weighs_half():
    masked = [{**TARGETS[0], "masks": ANNOTATED}, TARGETS[1]]
    losses = teacher_of(PLAN, warmup_steps=1000)(IMAGES, masked)
    torch.manual_seed(0)
    supervised = MaskSupervised(ScriptedSegmenter(PLAN)).train()(IMAGES, masked)
    assert_close(losses["loss_mask"], supervised["loss_mask"])
    assert_close(teacher_of(PLAN, mask_weight=3.0)(IMAGES, masked)["loss_mask"], 3 * losses["loss_mask"])


def test_the_losses_from_pseudo_masks_are_those_of_the_targets_without_an_annotated_mask():
    """The only pseudo mask is that of image 1, whose losses are a mean over it alone."""
    plan = script((1, (10, 10, 40, 36), 0.8), logits=PLAN.logits[2:])
    plain = numbers(teacher_of(plan)(IMAGES, TARGETS))
    mixed = numbers(teacher_of(plan)(IMAGES, [{**TARGETS[0], "masks": ANNOTATED}, TARGETS[1]]))
    assert mixed.pop("loss_mask") > 0
    assert mixed == plain


def test_a_target_s_mask_of_less_confidence_has_the_losses_of_that_pseudo_mask():
    """Pseudo masks that were kept and are given as targets teach as those that a teacher proposes."""
    model = teacher_of(PLAN, warmup_steps=10)
    proposed = numbers(model(IMAGES, TARGETS))
    pseudo = model.last_pseudo_masks
    stride, kept = 4, []
    for image, each, rows in zip(IMAGES, TARGETS, ([0, 1], [2]), strict=True):
        masks = pseudo.masks[rows].repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        masks = masks[:, : image.shape[1], : image.shape[2]]
        kept.append({**each, "masks": masks, "mask_confidence": pseudo.confidence[rows]})
    other = teacher_of(script(), warmup_steps=10)
    given = numbers(other(IMAGES, kept))
    assert other.teacher.model.teacher_calls == []  # no target is without a mask
    assert given == pytest.approx(proposed, rel=1e-6)


@pytest.mark.parametrize("more", [{"mask_confidence": [0.5, 0.25]}, {"has_mask": [False, False]}])
def test_a_batch_without_annotated_masks_has_no_mask_loss(more: dict[str, Any]):
    targets = [{**TARGETS[0], "masks": ANNOTATED, **more}, TARGETS[1]]
    assert "loss_mask" not in teacher_of(PLAN)(IMAGES, targets)


def test_the_teacher_is_not_run_where_every_target_has_a_mask():
    def calls(*targets: dict) -> int:
        model = teacher_of(PLAN)
        model(IMAGES, list(targets))
        return len(model.teacher.model.teacher_calls)

    masked = {**TARGETS[0], "masks": ANNOTATED}
    assert calls(masked, target()) == 0
    assert calls({**masked, "has_mask": torch.tensor([True, True])}, target()) == 0
    assert calls({**masked, "has_mask": torch.tensor([True, False])}, target()) == 1
    assert calls({**masked, "mask_confidence": torch.tensor([1.0, 0.0])}, target()) == 1
    assert calls(masked, TARGETS[1]) == 1


def test_soft_masks_are_compared_as_they_are():
    soft = torch.rand(2, 48, 64, generator=torch.Generator().manual_seed(4))
    model = teacher_of(PLAN)
    loss = model(IMAGES, [{**TARGETS[0], "masks": soft}, target()])["loss_mask"]
    with torch.no_grad():
        logits = model.student.maps(IMAGES)[[0, 0]]
    assert_close(loss.detach(), dice_loss(logits.sigmoid(), soft[:, 2::4, 2::4]).mean())


def test_the_weights_scale_their_losses():
    plain = numbers(teacher_of(PLAN)(IMAGES, TARGETS))
    heavy = numbers(teacher_of(PLAN, pixel_weight=1.5, affinity_weight=0.7)(IMAGES, TARGETS))
    factors = {"loss_pixel": 3.0, "loss_affinity": 7.0}
    assert heavy == pytest.approx({k: v * factors.get(k, 1.0) for k, v in plain.items()}, rel=1e-6)


def test_the_pixel_loss_is_the_weighted_dice_with_the_pseudo_masks():
    model = teacher_of(PLAN, pixel_weight=1.0)
    loss = model(IMAGES, TARGETS)["loss_pixel"]
    pseudo = model.last_pseudo_masks
    with torch.no_grad():
        logits = model.student.maps(IMAGES)[[0, 0, 1]]
    per_mask = dice_loss(logits.sigmoid(), pseudo.masks.float())
    assert_close(loss.detach(), (per_mask * pseudo.confidence).mean())


def test_losses_warm_up_by_optimizer_steps():
    model = teacher_of(PLAN, warmup_steps=2, pseudo_warmup_steps=4)
    full = numbers(teacher_of(PLAN)(IMAGES, TARGETS))
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.0)
    for done in range(6):
        for _ in range(2):  # a forward pass alone does not advance the warm-up
            losses = model(IMAGES, TARGETS)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        color, pseudo = min((done + 1) / 2, 1), min((done + 1) / 4, 1)
        factors = {"loss_pairwise": color, "loss_pixel": pseudo, "loss_affinity": pseudo}
        expected = {k: v * factors.get(k, 1.0) for k, v in full.items()}
        assert numbers(losses) == pytest.approx(expected, rel=1e-5)


def test_pseudo_warmup_steps_default_to_warmup_steps():
    assert teacher_of(warmup_steps=7).pseudo_warmup_steps == 7
    assert teacher_of(warmup_steps=7, pseudo_warmup_steps=0).pseudo_warmup_steps == 0


def test_losses_of_several_decoder_layers_are_averaged():
    class OneLayer(ScriptedSegmenter):
        shift = 0

        def forward_student(self, images, targets):
            output = super().forward_student(images, targets)
            return type(output)(output.losses, [output.masks[self.shift]])

    together = numbers(teacher_of(PLAN, layers=3)(IMAGES, TARGETS))
    singly = []
    for shift in range(3):
        torch.manual_seed(0)
        student = OneLayer(PLAN, layers=3)
        student.shift = shift
        model = BoxTeacher(student, augmentation=nn.Identity(), warmup_steps=0).train()
        singly.append(numbers(model(IMAGES, TARGETS)))
    mean = {name: sum(losses[name] for losses in singly) / 3 for name in together}
    assert together == pytest.approx(mean, rel=1e-5)
    assert singly[0]["loss_pixel"] != pytest.approx(singly[2]["loss_pixel"], rel=1e-3)


def test_a_second_sample_of_each_target_changes_no_mean():
    once = numbers(teacher_of(PLAN)(IMAGES, TARGETS))
    twice = numbers(teacher_of(PLAN, samples=2)(IMAGES, TARGETS))
    assert twice == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("supervision", [BoxTeacher, BoxSupervised, MaskSupervised])
def test_a_batch_without_any_box_trains(supervision):
    torch.manual_seed(0)
    model = supervision(ScriptedSegmenter(script((0, (4, 4, 30, 30), 0.9), level=1.0))).train()
    losses = model(IMAGES, [target(), target()])
    values = numbers(losses)
    assert values.pop("loss_class") > 0
    assert values == dict.fromkeys(values, 0.0)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters())
    if supervision is BoxTeacher:
        assert model.teacher.model.teacher_calls == []  # it has nothing to find


def test_without_candidates_only_the_box_losses_are_positive():
    model = teacher_of(script())
    losses = numbers(model(IMAGES, TARGETS))
    assert losses["loss_pixel"] == losses["loss_affinity"] == 0
    assert losses["loss_projection"] > 0
    assert model.last_pseudo_masks.masks.shape == (3, 12, 16)
    assert not model.last_pseudo_masks.masks.any()


def test_the_order_of_images_changes_no_loss():
    plan = script((0, (4, 4, 30, 30), 0.9), (1, (10, 10, 40, 36), 0.8), logits=PLAN.logits[[0, 2]])
    swapped = Script(plan.boxes, plan.scores, 1 - plan.image_index, plan.logits)
    ours = numbers(teacher_of(plan)(IMAGES, TARGETS))
    theirs = numbers(teacher_of(swapped)(IMAGES[::-1], TARGETS[::-1]))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_order_of_targets_changes_no_loss():
    boxes = TARGETS[0]["boxes"].flip(0)
    turned = [{"boxes": boxes, "labels": TARGETS[0]["labels"]}, TARGETS[1]]
    ours, theirs = (numbers(teacher_of(PLAN)(IMAGES, targets)) for targets in (TARGETS, turned))
    assert theirs == pytest.approx(ours, rel=1e-5)
