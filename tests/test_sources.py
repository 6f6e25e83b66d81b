"""Other sources of pseudo masks as the teacher, and an EMA teacher used alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxTeacher, EMATeacher, InputError, ProtocolError, PseudoMasks, PseudoMaskSource
from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.losses import dice_loss
from boxteacher.targets import grid_targets
from tests.support import ScriptedSegmenter, filled, script, seeded_images, target
from tests.teaching_support import IMAGES, PLAN, TARGETS, teacher_of

CONFIDENCE = torch.tensor([0.9, 0.0, 0.4])


def half_masks(images: list[Tensor], targets: list, grid: MaskGrid) -> PseudoMasks:
    """The left half of each image, at its pixels, with a fixed confidence."""
    masks = []
    for image, each in zip(images, targets, strict=True):
        at_pixels = torch.zeros(len(each["boxes"]), *image.shape[1:])
        at_pixels[:, :, : image.shape[2] // 2] = 0.75
        masks.append(grid.sample(at_pixels))
    return PseudoMasks(torch.cat(masks), CONFIDENCE)


def model_with(source: PseudoMaskSource, **settings: float) -> BoxTeacher:
    torch.manual_seed(0)
    segmenter = ScriptedSegmenter()
    return BoxTeacher(
        segmenter, teacher=source, augmentation=nn.Identity(), warmup_steps=0, **settings
    ).train()


def test_a_function_can_be_a_source():
    model = model_with(half_masks, pixel_weight=1.0)
    losses = model(IMAGES, TARGETS)
    pseudo = model.last_pseudo_masks
    truth = grid_targets(IMAGES, TARGETS, mask_grid(IMAGES, 4, 16))
    assert_close(pseudo.masks, half_masks(IMAGES, TARGETS, mask_grid(IMAGES, 4, 16)).masks * truth.box_masks)
    assert torch.equal(pseudo.confidence, CONFIDENCE)
    with torch.no_grad():
        logits = model.student.maps(IMAGES)[[0, 0, 1]]
    expected = (dice_loss(logits.sigmoid(), pseudo.masks) * CONFIDENCE).sum() / 2
    assert_close(losses["loss_pixel"].detach(), expected)


def test_with_another_source_evaluation_uses_the_student_and_steps_are_counted():
    model = model_with(half_masks)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    sum(model(IMAGES, TARGETS).values()).backward()
    optimizer.step()
    assert model.optimizer_steps == 1
    assert model.segmenter is model.student
    assert all(not name.startswith("teacher") for name in model.state_dict())
    unwrapped = model.unwrap()
    for name, value in model.student.state_dict().items():
        assert torch.equal(unwrapped.state_dict()[name], value)
    copied = copy.deepcopy(model)
    assert copied.teacher is half_masks


def test_a_source_is_frozen_and_stays_in_evaluation_mode():
    class Promptable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.calls: list[tuple[bool, bool]] = []

        def forward(self, images: list[Tensor], targets: list, grid: MaskGrid) -> PseudoMasks:
            self.calls.append((self.training, torch.is_grad_enabled()))
            return half_masks(images, targets, grid)

    source = Promptable()
    model = model_with(source)
    sum(model(IMAGES, TARGETS).values()).backward()
    assert source.calls == [(False, False)]
    assert not source.weight.requires_grad


def test_an_annotated_mask_replaces_the_source_s_with_its_own_confidence():
    annotated = torch.rand(2, 48, 64) < 0.5
    given = {
        **TARGETS[0],
        "masks": annotated,
        "has_mask": torch.tensor([True, False]),
        "mask_confidence": torch.tensor([0.25, 0.5]),
    }
    model = model_with(half_masks)
    model(IMAGES, [given, TARGETS[1]])
    pseudo = model.last_pseudo_masks
    assert_close(pseudo.confidence, torch.tensor([0.25, 0.0, 0.4]))
    assert torch.equal(pseudo.masks[0] > 0, annotated[0, 2::4, 2::4])


def test_pseudo_masks_of_the_wrong_shape_are_refused():
    def transposed(images: list[Tensor], targets: list, grid: MaskGrid) -> PseudoMasks:
        pseudo = half_masks(images, targets, grid)
        return PseudoMasks(pseudo.masks.mT, pseudo.confidence)

    with pytest.raises(ProtocolError, match=r"gave pseudo masks \(3, 16, 12\).*\(3, 12, 16\)"):
        model_with(transposed)(IMAGES, TARGETS)


def test_an_ema_teacher_alone_gives_the_pseudo_masks_of_a_training_step():
    model = teacher_of(PLAN)
    model(IMAGES, TARGETS)
    expected = model.last_pseudo_masks
    grid = mask_grid(IMAGES, 4, 16)
    alone = EMATeacher(ScriptedSegmenter(PLAN))(IMAGES, TARGETS, grid)
    assert torch.equal(alone.masks & grid_targets(IMAGES, TARGETS, grid).box_masks, expected.masks)
    assert torch.equal(alone.confidence, expected.confidence)
    assert isinstance(model.teacher, PseudoMaskSource)


def test_pseudo_masks_of_another_stride_and_divisor_land_on_the_student_s_grid():
    """The teacher's grid has stride 8, the student's stride 4."""

    class Coarse(ScriptedSegmenter):
        mask_stride = 8
        size_divisor = 8

        def maps(self, images: list[Tensor]) -> Tensor:
            return torch.zeros(len(images), 6, 8)

    box = (8, 8, 40, 40)
    coarse = filled((1, 1, 5, 5), 6, 8).float()[None] * 20 - 10
    source = EMATeacher(Coarse(script((0, box, 0.8), logits=coarse)))
    (image,) = seeded_images((48, 64))
    pseudo = source([image], [target(box)], mask_grid([image], 4, 32))
    assert pseudo.masks.shape == (1, 16, 16)
    # The student's cells are those of pixels 2, 6, …; the coarse mask's edges lie half a coarse cell inside.
    expected = filled((2, 2, 10, 10), 16, 16)
    assert (pseudo.masks[0] ^ expected).sum() <= 4 * 8
    assert pseudo.masks[0, 4:8, 4:8].all()
    assert not pseudo.masks[0, 12:].any()
    assert pseudo.confidence > 0.8


def test_a_batch_without_boxes_gives_no_masks():
    pseudo = EMATeacher(ScriptedSegmenter(PLAN))(IMAGES, [target(), target()], mask_grid(IMAGES, 4, 16))
    assert pseudo.masks.shape == (0, 12, 16)
    assert pseudo.confidence.shape == (0,)


def test_a_source_is_not_called_without_targets():
    def fails(images: list[Tensor], targets: list, grid: MaskGrid) -> PseudoMasks:
        raise AssertionError

    losses = model_with(fails)(IMAGES, [target(), target()])
    assert losses["loss_pixel"] == losses["loss_affinity"] == 0


def test_a_teacher_of_another_architecture_must_be_fixed():
    class Wider(ScriptedSegmenter):
        def __init__(self) -> None:
            super().__init__(PLAN)
            self.more = nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"another network than the student.*more\.weight.*momentum=1"):
        model_with(EMATeacher(Wider()))
    fixed = EMATeacher(Wider(), momentum=1)
    before = {name: value.clone() for name, value in fixed.state_dict().items()}
    model = model_with(fixed)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(IMAGES, TARGETS).values()).backward()
        optimizer.step()
    assert (model.last_pseudo_masks.confidence > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in fixed.state_dict().items())
    assert model.segmenter is model.student
    assert type(model.unwrap()) is ScriptedSegmenter


class Holding(nn.Module):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student


SEGMENTER = ScriptedSegmenter()
NAN = float("nan")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "teacher is 5: give a callable"),
        (SEGMENTER, r"teacher is a segmenter.*EMATeacher\(ScriptedSegmenter"),
        (Holding(SEGMENTER), "Holding, holds parameters of the student"),
    ],
)
def test_what_is_no_source_is_refused_at_once(source, message):
    with pytest.raises(ProtocolError, match=message):
        BoxTeacher(SEGMENTER, teacher=source)
    assert all(parameter.requires_grad for parameter in SEGMENTER.parameters())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda pseudo: (pseudo.masks, pseudo.confidence), "returned a tuple: return boxteacher.PseudoMasks"),
        (lambda pseudo: PseudoMasks(pseudo.masks * 9, pseudo.confidence), r"masks outside \[0, 1\]"),
        (lambda pseudo: PseudoMasks(pseudo.masks * NAN, pseudo.confidence), r"masks outside \[0, 1\]"),
        (lambda pseudo: PseudoMasks(pseudo.masks, pseudo.confidence * 9), r"confidence outside \[0, 1\]"),
    ],
)
def test_a_source_that_returns_no_masks_is_named(result, message):
    model = model_with(lambda *batch: result(half_masks(*batch)))
    with pytest.raises(ProtocolError, match=message):
        model(IMAGES, TARGETS)
