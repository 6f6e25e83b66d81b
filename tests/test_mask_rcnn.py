"""torchvision's Mask R-CNN, taught as its user built it."""

from typing import Any

import pytest
import torch
import torchvision
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised
from boxteacher_adapters.mask_rcnn import MaskRCNNProvider, build_mask_rcnn
from boxteacher_adapters.parts.pasting import OUTSIDE, paste_on_grid
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
    exported = model.export()
    assert type(exported) is type(given)
    for key, value in exported.state_dict().items():
        assert torch.equal(value, before[key])


def test_detections_are_torchvisions_with_labels_from_0() -> None:
    given = torchvision_model(min_size=96, max_size=128, box_score_thresh=0.0).eval()
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
    provider = MaskRCNNProvider(torchvision_model(min_size=size, max_size=1000, box_score_thresh=0.0)).eval()
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
    losses = MaskSupervised(small).train()(IMAGES, drawn)
    assert 0 < losses["loss_mask"] < 1


def test_an_image_smaller_than_the_coarsest_stride(small: MaskRCNNProvider) -> None:
    images = seeded_images((9, 17), (20, 30))
    losses = BoxTeacher(small).train()(images, [target((2, 2, 12, 8))] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert BoxTeacher(small).eval()(images)[0]["masks"].shape[-2:] == (9, 17)


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
