"""Invalid settings, batches and outputs: errors of one line."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskPredictions, ProtocolError, StudentOutput
from boxteacher.inputs import cast_batch
from boxteacher.validation import check_labels, check_range
from boxteacher.value_checks import ValueChecks
from tests.support import ScriptedSegmenter, script, seeded_images, target
from tests.teaching_support import box_teacher


def check_batch(images: Any, targets: Any) -> None:
    cast_batch(images, targets, ScriptedSegmenter(), ValueChecks())


def refusal(**changes: Any) -> str:
    given = {**target((0, 0, 8, 8)), **changes}
    with pytest.raises(InputError) as caught:
        check_batch(seeded_images((32, 32)), [given])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_of_the_wrong_dtype_or_shape_are_named() -> None:
    assert "boxes are torch.bfloat16" in refusal(boxes=torch.zeros(1, 4, dtype=torch.bfloat16))
    assert "labels are torch.float32" in refusal(labels=torch.zeros(1))
    assert "labels are torch.bool" in refusal(labels=torch.zeros(1, dtype=torch.bool))
    assert "has_mask" in refusal(has_mask=torch.ones(1, dtype=torch.bool))
    assert "has_mask" in refusal(has_mask=torch.ones(1), masks=torch.zeros(1, 32, 32))
    assert "mask_confidence" in refusal(mask_confidence=torch.ones(1))
    masks = torch.zeros(1, 32, 32)
    assert "a value of masks is 255" in refusal(masks=masks + torch.eye(32) * 255)
    assert "a value of mask_confidence is 1.5" in refusal(mask_confidence=torch.tensor([1.5]), masks=masks)
    assert "one value in [0, 1] per box" in refusal(mask_confidence=torch.ones(2), masks=masks)


def test_a_target_on_another_device_is_named() -> None:
    assert "boxes is on meta" in refusal(boxes=torch.zeros(1, 4, device="meta"))


def test_an_image_of_whole_numbers_other_than_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"image 0 is torch\.int32"):
        check_batch([torch.zeros(3, 8, 8, dtype=torch.int32)], [target((0, 0, 8, 8))])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(InputError, match=f"target 1.*{label}.*0 to 2"):
        check_labels([target((0, 0, 1, 1)), {**target((0, 0, 1, 1)), "labels": torch.tensor([label])}], 3)
    check_labels([{**target((0, 0, 1, 1)), "labels": torch.tensor([2])}], 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_number_out_of_range_is_named_with_its_range(value: float) -> None:
    with pytest.raises(InputError, match=r"momentum is .* at least 0 and at most 1"):
        check_range("momentum", value, minimum=0, maximum=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"confidence": "papre"},
        {"inference": "studnet"},
        {"momentum": 2},
        {"iou_threshold": 0},
        {"score_threshold": -1},
        {"pixel_weight": -1},
        {"affinity_weight": float("nan")},
        {"warmup_steps": -1},
        {"pseudo_warmup_steps": -1},
    ],
)
def test_an_invalid_setting_is_refused_at_construction(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        box_teacher(ScriptedSegmenter(script()), **settings)


class Wrong(ScriptedSegmenter):
    """Returns logits on half the grid, or a loss with a name of the core's."""

    def __init__(self, fault: str) -> None:
        super().__init__(script())
        self.fault = fault

    def forward_student(self, images: list[Tensor], targets: list[Any]) -> StudentOutput:
        output = super().forward_student(images, targets)
        if self.fault == "grid":
            masks = [MaskPredictions(m.logits[:, ::2, ::2], m.target_index) for m in output.masks]
            return StudentOutput(output.losses, masks)
        return StudentOutput({"loss_projection": torch.zeros(())}, output.masks)


@pytest.mark.parametrize(("fault", "named"), [("grid", "gave mask logits"), ("name", "loss_projection")])
def test_wrong_outputs_of_an_adapter_are_refused(fault: str, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        BoxSupervised(Wrong(fault)).train()(seeded_images((32, 32)), [target((0, 0, 30, 30))])


def test_a_divisor_that_the_stride_does_not_divide_is_refused() -> None:
    segmenter = ScriptedSegmenter(script())
    segmenter.size_divisor = segmenter.mask_stride + 1
    with pytest.raises(ProtocolError, match="not a multiple of mask_stride"):
        BoxTeacher(segmenter)


def test_the_error_for_a_plain_module_names_all_missing_methods_and_the_guide() -> None:
    with pytest.raises(TypeError, match=r"forward_teacher\(\).*forward_student\(\).*write_an_adapter"):
        BoxTeacher(nn.Linear(1, 1))


def test_a_batch_in_one_tensor_and_a_box_with_nan_are_refused() -> None:
    with pytest.raises(InputError, match="give a list"):
        check_batch(torch.rand(2, 3, 8, 8), [target((0, 0, 8, 8))] * 2)
    assert "NaN" in refusal(boxes=torch.full((1, 4), float("nan")))
