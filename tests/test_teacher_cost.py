"""A cheaper teacher: a smaller dtype, and an interval between its runs."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxTeacher, Candidates, InputError
from tests.support import ScriptedSegmenter, filled, script, seeded_images, target
from tests.teaching_support import box_teacher

IMAGES = seeded_images((48, 64))
BOX = (8, 8, 40, 40)


def teacher_of(student: nn.Module, **settings: object) -> BoxTeacher:
    torch.manual_seed(0)
    settings = {"augmentation": nn.Identity(), "warmup_steps": 0, **settings}
    return box_teacher(student, **settings).train()


def blob() -> Tensor:
    """Logits (1, 12, 16) of a mask with a soft edge."""
    return filled((3, 3, 9, 9), 12, 16).float()[None] * 4 - torch.linspace(0.5, 3, 16)


def proposing() -> ScriptedSegmenter:
    return ScriptedSegmenter(script((0, BOX, 0.8), logits=blob()))


class Typed(ScriptedSegmenter):
    """Records the dtype of its maps."""

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        self.dtype = self.maps(images).dtype
        return super().forward_teacher(images)


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_dtype_applies_to_the_teacher_alone(dtype, expected):
    model = teacher_of(Typed(script((0, BOX, 0.8))), dtype=dtype)
    losses = model(IMAGES, [target(BOX)])
    assert model.teacher.model.dtype == expected
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters() if p.grad is not None)


def test_the_confidence_of_a_bfloat16_teacher_is_nearly_the_same():
    def confidence(dtype: torch.dtype | None) -> Tensor:
        model = teacher_of(ScriptedSegmenter(script((0, BOX, 0.8))), dtype=dtype)
        nn.init.constant_(model.teacher.model.logit.bias, 0.5)
        model(IMAGES, [target(BOX)])
        return model.last_pseudo_masks.confidence

    exact = confidence(None)
    assert exact > 0.5
    # bfloat16 keeps 8 bits: each of three layers may be off by 2⁻⁸, and σ halves it.
    assert_close(confidence(torch.bfloat16), exact, rtol=0, atol=3 * 2**-8)


def test_between_two_runs_of_the_teacher_only_the_box_losses_are_positive():
    student = proposing()
    model = teacher_of(student, teacher_interval=3)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=1e-3)
    runs = []
    for _ in range(7):
        calls = len(model.teacher.model.teacher_calls)
        losses = model(IMAGES, [target(BOX)])
        losses = model(IMAGES, [target(BOX)])  # a second batch in the same optimizer step
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        runs.append(len(model.teacher.model.teacher_calls) - calls)
        assert (losses["loss_pixel"] > 0) == (runs[-1] > 0)
        assert losses["loss_projection"] > 0
    assert runs == [2, 0, 0, 2, 0, 0, 2]


def test_an_annotated_mask_is_used_in_every_step():
    model = teacher_of(proposing(), teacher_interval=1000)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=1e-3)
    annotated = filled(BOX, 48, 64)[None]
    for _ in range(2):
        losses = model(IMAGES, [target(BOX, masks=annotated)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["loss_mask"] > 0
    assert model.last_pseudo_masks.confidence.tolist() == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_interval": -1}, "teacher_interval is -1: give a whole number, at least 0"),
        ({"teacher_interval": 1.5}, "teacher_interval is 1.5"),
        ({"teacher_interval": "2"}, "teacher_interval is '2'"),
        ({"dtype": "bf16"}, "dtype is 'bf16': take one of None, torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        teacher_of(proposing(), **settings)
