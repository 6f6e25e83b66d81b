"""torchvision's Mask R-CNN, taught as its user built it."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised
from boxteacher.targets import box_masks
from boxteacher_adapters.mask_rcnn import MaskRCNNProvider, build_mask_rcnn
from boxteacher_adapters.parts.pasting import OUTSIDE, paste_on_grid
from tests.disc_support import assert_learns_a_disc
from tests.support import filled, seeded_images, target


def torchvision_model(**settings: Any) -> torchvision.models.detection.MaskRCNN:
    torch.manual_seed(0)
    return torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, **settings
    )


@pytest.fixture(scope="module")
def small() -> MaskRCNNProvider:
    torch.manual_seed(0)
    return build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=96)


IMAGES = seeded_images((67, 95), (96, 41))
TARGETS = [
    target((8, 8, 60, 50), (30, 4, 90, 30), labels=torch.tensor([0, 2])),
    target((4, 10, 36, 80), labels=torch.tensor([1])),
]


class TestPasting:
    def test_a_linear_map_is_reproduced_at_the_middle_of_every_pixel(self) -> None:
        boxes = torch.tensor([[6.0, 2.0, 62.0, 30.0]])
        ramp = torch.arange(28).float()
        logits = (2 * ramp[:, None] + ramp)[None]  # (1, 28, 28)
        pasted = paste_on_grid(logits, boxes, boxes, (64, 96), 4)
        for row, column in ((1, 2), (4, 7), (6, 13)):
            y, x = 4 * row + 2.5, 4 * column + 2.5
            expected = 2 * ((y - 2) / 28 * 28 - 0.5) + (x - 6) / 56 * 28 - 0.5
            assert_close(pasted[0, row, column], torch.tensor(expected), rtol=1e-5, atol=1e-4)

    def test_cells_whose_pixel_lies_outside_are_background(self) -> None:
        boxes = torch.tensor([[8.0, 4.0, 24.0, 20.0]])
        pasted = paste_on_grid(torch.ones(1, 28, 28), boxes, boxes, (32, 40), 4)
        expected = torch.full((8, 10), OUTSIDE)
        expected[1:5, 2:6] = 1.0
        assert_close(pasted[0], expected, rtol=0, atol=1e-5)

    def test_the_outermost_values_go_on_to_the_end_of_the_reach(self) -> None:
        boxes, reach = torch.tensor([[8.0, 4.0, 24.0, 20.0]]), torch.tensor([[8.0, 4.0, 32.0, 24.0]])
        ramp = torch.arange(4.0).expand(1, 4, 4)  # rises to the right
        pasted = paste_on_grid(ramp, boxes, reach, (32, 40), 4)
        expected = torch.full((8, 10), OUTSIDE)
        expected[1:6, 2:8] = torch.tensor([0.125, 1.125, 2.125, 3.0, 3.0, 3.0])
        assert_close(pasted[0], expected, rtol=0, atol=1e-5)

    def test_gradients(self) -> None:
        boxes = torch.tensor([[1.0, 2.0, 14.0, 9.0], [3.0, 3.0, 3.0, 3.0]]).double()
        logits = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(paste_on_grid(logits, boxes, boxes, (16, 16), 4).sum(), logits)
        assert gradient[0].sum() == pytest.approx(6, abs=1e-5)  # a unit from each of 3 × 2 cells inside
        assert not gradient[1].any()


def test_a_model_as_torchvision_builds_it_is_taught_and_comes_back() -> None:
    given = torchvision_model(min_size=96, max_size=128)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    model = BoxTeacher(given)
    assert isinstance(model.student, MaskRCNNProvider)
    losses = model(IMAGES, TARGETS)
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values())
    exported = model.unwrap()
    assert type(exported) is type(given)
    for key, value in exported.state_dict().items():
        assert torch.equal(value, before[key])


def test_detections_are_torchvisions_with_labels_from_0() -> None:
    given = torchvision_model(
        min_size=96, max_size=128, box_score_thresh=0.0, box_detections_per_img=20
    ).eval()
    with torch.no_grad():
        expected, actual = given(IMAGES), BoxTeacher(given).eval()(IMAGES)
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(theirs["labels"])
        assert torch.equal(ours["labels"], theirs["labels"] - 1)
        for key in ("boxes", "scores", "masks"):
            assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize("size", [64, 190])
def test_the_internal_resize_is_mapped_back(size: int) -> None:
    """Candidates' boxes and masks are those of the images that came, whatever the network looked at."""
    provider = MaskRCNNProvider(
        torchvision_model(min_size=size, max_size=1000, box_score_thresh=0.0, box_detections_per_img=20)
    ).eval()
    with torch.no_grad():
        found = provider.forward_teacher(IMAGES)
        detections = provider(IMAGES)
        masks = found.own_masks(torch.arange(len(found.boxes)))
    assert masks.shape[1:] == (24, 24)
    assert_close(found.boxes, torch.cat([one["boxes"] for one in detections]), rtol=1e-5, atol=1e-3)
    for i, (one, image) in enumerate(zip(detections, IMAGES, strict=True)):
        mine = (found.image_index == i).nonzero()[:, 0]
        height, width = image.shape[-2:]
        drawn = masks[mine].sigmoid()[:, : -(-(height - 2) // 4), : -(-(width - 2) // 4)]
        # torchvision pastes at whole pixels, from boxes that it has rounded.
        difference = (drawn - one["masks"][:, 0, 2::4, 2::4]).abs()
        assert difference.median() < 0.02


def test_masks_may_be_asked_for_in_any_order(small: MaskRCNNProvider) -> None:
    small.eval()
    with torch.no_grad():
        found = small.forward_teacher(IMAGES)
        all_masks = found.own_masks(torch.arange(len(found.boxes)))
        index = torch.randperm(len(found.boxes), generator=torch.Generator().manual_seed(0))[:7]
        assert_close(found.own_masks(index), all_masks[index], rtol=1e-4, atol=1e-5)
        assert found.own_masks(index[:0]).shape == (0, 24, 24)


def labelled(provider: MaskRCNNProvider) -> MaskRCNNProvider:
    """The same, with a mask head that draws every class's own number, torchvision's, on all of its map."""
    last = provider.model.roi_heads.mask_predictor.mask_fcn_logits
    nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(len(last.bias)).float()
    return provider


@pytest.mark.parametrize("size", [64, 190])
def test_the_teacher_draws_in_the_box_and_for_the_class_that_it_is_told(size: int) -> None:
    provider = labelled(
        MaskRCNNProvider(
            torchvision_model(min_size=size, max_size=1000, box_score_thresh=0.0, box_detections_per_img=20)
        ).eval()
    )
    boxes = torch.tensor([[8.0, 8.0, 60.0, 48.0], [4.0, 12.0, 36.0, 80.0]])
    with torch.no_grad():
        found = provider.forward_teacher(IMAGES)
        of_each_image = torch.stack([(found.image_index == i).nonzero()[0, 0] for i in (1, 0)])
        masks = found.decode_masks(of_each_image, boxes, torch.tensor([2, 0]))
    expected = torch.full((2, 24, 24), OUTSIDE)
    expected[0, 2:12, 2:15] = 3.0
    expected[1, 3:20, 1:9] = 1.0
    assert_close(masks, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 190])
def test_samples_draw_in_the_class_of_their_target_and_as_far_as_its_box(size: int) -> None:
    """Whatever the internal scale, and though a box without area goes before."""
    torch.manual_seed(0)
    provider = labelled(MaskRCNNProvider(torchvision_model(min_size=size, max_size=1000)).train())
    boxes = torch.tensor([(20, 20, 20, 50), (8, 8, 60, 48), (32, 4, 88, 32), (4, 12, 36, 80)]).float()
    targets = [
        {"boxes": boxes[:3], "labels": torch.tensor([1, 2, 0])},
        {"boxes": boxes[3:], "labels": torch.tensor([1])},
    ]
    (masks,) = provider.forward_student(IMAGES, targets).masks
    number = torch.tensor([2, 3, 1, 2])[masks.target_index].float()[:, None, None]  # of the class
    drawn = masks.logits > OUTSIDE
    assert_close(masks.logits[drawn], number.expand_as(drawn)[drawn], rtol=0, atol=1e-4)
    inside = box_masks(boxes[masks.target_index] - 0.01, torch.arange(2, 96, 4), torch.arange(2, 96, 4))
    assert drawn[inside].all()
    beyond = (drawn & ~inside).flatten(1).sum(1)
    # torchvision takes the ground truth for a proposal too, and it comes first.
    assert [int(beyond[masks.target_index == t].min()) for t in (1, 2, 3)] == [0, 0, 0]
    assert masks.target_index.unique().tolist() == [1, 2, 3]


@torch.no_grad()
def test_half_precision_does_not_round_boxes() -> None:
    torch.manual_seed(0)
    provider = build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=512).eval()
    provider.model.roi_heads.score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        boxes = provider.forward_teacher(seeded_images((64, 512))).boxes
    right = boxes[boxes[:, 2] < 511.9][:, 2]
    assert (right > 256).any()
    # Between 256 and 512 bfloat16 has every other pixel alone.
    assert ((right - right.round()).abs() > 0.01).any()


def test_a_disc_is_learnt_from_its_box() -> None:
    torch.manual_seed(0)
    student = build_mask_rcnn(1, backbone="resnet18", weights="none", image_size=96)
    assert_learns_a_disc(student, steps=60, warmup_steps=20, lr=1e-3)


def test_gradients_reach_every_trainable_parameter(small: MaskRCNNProvider) -> None:
    model = BoxSupervised(small).train()
    model.zero_grad()
    torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
    trained = dict(small.named_parameters())
    assert [name for name, p in trained.items() if p.requires_grad and p.grad is None] == []


def test_samples_are_shared_evenly_and_no_target_goes_without() -> None:
    torch.manual_seed(0)
    provider = build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=96).train()
    provider.max_samples = 2
    (masks,) = provider.forward_student(IMAGES, TARGETS).masks
    assert sorted(masks.target_index.tolist()) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "boxes", [[], [(20, 20, 20, 50)], [(-30, -30, -5, -5)], [(200, 200, 260, 260)], [(0, 0, 0.0001, 90)]]
)
def test_boxes_that_teach_nothing(small: MaskRCNNProvider, boxes: list[tuple[float, ...]]) -> None:
    for supervision in (BoxTeacher, BoxSupervised):
        losses = supervision(small).train()(IMAGES, [target(*boxes), target(*boxes)])
        assert all(torch.isfinite(loss) for loss in losses.values())
        mixed = supervision(small).train()(IMAGES, [target(*boxes, (8, 8, 60, 50)), TARGETS[1]])
        assert all(torch.isfinite(loss) for loss in mixed.values())


def test_drawn_masks(small: MaskRCNNProvider) -> None:
    drawn = [
        {
            **TARGETS[0],
            "masks": torch.stack([filled((8, 8, 60, 50), 67, 95), filled((30, 4, 90, 30), 67, 95)]),
        },
        {**TARGETS[1], "masks": filled((4, 10, 36, 80), 96, 41)[None]},
    ]
    losses = []
    for logit in (20.0, -20.0):
        model = labelled(copy.deepcopy(small))
        nn.init.constant_(model.model.roi_heads.mask_predictor.mask_fcn_logits.bias, logit)
        losses.append(float(MaskSupervised(model).train()(IMAGES, drawn)["loss_mask"].detach()))
    # The drawn masks fill their boxes; what proposals reach beyond those is all that they differ by.
    assert losses[0] < 0.35
    assert losses[1] > 0.99


def test_an_image_smaller_than_the_coarsest_stride(small: MaskRCNNProvider) -> None:
    images = seeded_images((9, 17), (20, 30))
    losses = BoxTeacher(small).train()(images, [target((2, 2, 12, 8))] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert BoxTeacher(small).eval()(images)[0]["masks"].shape[-2:] == (9, 17)


def test_a_box_predictor_that_does_not_tell_the_classes() -> None:
    given = torchvision_model()
    given.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(InputError, match="box predictor of this MaskRCNN is a Identity without `cls_score`"):
        BoxTeacher(given)


def test_labels_out_of_range(small: MaskRCNNProvider) -> None:
    with pytest.raises(InputError, match="labels reach from 3 to 3: with 3 classes"):
        BoxSupervised(small).train()(IMAGES[:1], [target((8, 8, 60, 50), labels=torch.tensor([3]))])


def test_training_without_supervision_says_so(small: MaskRCNNProvider) -> None:
    with pytest.raises(InputError, match="wrap it"):
        small.train()(IMAGES)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50_caffe"])
def test_the_backbone_gets_images_as_its_weights_want_them(backbone):
    model = build_mask_rcnn(2, backbone=backbone, weights="none", image_size=128).model
    image = torch.rand(3, 64, 96)
    batch, _ = model.transform([image])
    assert_close(batch.tensors[0], model.backbone.body.normalize(image))
