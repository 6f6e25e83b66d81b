"""Evaluation, `unwrap` and state dicts of the wrappers, and the two supervisions without a teacher."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, MaskSupervised
from boxteacher.losses import dice_loss
from tests.support import (
    ScriptedSegmenter,
    script,
)
from tests.teaching_support import (
    BOX_LOSSES,
    IMAGES,
    PLAN,
    TARGETS,
    numbers,
    teacher_of,
)


def test_evaluation_uses_the_teacher_unless_inference_is_student():
    model = teacher_of(PLAN)
    with torch.no_grad():
        model.student.cells.weight.mul_(3)
    model.eval()
    by_teacher = model(IMAGES)
    model.inference = "student"
    by_student = model(IMAGES)
    for network, detections in ((model.teacher.model, by_teacher), (model.student, by_student)):
        for ours, theirs in zip(detections, network(IMAGES), strict=True):
            assert torch.equal(ours["masks"], theirs["masks"])
    assert not torch.equal(by_teacher[0]["masks"], by_student[0]["masks"])


def test_an_unwrapped_segmenter_is_a_plain_copy():
    model = teacher_of(PLAN)
    plain = model.unwrap()
    assert type(plain) is ScriptedSegmenter
    assert not plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert plain.state_dict().keys() == ScriptedSegmenter().state_dict().keys()
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        plain.cells.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())


def test_unwrap_returns_the_network_that_evaluation_uses():
    model = teacher_of(PLAN, inference="student")
    with torch.no_grad():
        model.student.cells.weight.mul_(3)
    assert torch.equal(model.unwrap().cells.weight, model.student.cells.weight)
    model.inference = "teacher"
    assert torch.equal(model.unwrap().cells.weight, model.teacher.model.cells.weight)


def test_a_model_with_the_loaded_state_gives_the_same_losses():
    model = teacher_of(warmup_steps=10)
    model.teacher.model.plan = model.student.plan = script(
        (0, (4, 4, 30, 30), 0.9), (1, (10, 10, 40, 36), 0.8)
    )
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
        optimizer.step()
    other = BoxTeacher(
        ScriptedSegmenter(model.student.plan), augmentation=nn.Identity(), warmup_steps=10
    ).train()
    other.load_state_dict(model.state_dict())
    assert numbers(other(IMAGES, TARGETS)) == numbers(model(IMAGES, TARGETS))


def test_box_supervision_has_the_box_losses_of_box_teacher():
    torch.manual_seed(0)
    plain = numbers(BoxSupervised(ScriptedSegmenter(), warmup_steps=0).train()(IMAGES, TARGETS))
    taught = numbers(teacher_of(PLAN)(IMAGES, TARGETS))
    assert set(plain) == BOX_LOSSES
    assert plain == pytest.approx({name: taught[name] for name in BOX_LOSSES}, rel=1e-6)


def test_box_supervision_ignores_masks():
    torch.manual_seed(0)
    model = BoxSupervised(ScriptedSegmenter(), warmup_steps=0).train()
    with_masks = [
        {**t, "masks": torch.ones(len(t["boxes"]), *i.shape[1:])}
        for i, t in zip(IMAGES, TARGETS, strict=True)
    ]
    assert numbers(model(IMAGES, with_masks)) == numbers(model(IMAGES, TARGETS))


def test_mask_supervision_is_the_mean_dice_of_the_annotated_masks():
    torch.manual_seed(0)
    model = MaskSupervised(ScriptedSegmenter()).train()
    annotated = torch.rand(2, 48, 64) < 0.5
    losses = model(IMAGES, [{**TARGETS[0], "masks": annotated}, TARGETS[1]])
    assert set(losses) == {"loss_class", "loss_mask"}
    with torch.no_grad():
        logits = model.student.maps(IMAGES)[[0, 0]]
    assert_close(
        losses["loss_mask"].detach(), dice_loss(logits.sigmoid(), annotated[:, 2::4, 2::4].float()).mean()
    )


def test_mask_supervision_without_masks_has_mask_loss_0_and_warns_once(caplog):
    torch.manual_seed(0)
    model = MaskSupervised(ScriptedSegmenter()).train()
    for _ in range(2):
        assert model(IMAGES, TARGETS)["loss_mask"] == 0
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "no target of this batch has 'masks', so no mask is learned from it"
    ]


@pytest.mark.parametrize(
    "wrapper", [BoxSupervised, functools.partial(BoxTeacher, augmentation=nn.Identity())]
)
def test_masks_learn_to_fill_ellipses_in_the_first_steps_alone(wrapper):
    model = wrapper(ScriptedSegmenter(), warmup_steps=0, ellipse_steps=2).train()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.0)
    losses = []
    for _ in range(3):
        losses.append(model(IMAGES, TARGETS))
        sum(losses[-1].values()).backward()
        optimizer.step()
    assert_close(losses[1]["loss_ellipse"], losses[0]["loss_ellipse"] / 2)
    assert losses[0]["loss_ellipse"] > 0
    assert "loss_ellipse" not in losses[2]
    assert "loss_ellipse" not in wrapper(ScriptedSegmenter()).train()(IMAGES, TARGETS)
