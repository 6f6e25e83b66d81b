"""torchvision's Mask R-CNN, taught as its user built it."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from boxteacher import BoxTeacher, InputError, MaskSupervised
from boxteacher.grid import MaskGrid
from boxteacher.targets import box_masks
from boxteacher_adapters.mask_rcnn import OUTSIDE, MaskRCNNProvider, build_mask_rcnn, paste_on_grid
from tests.disc_support import assert_learns_a_disc
from tests.support import filled, seeded_images, target


def torchvision_model(min_size: int = 96) -> MaskRCNN:
    """A network that finds much, and resizes images to that shortest side."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return MaskRCNN(
        body,
        num_classes=4,
        min_size=min_size,
        max_size=1000,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_score_thresh=0.0,
        box_detections_per_img=20,
    )


@pytest.fixture(scope="module", params=[64, 190])
def resizing(request: pytest.FixtureRequest) -> MaskRCNNProvider:
    """In evaluation mode, a network that makes images smaller or larger."""
    return MaskRCNNProvider(torchvision_model(request.param)).eval()


@pytest.fixture(scope="module")
def small() -> MaskRCNNProvider:
    torch.manual_seed(0)
    return build_mask_rcnn(3, backbone="resnet18", weights="none", image_size=96)


IMAGES = seeded_images((67, 95), (96, 41))
TARGETS = [
    target((8, 8, 60, 50), (30, 4, 90, 30), labels=torch.tensor([0, 2])),
    target((4, 10, 36, 80), labels=torch.tensor([1])),
]


def test_a_pasted_linear_map_is_reproduced_at_the_center_of_every_pixel() -> None:
    boxes = torch.tensor([[6.0, 2.0, 62.0, 30.0]])
    ramp = torch.arange(28).float()
    logits = (2 * ramp[:, None] + ramp)[None]  # (1, 28, 28)
    pasted = paste_on_grid(logits, boxes, boxes, MaskGrid(4, 16, 24))
    for row, column in ((1, 2), (4, 7), (6, 13)):
        y, x = 4 * row + 2.5, 4 * column + 2.5
        expected = 2 * ((y - 2) / 28 * 28 - 0.5) + (x - 6) / 56 * 28 - 0.5
        assert_close(pasted[0, row, column], torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_cells_whose_pixel_lies_outside_the_pasted_box_are_background() -> None:
    boxes = torch.tensor([[8.0, 4.0, 24.0, 20.0]])
    pasted = paste_on_grid(torch.ones(1, 28, 28), boxes, boxes, MaskGrid(4, 8, 10))
    expected = torch.full((8, 10), OUTSIDE)
    expected[1:5, 2:6] = 1.0
    assert_close(pasted[0], expected, rtol=0, atol=1e-5)


def test_the_outermost_pasted_values_are_repeated_to_the_end_of_the_reach() -> None:
    boxes, reach = torch.tensor([[8.0, 4.0, 24.0, 20.0]]), torch.tensor([[8.0, 4.0, 32.0, 24.0]])
    ramp = torch.arange(4.0).expand(1, 4, 4)  # rises to the right
    pasted = paste_on_grid(ramp, boxes, reach, MaskGrid(4, 8, 10))
    expected = torch.full((8, 10), OUTSIDE)
    expected[1:6, 2:8] = torch.tensor([0.125, 1.125, 2.125, 3.0, 3.0, 3.0])
    assert_close(pasted[0], expected, rtol=0, atol=1e-5)


def test_gradients_of_pasting() -> None:
    boxes = torch.tensor([[1.0, 2.0, 14.0, 9.0], [3.0, 3.0, 3.0, 3.0]]).double()
    logits = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(paste_on_grid(logits, boxes, boxes, MaskGrid(4, 4, 4)).sum(), logits)
    assert gradient[0].sum() == pytest.approx(6, abs=1e-5)  # a unit from each of 3 × 2 cells inside
    assert not gradient[1].any()


def test_a_model_as_torchvision_builds_it_is_taught_and_comes_back() -> None:
    given = torchvision_model()
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
    given = torchvision_model().eval()
    with torch.no_grad():
        expected, actual = given(IMAGES), BoxTeacher(given).eval()(IMAGES)
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(theirs["labels"])
        assert torch.equal(ours["labels"], theirs["labels"] - 1)
        for key in ("boxes", "scores", "masks"):
            assert torch.equal(ours[key], theirs[key])


def test_the_internal_resize_is_mapped_back(resizing: MaskRCNNProvider) -> None:
    """Candidates' boxes and masks are those of the images as they were given."""
    with torch.no_grad():
        found = resizing.forward_teacher(IMAGES)
        detections = resizing(IMAGES)
        masks = found.own_masks(torch.arange(len(found.boxes)))
    assert masks.shape[1:] == (24, 24)
    assert_close(found.boxes, torch.cat([one["boxes"] for one in detections]), rtol=1e-5, atol=1e-3)
    for i, (one, image) in enumerate(zip(detections, IMAGES, strict=True)):
        mine = (found.image_index == i).nonzero()[:, 0]
        height, width = image.shape[-2:]
        decoded = masks[mine].sigmoid()[:, : -(-(height - 2) // 4), : -(-(width - 2) // 4)]
        # torchvision pastes at whole pixels, from boxes that it has rounded.
        difference = (decoded - one["masks"][:, 0, 2::4, 2::4]).abs()
        assert difference.median() < 0.02


def labeled(provider: MaskRCNNProvider) -> MaskRCNNProvider:
    """A copy whose mask logits are everywhere the class's number, torchvision's."""
    provider = copy.deepcopy(provider)
    last = provider.model.roi_heads.mask_predictor.mask_fcn_logits
    nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(len(last.bias)).float()
    return provider


def test_the_teacher_decodes_in_the_given_box_and_for_the_given_class(
    resizing: MaskRCNNProvider,
) -> None:
    provider = labeled(resizing)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 48.0], [4.0, 12.0, 36.0, 80.0]])
    with torch.no_grad():
        found = provider.forward_teacher(IMAGES)
        of_each_image = torch.stack([(found.image_index == i).nonzero()[0, 0] for i in (1, 0)])
        masks = found.decode_masks(of_each_image, boxes, torch.tensor([2, 0]))
    expected = torch.full((2, 24, 24), OUTSIDE)
    expected[0, 2:12, 2:15] = 3.0
    expected[1, 3:20, 1:9] = 1.0
    assert_close(masks, expected, rtol=0, atol=1e-4)


def test_samples_predict_the_class_of_their_target_as_far_as_its_box(resizing: MaskRCNNProvider) -> None:
    """Whatever the internal scale, and though a box without area goes before."""
    torch.manual_seed(0)
    provider = labeled(resizing).train()
    boxes = torch.tensor([(20, 20, 20, 50), (8, 8, 60, 48), (32, 4, 88, 32), (4, 12, 36, 80)]).float()
    targets = [
        {"boxes": boxes[:3], "labels": torch.tensor([1, 2, 0])},
        {"boxes": boxes[3:], "labels": torch.tensor([1])},
    ]
    (masks,) = provider.forward_student(IMAGES, targets).masks
    number = torch.tensor([2, 3, 1, 2])[masks.target_index].float()[:, None, None]  # of the class
    reached = masks.logits > OUTSIDE
    assert_close(masks.logits[reached], number.expand_as(reached)[reached], rtol=0, atol=1e-4)
    inside = box_masks(boxes[masks.target_index] - 0.01, torch.arange(2, 96, 4), torch.arange(2, 96, 4))
    assert reached[inside].all()
    beyond = (reached & ~inside).flatten(1).sum(1)
    # torchvision takes the ground truth for a proposal too, and it comes first.
    assert [int(beyond[masks.target_index == t].min()) for t in (1, 2, 3)] == [0, 0, 0]
    assert masks.target_index.unique().tolist() == [1, 2, 3]


@torch.no_grad()
def test_half_precision_does_not_round_boxes(small: MaskRCNNProvider) -> None:
    provider = copy.deepcopy(small).eval()
    provider.model.roi_heads.score_thresh = 0.0
    provider.model.rpn._post_nms_top_n["testing"] = 50
    with torch.autocast("cpu", torch.bfloat16):
        boxes = provider.forward_teacher(seeded_images((32, 384))).boxes
    right = boxes[boxes[:, 2] < 383.9][:, 2]
    assert (right > 256).any()
    # Between 256 and 512 bfloat16 has every other pixel alone.
    assert ((right - right.round()).abs() > 0.01).any()


@pytest.mark.slow
def test_a_disc_is_learned_from_its_box() -> None:
    torch.manual_seed(0)
    student = build_mask_rcnn(1, backbone="resnet18", weights="none", image_size=96)
    assert_learns_a_disc(student, steps=60, warmup_steps=20, lr=1e-3)


def test_samples_are_shared_evenly_and_no_target_goes_without(small: MaskRCNNProvider) -> None:
    torch.manual_seed(0)
    provider = copy.deepcopy(small).train()
    provider.max_samples = 2
    (masks,) = provider.forward_student(IMAGES, TARGETS).masks
    assert sorted(masks.target_index.tolist()) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "boxes", [[], [(20, 20, 20, 50)], [(-30, -30, -5, -5)], [(200, 200, 260, 260)], [(0, 0, 0.0001, 90)]]
)
def test_boxes_that_teach_nothing(small: MaskRCNNProvider, boxes: list[tuple[float, ...]]) -> None:
    """The wrappers refuse the first ones, but the provider takes them, clips and ignores them."""
    provider = copy.deepcopy(small).train()
    for targets in ([target(*boxes), target(*boxes)], [target(*boxes, (8, 8, 60, 50)), TARGETS[1]]):
        output = provider.forward_student(IMAGES, targets)
        assert all(torch.isfinite(loss) for loss in output.losses.values())
        assert all(torch.isfinite(masks.logits).all() for masks in output.masks)


def test_annotated_masks(small: MaskRCNNProvider) -> None:
    annotated = [
        {
            **TARGETS[0],
            "masks": torch.stack([filled((8, 8, 60, 50), 67, 95), filled((30, 4, 90, 30), 67, 95)]),
        },
        {**TARGETS[1], "masks": filled((4, 10, 36, 80), 96, 41)[None]},
    ]
    losses = []
    for logit in (20.0, -20.0):
        model = labeled(small)
        nn.init.constant_(model.model.roi_heads.mask_predictor.mask_fcn_logits.bias, logit)
        losses.append(float(MaskSupervised(model).train()(IMAGES, annotated)["loss_mask"].detach()))
    # The annotated masks fill their boxes; they differ only where proposals reach beyond.
    assert losses[0] < 0.35
    assert losses[1] > 0.99


def test_a_box_predictor_that_does_not_tell_the_classes() -> None:
    given = torchvision_model()
    given.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(InputError, match="box predictor of this MaskRCNN is a Identity without `cls_score`"):
        BoxTeacher(given)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50_caffe"])
def test_the_backbone_gets_images_in_its_weights_preprocessing(backbone: str) -> None:
    model = build_mask_rcnn(2, backbone=backbone, weights="none", image_size=128).model
    image = torch.rand(3, 64, 96)
    batch, _ = model.transform([image])
    assert_close(batch.tensors[0], model.backbone.body.normalize(image))
