"""Images and targets as users give them: what is cast, what a network receives, and what is refused."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher, InputError, MaskSupervised
from boxteacher.grid import mask_grid
from boxteacher.inputs import cast_batch, cast_images
from boxteacher.value_checks import ValueChecks
from tests.simulated_device import DeviceTensor, SimulatedDevice
from tests.support import ScriptedSegmenter, seeded_images, target
from tests.teaching_support import IMAGES, PLAN, TARGETS, numbers, teacher_of

BYTES = torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGE = BYTES / 255
BOXES = torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 10.0, 60.0, 44.0]])
MASKS = torch.rand(2, 48, 64, generator=torch.Generator().manual_seed(1)) < 0.5


def batch(images: Any, targets: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    return cast_batch(images, targets, ScriptedSegmenter(), ValueChecks())


def array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "given",
    [
        BYTES,
        IMAGE.double(),
        tv_tensors.Image(BYTES),
        array(BYTES),
        array(IMAGE.double()),
        array(BYTES)[..., ::-1].copy()[..., ::-1],  # as cv2's BGR is turned, with a negative stride
        IMAGE.numpy(),
        Image.fromarray(array(BYTES)),
        Image.fromarray(np.dstack([array(BYTES), array(BYTES)[..., 0]])),  # with alpha
    ],
    ids=lambda given: type(given).__name__,
)
def test_an_image_of_any_kind_is_the_same_tensor(given: Any):
    (image,) = cast_images([given], ScriptedSegmenter(), ValueChecks())
    assert type(image) is Tensor
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, IMAGE, rtol=0, atol=1e-7)


def test_a_gray_picture_becomes_rgb():
    gray = array(BYTES)[..., 0]
    (image,) = cast_images([Image.fromarray(gray)], ScriptedSegmenter(), ValueChecks())
    assert all(torch.equal(channel, IMAGE[0]) for channel in image)


def test_images_have_the_type_of_the_network_s_weights():
    for dtype in (torch.bfloat16, torch.float64):
        (image,) = cast_images([IMAGE], ScriptedSegmenter().to(dtype), ValueChecks())
        assert image.dtype == dtype


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["a.jpg"], "image 0 is a str: give a tensor"),
        ([[[0.0, 1.0]]], "image 0 is a list"),
        ([Image.new("I;16", (8, 8))], "mode 'I;16', whose range is unknown"),
        ([Image.new("F", (8, 8))], "mode 'F', whose range is unknown"),
        ([np.zeros((3, 8, 3))], r"image 0 is an array \(3, 8, 3\), whose channels may come first or last"),
        ([np.zeros((8, 8))], r"image 0 has shape \(8, 8\)"),
        ([np.array(["a"])], "image 0 cannot be read as a tensor"),
        ([IMAGE, IMAGE * 255], "image 1 has values from 0 to 255"),
        (Image.new("RGB", (8, 8)), "images is a Image: give a list"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(images: Any, message: str):
    with pytest.raises(InputError, match=message) as caught:
        cast_images(images, ScriptedSegmenter(), ValueChecks())
    assert "\n" not in str(caught.value)


def bounding_boxes(kind: str) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        box_convert(BOXES, "xyxy", kind.lower()), format=kind, canvas_size=(48, 64)
    )


@pytest.mark.parametrize(
    "boxes",
    [
        BOXES.double(),
        BOXES.long(),
        BOXES.numpy().astype(np.float64),
        BOXES.tolist(),
        [tuple(box) for box in BOXES.int().tolist()],
        list(BOXES),
        list(BOXES.numpy()),
        *map(bounding_boxes, ("XYXY", "XYWH", "CXCYWH")),
    ],
    ids=lambda boxes: type(boxes).__name__,
)
def test_boxes_of_any_kind_are_the_same_tensor(boxes: Any):
    _, (found,) = batch([IMAGE], [{"boxes": boxes, "labels": [0, 1]}])
    assert type(found["boxes"]) is Tensor
    assert torch.equal(found["boxes"], BOXES)
    assert found["labels"].dtype == torch.int64


def test_lists_and_arrays_of_all_other_keys_are_cast():
    given = {
        "boxes": BOXES,
        "labels": np.array([0, 2], dtype=np.uint8),
        "masks": list(MASKS.numpy()),
        "has_mask": [True, False],
        "mask_confidence": np.array([1.0, 0.25]),
        "annotation_ids": [7, 8],
        "image_id": 3,
    }
    before = dict(given)
    _, (found,) = batch([IMAGE], [given])
    assert given == before
    assert found["labels"].tolist() == [0, 2]
    assert torch.equal(found["masks"], MASKS)
    assert found["has_mask"].tolist() == [True, False]
    assert found["mask_confidence"].dtype == torch.float32
    assert found["annotation_ids"].tolist() == [7, 8]
    assert found["image_id"] == 3


@pytest.mark.parametrize("masks", [MASKS.double(), MASKS.half(), MASKS.byte() * 255, tv_tensors.Mask(MASKS)])
def test_masks_are_bool_or_float32(masks: Tensor):
    _, (found,) = batch([IMAGE], [{"boxes": BOXES, "labels": [0, 1], "masks": masks}])
    assert type(found["masks"]) is Tensor
    assert found["masks"].dtype == (torch.float32 if masks.is_floating_point() else torch.bool)
    assert torch.equal(found["masks"] > 0.5, MASKS)


@pytest.mark.parametrize("empty", [[], np.zeros((0, 4)), torch.zeros(0), torch.zeros(0, 4).double()])
def test_no_boxes_may_be_given_in_any_form(empty: Any):
    _, (found,) = batch([IMAGE], [{"boxes": empty, "labels": [], "masks": []}])
    assert found["boxes"].shape == (0, 4)
    assert found["labels"].dtype == torch.int64
    assert found["masks"].shape == (0, 48, 64)


@pytest.mark.parametrize("wrapper", [BoxTeacher, BoxSupervised, MaskSupervised])
@pytest.mark.parametrize("convert", [Tensor.tolist, Tensor.numpy, Tensor.double])
def test_a_step_receives_the_same_numbers_in_any_form(wrapper: Any, convert: Callable[[Any], Any]):
    def losses(images: Any, targets: Any) -> dict[str, float]:
        torch.manual_seed(0)
        model = wrapper(ScriptedSegmenter(PLAN)).train()
        torch.manual_seed(1)
        found = numbers(model(images, targets))
        assert all(image.dtype == torch.float32 for image in model.student.student_images[0])
        return found

    targets = [{**each, "boxes": convert(each["boxes"])} for each in TARGETS]
    assert losses([image.double() for image in IMAGES], targets) == losses(IMAGES, TARGETS)


def test_evaluation_and_an_ema_teacher_take_arrays_and_pictures():
    model = teacher_of(PLAN).eval()
    picture = Image.fromarray(array(BYTES))
    for ours, theirs in zip(model([picture]), model([IMAGE]), strict=True):
        torch.testing.assert_close(ours["masks"], theirs["masks"])
    teacher = EMATeacher(ScriptedSegmenter(PLAN))
    grid = mask_grid([IMAGE], 4, 16)
    ours = teacher([picture], [{"boxes": BOXES.tolist(), "labels": [0, 0]}], grid)
    assert torch.equal(ours.masks, teacher([IMAGE], [target(*BOXES.tolist())], grid).masks)
    assert ours.confidence.any()


BAD_BOXES = {
    "x, y, width, height": ([[300, 200, 50, 60]], r"box 0, \[300, 200, 50, 60\] .* no width or height.*xywh"),
    "no width": ([[1, 2, 3, 4], [5, 5, 5, 9]], r"box 1, \[5, 5, 5, 9\] .* no width or height.*Sanitize"),
    "beyond the right edge": ([[700, 2, 800, 40]], r"box 0, \[700, .*640 wide and 480 high, lies outside it"),
    "beyond the bottom": ([[1, 2, 3, 4], [1, 480, 9, 500]], r"box 1, .* lies outside it: give pixels"),
    "left of the image": ([[-9, 2, 0, 40]], r"box 0, \[-9, 2, 0, 40\] .* lies outside it"),
    "NaN": ([[1, 2, float("nan"), 4]], r"box 0, \[1, 2, nan, 4\].* NaN or infinite"),
}


@pytest.mark.parametrize("wrapper", [BoxTeacher, BoxSupervised, MaskSupervised])
@pytest.mark.parametrize("fault", BAD_BOXES)
def test_a_box_that_cannot_be_meant_is_named_with_image_and_remedy(wrapper: Any, fault: str):
    boxes, message = BAD_BOXES[fault]
    images = seeded_images((480, 640), (480, 640))
    named = {**target(*boxes), "file_name": "b.jpg"}
    with pytest.raises(InputError, match=rf"^target 1 \(b\.jpg\): {message}") as caught:
        wrapper(ScriptedSegmenter()).train()(images, [target(), named])
    assert "\n" not in str(caught.value)


def test_a_batch_of_boxes_that_are_shares_of_their_images_is_refused():
    boxes = [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]
    with pytest.raises(InputError, match=r"^target 0: box 0, .* not reach beyond 1: give pixels, not parts"):
        batch([IMAGE, IMAGE], [target(*boxes), target(boxes[0])])


TINY = target((0, 0, 0.7875, 0.7875))
OTHER_TINY = target((0, 0, 0.5, 0.7))


@pytest.mark.parametrize(
    "targets",
    [
        [TINY],
        [TINY, target()],
        [TINY, TINY],  # one image, repeated
        [target((0, 0, 1, 1)), target((0, 0, 1, 1), (0, 0, 1, 1))],
        [{**each, "annotation_ids": [7]} for each in (TINY, OTHER_TINY)],  # of a data set
    ],
)
def test_tiny_boxes_in_the_corner_of_an_image_pass(targets: Any):
    _, found = batch([IMAGE] * len(targets), targets)
    assert torch.equal(found[0]["boxes"], targets[0]["boxes"])


HARDLY_PIXELS = {
    "x, y, width, height": ([[30, 30, 500, 600]], r"box 0, \[30, 30, 500, 600\] .* ends far beyond it"),
    "of a larger image": ([[1, 2, 9, 9], [20, 20, 160, 160], [9, 9, 99, 80]], r"box 1, .* ends far beyond"),
    "shares of one image": ([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], r"box 0, .* not reach beyond 1: if it"),
}


@pytest.mark.parametrize("fault", HARDLY_PIXELS)
def test_boxes_that_are_hardly_pixels_of_their_images_are_warned_of_once(fault: str, caplog, monkeypatch):
    monkeypatch.setattr("boxteacher.value_checks._warned", False)
    boxes, message = HARDLY_PIXELS[fault]
    for _ in range(2):
        batch([IMAGE], [target(*boxes)])
    (record,) = caplog.records
    assert re.match(f"target 0: {message}.*give ", record.getMessage())


def test_boxes_that_end_beyond_their_images_now_and_then_are_not_warned_of(caplog, monkeypatch):
    monkeypatch.setattr("boxteacher.value_checks._warned", False)
    batch([IMAGE], [target((1, 2, 9, 9), (20, 20, 160, 160))])
    batch([IMAGE], [target((1, 2, 90, 70))])
    assert not caplog.records


def test_boxes_at_and_over_the_edges_pass():
    boxes = [[-5, -5, 3, 3], [60, 40, 64, 48], [63.9, 47.9, 90, 90], [0, 0, 64, 48], [0.2, 0.2, 0.4, 0.4]]
    _, (found,) = batch([IMAGE], [target(*boxes)])
    assert len(found["boxes"]) == 5


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([30, 20, 10, 16], r"ignore box 1, \[30, 20, 10, 16\] .* no width or height: give x0, y0, x1, y1"),
        ([1, 2, float("nan"), 4], r"ignore box 1, \[1, 2, nan, 4\] .* NaN or infinite"),
    ],
)
def test_an_ignore_box_that_cannot_be_meant_is_named(box: list[float], message: str):
    regions = [[0, 0, 9, 9], box]
    with pytest.raises(InputError, match=rf"^target 1: {message}"):
        batch([IMAGE, IMAGE], [target(), {**target(), "ignore_boxes": regions}])


def test_an_ignore_box_may_lie_outside_its_image():
    _, (found,) = batch([IMAGE], [{**target(), "ignore_boxes": [[-30, 0, -9, 9]]}])
    assert found["ignore_boxes"].tolist() == [[-30, 0, -9, 9]]


@pytest.mark.parametrize("rows", [48, 100, -1, 2.5, True, "10", None])
def test_ignored_bottom_rows_that_are_not_rows_of_the_image_are_refused(rows: Any):
    message = r"^target 0: ignored_bottom_rows is .*: give a whole number, at least 0 and at most 47$"
    with pytest.raises(InputError, match=message):
        batch([IMAGE], [{**target(), "ignored_bottom_rows": rows}])


def test_ignored_bottom_rows_are_any_whole_number():
    for rows in (0, 47, np.int64(5)):
        _, (found,) = batch([IMAGE], [{**target(), "ignored_bottom_rows": rows}])
        assert found["ignored_bottom_rows"] == rows


def test_a_target_is_named_by_its_image_id():
    with pytest.raises(InputError, match=r"^target 0 \(image_id 42\): box 0"):
        batch([IMAGE], [{**target((5, 5, 5, 5)), "image_id": 42}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": "abc"}, "boxes cannot be read as a tensor"),
        ({"masks": None}, "masks is None: give .* or leave it out"),
        ({"labels": [0]}, r"labels has shape \(1,\): give one label per box, \(2,\)"),
        ({"boxes": [[1, 2, 3]]}, r"boxes has shape \(1, 3\)"),
        ({"boxes": [[1, 2, 3], [1, 2, 3, 4]]}, "boxes cannot be read as a tensor"),
        ({"labels": [0.5, 1.0]}, "labels are torch.float32: give torch.int64"),
        ({"labels": ["cat", "dog"]}, "labels cannot be read as a tensor"),
        ({"masks": MASKS * 255.0}, "a value of masks is 255: give"),
        ({"masks": MASKS * -1.0}, "a value of masks is -1: give"),
        ({"masks": MASKS * float("nan")}, "a value of masks is nan: give"),
    ],
)
def test_what_cannot_be_cast_is_said(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=f"^target 0: {message}") as caught:
        batch([IMAGE], [{"boxes": BOXES, "labels": [0, 1], **changes}])
    assert "\n" not in str(caught.value)


def test_bounding_boxes_of_another_canvas_are_refused():
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(96, 128))
    with pytest.raises(InputError, match=r"canvas of \(96, 128\), .* \(48, 64\) .*both together"):
        batch([IMAGE], [{"boxes": boxes, "labels": [0, 1]}])


@pytest.mark.parametrize("key", ["boxes", "labels"])
def test_a_target_lacks_what_is_none(key: str):
    with pytest.raises(InputError, match=f"target 0 has no '{key}': give 'boxes'"):
        batch([IMAGE], [{**target(*BOXES.tolist()), key: None}])


def test_targets_that_are_no_dicts_are_refused():
    with pytest.raises(InputError, match="target 0 is a Tensor: give a dict"):
        batch([IMAGE], [BOXES])
    with pytest.raises(InputError, match="targets is a dict: give a list"):
        batch([IMAGE], target(*BOXES.tolist()))


@pytest.mark.parametrize("fault", ["boxes", "masks", "image", None])
def test_values_on_another_device_are_checked_without_waiting(fault: str | None):
    given = {**target((4, 4, 30, 30)), "masks": torch.rand(1, 48, 64)}
    image = torch.rand(3, 48, 64)
    if fault == "boxes":
        given["boxes"] = torch.tensor([[30.0, 4.0, 4.0, 30.0]])
    if fault == "masks":
        given["masks"] = given["masks"] * 255
    image = image * 255 if fault == "image" else image
    with SimulatedDevice() as device:
        checks = ValueChecks()
        moved = {key: DeviceTensor(value) for key, value in given.items()}
        cast_batch([DeviceTensor(image)], [moved], ScriptedSegmenter(), checks)
        if fault is None:
            checks.finish()
        else:
            with pytest.raises(InputError, match=fault.removesuffix("es")):
                checks.finish()
    assert not device.synchronizations
