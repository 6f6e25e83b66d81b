"""A training step synchronizes with the device only where a number must be known."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from boxteacher import (
    BoxSupervised,
    BoxTeacher,
    Candidates,
    InputError,
    MaskPredictions,
    MaskSupervised,
    StudentOutput,
)
from boxteacher.assignment import assign_greedily, match_quality
from tests.simulated_device import DeviceTensor, SimulatedDevice
from tests.support import seeded_images, target
from tests.teaching_support import box_teacher

BOXES = ((4, 4, 40, 40), (20, 8, 60, 30), (0, 30, 30, 62))


class OnDevice(nn.Module):
    """A segmenter that returns given tensors and never synchronizes."""

    mask_stride = 4
    size_divisor = 16

    def __init__(self, candidates: dict[str, Tensor], logits: Tensor, target_index: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = (candidates, logits, target_index)

    def __deepcopy__(self, memo: object) -> "OnDevice":
        return OnDevice(*self.outputs)

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        candidates, logits, _ = self.outputs
        return Candidates(**candidates, decode_masks=lambda index, *_: logits.detach()[index])

    def forward_student(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> StudentOutput:
        _, logits, target_index = self.outputs
        return StudentOutput({}, [MaskPredictions(logits, target_index)])


def step(to_device, **settings) -> tuple[BoxTeacher, list[Tensor], list[dict[str, Tensor]], Tensor]:
    """A model, a batch of two images and five boxes, and the student's mask logits."""
    generator = torch.Generator().manual_seed(0)
    candidates = {
        "boxes": torch.tensor([*BOXES, *BOXES[:2], (0, 0, 9, 9)], dtype=torch.float32),
        "scores": torch.rand(6, generator=generator),
        "labels": torch.zeros(6, dtype=torch.int64),
        "image_index": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    logits = to_device(torch.randn(6, 16, 16, generator=generator)).requires_grad_()
    index = to_device(torch.tensor([0, 1, 2, 3, 4, 4]))
    model = box_teacher(
        OnDevice({name: to_device(value) for name, value in candidates.items()}, logits, index), **settings
    )
    images = [to_device(image) for image in seeded_images((64, 64), (50, 61))]
    masks = torch.rand(2, 50, 61, generator=generator) < 0.5
    targets = [target(*BOXES), target(*BOXES[:2], masks=masks, has_mask=torch.tensor([True, False]))]
    targets = [{name: to_device(value) for name, value in each.items()} for each in targets]
    return model.train(), images, targets, logits


@pytest.mark.parametrize("settings", [{}, {"quality_at": "image"}, {"image_size": (50, 64)}])
def test_a_step_synchronizes_only_for_the_number_of_masks_and_the_sizes_of_boxes(settings):
    with SimulatedDevice() as device:
        model, images, targets, logits = step(DeviceTensor, **settings)
        torch.manual_seed(1)
        losses = model(images, targets)
        sum(losses.values()).backward()
    assert device.synchronizations == {("pseudo_masks.py", "nonzero"): 1, ("packing.py", "_to_copy"): 1}
    # The losses and gradients are those of the CPU, so the simulation ran the whole step.
    model, images, targets, expected = step(torch.clone, **settings)
    torch.manual_seed(1)
    on_cpu = model(images, targets)
    sum(on_cpu.values()).backward()
    for name, loss in losses.items():
        assert loss.values > 0
        torch.testing.assert_close(loss.values, on_cpu[name])
    torch.testing.assert_close(logits.grad.values, expected.grad)


@pytest.mark.parametrize("wrapper", [BoxTeacher, BoxSupervised, MaskSupervised])
def test_a_box_that_cannot_be_meant_is_found_in_its_step_without_another_synchronization(wrapper):
    with SimulatedDevice() as device:
        model, images, targets, _ = step(DeviceTensor)
        model = model if wrapper is BoxTeacher else wrapper(model.student).train()
        model(images, targets)
        usual = device.synchronizations.copy()
        targets[1]["boxes"] = DeviceTensor(torch.tensor([BOXES[0], (60.0, 2.0, 9.0, 9.0)]))
        with pytest.raises(InputError, match=r"target 1: box 1, \[60, 2, 9, 9\] .* no width"):
            model(images, targets)
    assert device.synchronizations - usual == usual


def test_assignment_does_not_synchronize():
    generator = torch.Generator().manual_seed(0)
    iou, score = torch.rand(30, 12, generator=generator), torch.rand(30, generator=generator)
    boxes = torch.rand(4, 4, generator=generator)
    index = torch.zeros(4, dtype=torch.int64)
    with SimulatedDevice() as device:
        chosen = assign_greedily(DeviceTensor(iou), DeviceTensor(score))
        match_quality(*map(DeviceTensor, (boxes, index, boxes, index)), 0.5)
    assert not device.synchronizations
    assert torch.equal(chosen.values, assign_greedily(iou, score))


SYNCHRONIZING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy to the device": lambda x: x.copy_(torch.ones(3)),
    "copy from the device": lambda x: torch.ones(3).copy_(x),
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: torch.bincount(x.long()),
}
ASYNCHRONOUS = {
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "arange": lambda x: torch.arange(3, device=x.device) + x,
    "index": lambda x: x[x.long()],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long(), output_size=3),
    "to": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "numbers of the CPU": lambda x: torch.ones(3).sum().item(),
}


@pytest.mark.parametrize("name", SYNCHRONIZING)
def test_the_simulated_device_counts_each_kind_of_synchronization(name):
    with SimulatedDevice() as device:
        SYNCHRONIZING[name](DeviceTensor(torch.tensor([0.0, 1.0, 2.0])))
    assert device.synchronizations.total() == 1


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_the_simulated_device_counts_nothing_else(name):
    with SimulatedDevice() as device:
        ASYNCHRONOUS[name](DeviceTensor(torch.tensor([0.0, 1.0, 2.0])))
    assert not device.synchronizations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reports_the_same_number_of_synchronizations():
    model, images, targets, _ = step(lambda tensor: tensor.detach().cuda())
    sum(model(images, targets).values()).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sum(model(images, targets).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 2
