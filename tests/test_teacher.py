"""One training step of each supervision, with a segmenter whose candidates are scripted."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised, PseudoMaskProvider
from boxteacher.losses import dice_loss
from boxteacher.targets import box_masks, grid_targets
from tests.support import (
    Script,
    ScriptedSegmenter,
    filled,
    script,
    seeded_images,
    target,
)

BOX_LOSSES = {"loss_class", "loss_projection", "loss_pairwise"}
TEACHER_LOSSES = BOX_LOSSES | {"loss_pixel", "loss_affinity"}


def teacher_of(plan: Script | None = None, samples: int = 1, rounds: int = 1, **settings: Any) -> BoxTeacher:
    torch.manual_seed(0)
    settings = {"augmentation": nn.Identity(), "warmup_steps": 0, **settings}
    return BoxTeacher(ScriptedSegmenter(plan, samples=samples, rounds=rounds), **settings).train()


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


def plateau(*boxes: tuple[int, int, int, int], height: int = 12, width: int = 16) -> Tensor:
    """Logits (K, height, width): +3 in a box of grid cells, −3 elsewhere."""
    return torch.stack([filled(box, height, width).float() * 6 - 3 for box in boxes])


IMAGES = seeded_images((48, 64), (40, 50))
TARGETS = [target((4, 4, 30, 30), (20, 10, 60, 44)), target((10, 10, 40, 36))]
PLAN = script(
    (0, (4, 4, 30, 30), 0.9),
    (0, (22, 10, 60, 44), 0.6),
    (1, (10, 10, 40, 36), 0.8),
    logits=plateau((2, 2, 6, 6), (4, 4, 12, 9), (0, 0, 16, 12)),
)


def test_a_step_returns_every_loss_once_and_finite():
    losses = teacher_of(PLAN)(IMAGES, TARGETS)
    assert set(losses) == TEACHER_LOSSES
    assert all(loss.ndim == 0 and torch.isfinite(loss) and loss > 0 for loss in losses.values())


def test_the_teacher_is_frozen_and_looks_in_evaluation_mode():
    model = teacher_of(PLAN)
    torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
    assert model.teacher.teacher_calls == [(False, False)]
    assert model.student.teacher_calls == []
    assert not any(module.training for module in model.teacher.modules())
    assert all(module.training for module in model.student.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_a_candidate_whose_first_wish_is_taken_gets_its_second():
    """Two boxes alike, and two candidates that both prefer the first."""
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


def test_the_student_alone_sees_the_augmentation():
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


def test_pseudo_masks_are_the_winners_cut_to_their_boxes():
    model = teacher_of(PLAN)
    model(IMAGES, TARGETS)
    pseudo = model.last_pseudo_masks
    boxes = grid_targets(IMAGES, TARGETS, 4, 16).box_masks
    for n in range(3):
        assert torch.equal(pseudo.masks[n], (PLAN.logits[n] > 0) & boxes[n])
        assert pseudo.masks[n].any()
    # Quality is σ(3) for all, as no mask reaches into the padding's zeros.
    expected = (PLAN.scores.sqrt() * torch.sigmoid(torch.tensor(3.0))).sqrt()
    assert_close(pseudo.confidence, expected)


def test_a_clear_mask_beats_a_better_score():
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


def test_the_quality_of_a_mask_does_not_see_the_padding_of_its_image():
    """Image 1 is smaller than the canvas: what the network draws beyond it does not count."""
    logits = plateau((0, 0, 16, 12))
    logits[0, :, 13:] = 9.0  # columns from pixel 54, beyond the 50 of the image
    plan = script((1, (10, 10, 40, 36), 0.81), logits=logits)
    model = teacher_of(plan, confidence="paper")
    model(IMAGES, TARGETS)
    expected = (0.81 * torch.sigmoid(torch.tensor(3.0))).sqrt()
    assert_close(model.last_pseudo_masks.confidence[2], expected)


def test_masks_are_decoded_once_and_only_for_candidates_that_can_win():
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
    (decoded,) = model.teacher.decoded
    assert decoded.tolist() == [0, 3]


@pytest.mark.parametrize("scale", [1, 2])
def test_masks_are_decoded_for_the_box_that_a_candidate_overlaps_most(scale):
    candidates = [(0, (4, 4, 30, 30), 0.9), (0, (20, 4, 46, 30), 0.8), (0, (5, 4, 30, 30), 0.7)]
    plan = script(*((i, [scale * v for v in box], score) for i, box, score in candidates), level=1.0)
    size = None if scale == 1 else (64, 96)
    model = BoxTeacher(ScriptedSegmenter(plan), teacher_size=size).train()
    boxes, labels = torch.tensor([(20.0, 4.0, 46.0, 31.0), (4.0, 4.0, 30.0, 31.0)]), torch.tensor([3, 5])
    model([IMAGE], [{"boxes": boxes, "labels": labels}])
    ((drawn, names),) = model.teacher.drawn_for
    assert_close(drawn, scale * boxes[[1, 0, 1]])
    assert names.tolist() == [5, 3, 5]


class BoxAligned(ScriptedSegmenter):
    """Its masks fill the box that they are drawn for."""

    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        rows, columns = (torch.arange(2, side, 4) for side in (32, 48))
        return replace(
            found, decode_masks=lambda _, boxes, labels: 20.0 * box_masks(boxes, rows, columns) - 10
        )


def test_a_candidate_that_gets_its_second_wish_draws_in_that_box():
    plan = script((0, (4, 4, 30, 30), 0.9), (0, (5, 4, 31, 30), 0.8))
    model = BoxTeacher(BoxAligned(plan)).train()
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


def test_the_score_threshold_is_exclusive():
    plan = script((0, (4, 4, 30, 30), 0.5), (1, (10, 10, 40, 36), 0.75), level=2.0)
    model = teacher_of(plan, score_threshold=0.5)
    model(IMAGES, TARGETS)
    assert (model.last_pseudo_masks.confidence > 0).tolist() == [False, False, True]


def test_a_drawn_mask_is_used_as_it_is_and_trusted_fully():
    drawn = torch.rand(2, 48, 64) < 0.5
    targets = [{**TARGETS[0], "masks": drawn}, TARGETS[1]]
    model = teacher_of(PLAN)
    model(IMAGES, targets)
    pseudo = model.last_pseudo_masks
    assert torch.equal(pseudo.masks[:2], drawn[:, 2::4, 2::4])
    assert pseudo.confidence[:2].tolist() == [1, 1]
    assert 0 < pseudo.confidence[2] < 1


def test_only_targets_said_to_have_a_mask_use_it():
    drawn = torch.rand(2, 48, 64) < 0.5
    targets = [{**TARGETS[0], "masks": drawn, "has_mask": torch.tensor([False, True])}, TARGETS[1]]
    model, plain = teacher_of(PLAN), teacher_of(PLAN)
    model(IMAGES, targets)
    plain(IMAGES, TARGETS)
    ours, theirs = model.last_pseudo_masks, plain.last_pseudo_masks
    assert torch.equal(ours.masks[1], drawn[1, 2::4, 2::4])
    assert ours.confidence[1] == 1
    for n in (0, 2):
        assert torch.equal(ours.masks[n], theirs.masks[n])
        assert ours.confidence[n] == theirs.confidence[n]


def test_a_pseudo_mask_equal_to_a_drawn_one_teaches_the_same_up_to_confidence():
    box = (4, 4, 30, 30)
    image = seeded_images((48, 64))
    plan = script((0, box, 1.0), logits=plateau((2, 2, 6, 6)) * 20)  # confidence 1, to float32's precision
    drawn = filled((8, 8, 24, 24), 48, 64)[None]
    pseudo = teacher_of(plan)(image, [target(box)])
    real = teacher_of(script())(image, [target(box, masks=drawn)])
    assert_close(pseudo, real)


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


def test_the_pseudo_warm_up_is_the_other_one_unless_given():
    assert teacher_of(warmup_steps=7).pseudo_warmup_steps == 7
    assert teacher_of(warmup_steps=7, pseudo_warmup_steps=0).pseudo_warmup_steps == 0


def test_losses_of_several_rounds_are_averaged():
    class OneRound(ScriptedSegmenter):
        shift = 0

        def forward_student(self, images, targets):
            output = super().forward_student(images, targets)
            return type(output)(output.losses, [output.masks[self.shift]])

    together = numbers(teacher_of(PLAN, rounds=3)(IMAGES, TARGETS))
    singly = []
    for shift in range(3):
        torch.manual_seed(0)
        student = OneRound(PLAN, rounds=3)
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
        assert model.teacher.teacher_calls == []  # there is nothing to ask it for


def test_a_batch_without_any_candidate_learns_from_boxes_alone():
    model = teacher_of(script())
    losses = numbers(model(IMAGES, TARGETS))
    assert losses["loss_pixel"] == losses["loss_affinity"] == 0
    assert losses["loss_projection"] > 0
    assert model.last_pseudo_masks.masks.shape == (3, 12, 16)
    assert not model.last_pseudo_masks.masks.any()


def test_images_do_not_influence_each_other_s_pseudo_masks():
    """Alone, in another order, or beside a larger image: the same masks, as far as the image goes."""
    plan = script((0, (4, 4, 30, 30), 0.9), (0, (22, 10, 60, 44), 0.6))
    alone = teacher_of(plan)
    alone([IMAGES[0]], [TARGETS[0]])
    beside = teacher_of(Script(plan.boxes, plan.scores, plan.image_index + 1))
    beside([seeded_images((90, 100), seed=4)[0], IMAGES[0]], [target(), TARGETS[0]])
    ours, theirs = alone.last_pseudo_masks, beside.last_pseudo_masks
    assert torch.equal(theirs.masks[:, :12, :16], ours.masks)
    assert theirs.masks.sum() == ours.masks.sum() > 0
    assert_close(theirs.confidence, ours.confidence)


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


def test_evaluation_is_the_teacher_s_unless_the_student_is_asked_for():
    model = teacher_of(PLAN)
    with torch.no_grad():
        model.student.cells.weight.mul_(3)
    model.eval()
    by_teacher = model(IMAGES)
    model.inference = "student"
    by_student = model(IMAGES)
    for network, detections in ((model.teacher, by_teacher), (model.student, by_student)):
        for ours, theirs in zip(detections, network(IMAGES), strict=True):
            assert torch.equal(ours["masks"], theirs["masks"])
    assert not torch.equal(by_teacher[0]["masks"], by_student[0]["masks"])


def test_an_export_is_a_plain_copy_that_stands_alone():
    model = teacher_of(PLAN)
    plain = model.export()
    assert type(plain) is ScriptedSegmenter
    assert not plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert plain.state_dict().keys() == ScriptedSegmenter().state_dict().keys()
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        plain.cells.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())


def test_an_export_is_what_evaluation_uses():
    model = teacher_of(PLAN, inference="student")
    with torch.no_grad():
        model.student.cells.weight.mul_(3)
    assert torch.equal(model.export().cells.weight, model.student.cells.weight)
    model.inference = "teacher"
    assert torch.equal(model.export().cells.weight, model.teacher.cells.weight)


def test_a_copy_of_the_state_gives_the_same_losses():
    model = teacher_of(warmup_steps=10)
    model.teacher.plan = model.student.plan = script((0, (4, 4, 30, 30), 0.9), (1, (10, 10, 40, 36), 0.8))
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


def test_box_supervision_is_the_teacher_s_box_part():
    torch.manual_seed(0)
    plain = numbers(BoxSupervised(ScriptedSegmenter(), warmup_steps=0).train()(IMAGES, TARGETS))
    taught = numbers(teacher_of(PLAN)(IMAGES, TARGETS))
    assert set(plain) == BOX_LOSSES
    assert plain == pytest.approx({name: taught[name] for name in BOX_LOSSES}, rel=1e-6)


def test_box_supervision_never_looks_at_masks():
    torch.manual_seed(0)
    model = BoxSupervised(ScriptedSegmenter(), warmup_steps=0).train()
    drawn = [
        {**t, "masks": torch.ones(len(t["boxes"]), *i.shape[1:])}
        for i, t in zip(IMAGES, TARGETS, strict=True)
    ]
    assert numbers(model(IMAGES, drawn)) == numbers(model(IMAGES, TARGETS))


def test_mask_supervision_is_the_mean_dice_of_the_drawn_masks():
    torch.manual_seed(0)
    model = MaskSupervised(ScriptedSegmenter()).train()
    drawn = torch.rand(2, 48, 64) < 0.5
    losses = model(IMAGES, [{**TARGETS[0], "masks": drawn}, TARGETS[1]])
    assert set(losses) == {"loss_class", "loss_mask"}
    with torch.no_grad():
        logits = model.student.maps(IMAGES)[[0, 0]]
    assert_close(
        losses["loss_mask"].detach(), dice_loss(logits.sigmoid(), drawn[:, 2::4, 2::4].float()).mean()
    )


def test_mask_supervision_without_masks_teaches_no_masks_and_says_so_once(caplog):
    torch.manual_seed(0)
    model = MaskSupervised(ScriptedSegmenter()).train()
    for _ in range(2):
        assert model(IMAGES, TARGETS)["loss_mask"] == 0
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "no target of this batch has 'masks', so no mask is learnt from it"
    ]


@pytest.mark.parametrize("name", ["forward_teacher", "forward_student", "mask_stride", "size_divisor"])
def test_a_model_that_lacks_a_part_is_told_which_and_where_to_read(name):
    parts = {
        "mask_stride": 4,
        "size_divisor": 32,
        "forward_teacher": lambda self, images: None,
        "forward_student": lambda self, images, targets: None,
    }
    del parts[name]
    incomplete = type("Incomplete", (nn.Module,), parts)
    with pytest.raises(TypeError, match=rf"Incomplete.*{name}.*docs/write_an_adapter\.md"):
        BoxTeacher(incomplete())


def test_the_scripted_segmenter_follows_the_protocol():
    assert isinstance(ScriptedSegmenter(), PseudoMaskProvider)
    assert not isinstance(nn.Linear(2, 2), PseudoMaskProvider)


IMAGE = torch.rand(3, 32, 48)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([IMAGE], None, "training needs targets"),
        ([IMAGE], [], "1 images .* 0 targets"),
        ([], [], "empty list: give at least one image"),
        ([IMAGE[:, :0]], [target()], r"image 0 .*\(3, 0, 48\).*at least one pixel"),
        ([IMAGE * 255], [target()], r"image 0 has values from .*RGB in \[0, 1\]"),
        ([IMAGE * math.nan], [target()], "image 0 has values from nan to nan"),
        ([IMAGE[:1]], [target()], r"image 0 .*\(1, 32, 48\).*RGB"),
        ([IMAGE, IMAGE[0]], [target(), target()], r"image 1 .*\(32, 48\)"),
        ([IMAGE], [{"labels": torch.zeros(1)}], "target 0 .*'boxes'"),
        ([IMAGE], [{"boxes": torch.zeros(1, 4)}], "target 0 .*'labels'"),
        ([IMAGE], [{"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}], r"boxes .*\(2, 5\)"),
        ([IMAGE], [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(3)}], r"labels .*\(3,\)"),
        ([IMAGE], [target((0, 0, 9, 9), masks=torch.zeros(1, 48, 32))], r"masks .*\(1, 48, 32\)"),
        ([IMAGE], [target((0, 0, 9, 9), masks=torch.zeros(2, 32, 48))], r"masks .*\(2, 32, 48\)"),
        (
            [IMAGE],
            [target((0, 0, 9, 9), masks=torch.zeros(1, 32, 48), has_mask=torch.ones(2).bool())],
            r"has_mask .*\(2,\)",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_named_in_one_line(images, targets, message):
    with pytest.raises(InputError, match=message) as caught:
        teacher_of(PLAN)(images, targets)
    assert "\n" not in str(caught.value)


def test_boxes_that_are_no_list_of_boxes_are_named_too():
    with pytest.raises(InputError, match="target 0: boxes"):
        teacher_of(PLAN)([IMAGE], [{"boxes": torch.zeros(4), "labels": torch.zeros(4)}])
