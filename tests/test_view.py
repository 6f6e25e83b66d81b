"""The teacher's images at another scale, with boxes and masks mapped back; quality on grid or image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxTeacher, InputError
from boxteacher.grid import upsample_aligned
from boxteacher.scoring import mask_confidence, mask_quality
from boxteacher.view import TeacherView
from tests.support import ScriptedSegmenter, filled, script, seeded_images, target
from tests.teaching_support import box_teacher

BOX = (8, 8, 40, 40)


def teacher_of(student: nn.Module, **settings: object) -> BoxTeacher:
    return box_teacher(student, augmentation=nn.Identity(), **settings).train()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((48, 1000), (48, 64)), ((96, 1000), (96, 128)), ((96, 100), (75, 100)), ((31, 50), (31, 41))],
)
def test_the_shortest_side_is_as_given_unless_the_longest_would_exceed_its_maximum(size, expected):
    (image,) = TeacherView(seeded_images((48, 64)), size).images
    assert tuple(image.shape) == (3, *expected)


def test_masks_of_another_scale_equal_interpolated_ones():
    """Each mask is enlarged to its teacher's image, cut to it, and resized to the student's image."""
    sizes = [(40, 60), (64, 48)]
    view = TeacherView(seeded_images(*sizes), (32, 45))
    torch.manual_seed(0)
    grid = view.mask_grid(4, 16).shape
    masks, index = torch.rand(5, *grid), torch.tensor([0, 1, 1, 0, 1])
    found = view.masks_at_pixels(masks, index, 4, (64, 64))
    for mask, i, ours in zip(masks, index.tolist(), found, strict=True):
        height, width = view.images[i].shape[-2:]
        pixels = upsample_aligned(mask[None, None], 4)[..., :height, :width]
        expected = F.interpolate(pixels, sizes[i], mode="bilinear", align_corners=False)[0, 0]
        assert_close(ours[: sizes[i][0], : sizes[i][1]], expected, rtol=0, atol=1e-5)
        assert ours[sizes[i][0] :].abs().max() == 0 if sizes[i][0] < 64 else True
        assert ours[:, sizes[i][1] :].abs().max() == 0


@pytest.mark.parametrize("size", [(48, 80), (50, 97), (62, 106)])
def test_masks_of_an_image_that_keeps_its_size_are_mapped_back_exactly(size):
    """The second image is resized; the first is not, and its probabilities stay the same to the last bit."""
    view = TeacherView([torch.rand(3, *size), torch.rand(3, 30, 40)], size)
    assert view.images[0].shape[-2:] == size != view.images[1].shape[-2:]
    torch.manual_seed(0)
    masks = torch.rand(4, *view.mask_grid(4, 32).shape)
    found = view.masks_at_pixels(masks, torch.tensor([0, 1, 0, 0]), 4, (64, 128))
    expected = upsample_aligned(masks[:, None], 4)[[0, 2, 3], 0, : size[0], : size[1]]
    assert torch.equal(found[[0, 2, 3], : size[0], : size[1]], expected)


def test_boxes_of_another_scale_are_mapped_back():
    view = TeacherView(seeded_images((40, 60), (64, 48)), (80, 1000))
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]]).repeat(2, 1)
    back = view.boxes_of_images(boxes, torch.tensor([0, 1]))
    assert_close(back, torch.stack([boxes[0] / 2, boxes[0] * 48 / 80]), rtol=1e-2, atol=0)


def blob() -> Tensor:
    """Logits (1, 12, 16) of a mask with a soft edge."""
    return filled((3, 3, 9, 9), 12, 16).float()[None] * 4 - torch.linspace(0.5, 3, 16)


def test_quality_is_measured_on_the_grid_or_on_the_image():
    images = seeded_images((48, 64))
    pixels = {"grid": blob().sigmoid(), "image": upsample_aligned(blob().sigmoid()[None], 4)[0]}
    for place, masks in pixels.items():
        model = teacher_of(ScriptedSegmenter(script((0, BOX, 0.8), logits=blob())), quality_at=place)
        model(images, [target(BOX)])
        expected = mask_confidence(torch.tensor([0.8]), mask_quality(masks))
        assert_close(model.last_pseudo_masks.confidence, expected)


def test_padding_does_not_count_in_the_quality_at_pixels():
    """A second, larger image enlarges the padded batch; the first image's confidence does not change."""
    plan = script((0, BOX, 0.8), level=1.5)
    confidences = []
    for images in (seeded_images((48, 64)), seeded_images((48, 64), (80, 96))):
        model = teacher_of(ScriptedSegmenter(plan), quality_at="image")
        model(images, [target(BOX)] + [target()] * (len(images) - 1))
        confidences.append(model.last_pseudo_masks.confidence[0])
    assert_close(*confidences)


@pytest.mark.parametrize("place", ["grid", "image"])
def test_a_teacher_at_twice_the_size_gives_the_same_mask(place):
    """Candidates in the larger image's pixels are assigned to the same boxes, with the same mask cells."""
    large = filled((6, 6, 18, 18), 24, 32).float()[None] * 10 - 5
    plan = script((0, [2 * side for side in BOX], 0.8), logits=large)
    model = teacher_of(ScriptedSegmenter(plan), image_size=(96, 1000), quality_at=place)
    model(seeded_images((48, 64)), [target(BOX)])
    assert model.last_pseudo_masks.confidence > 0.8
    mask, expected = model.last_pseudo_masks.masks[0], filled((3, 3, 9, 9), 12, 16)
    assert (mask ^ expected).sum() <= 2 * (6 + 6)  # half a cell along two sides
    assert mask[4:8, 4:8].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality_at": "pixel"}, "quality_at is 'pixel': take one of 'grid', 'image'"),
        ({"image_size": (0, 100)}, "image_size is 0"),
        ({"image_size": 96}, "image_size is 96: give the shortest and the longest"),
        ({"image_size": (96,)}, r"image_size is \(96,\): give the shortest and the longest"),
        ({"image_size": (96.5, 160)}, "image_size is 96.5: give a whole number"),
        ({"image_size": (160, 96)}, "give the shortest side first"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        teacher_of(ScriptedSegmenter(), **settings)
