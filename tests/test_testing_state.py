"""The conformance kit: hidden state, shared tensors, refusals and rounding are named with their remedy."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from boxteacher import InputError
from tests.example_support import TinySegmenter
from tests.testing_support import assert_fails


class ModulesInAList(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(24, 24, 1)]


class TensorsInADict(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.gains = {"prototypes": [torch.ones(1)]}

    def features(self, images):
        *others, prototypes = super().features(images)
        return *others, prototypes * self.gains["prototypes"][0]


class TensorOfTheClass(TinySegmenter):
    gain = (torch.ones(1),)


class CountsSteps(TinySegmenter):
    """A warm-up by a plain number, which no checkpoint knows."""

    steps = 0

    def forward_student(self, images, targets):
        self.steps += self.training
        output = super().forward_student(images, targets)
        warmup = min(self.steps, 30) / 30
        return replace(output, losses={name: loss * warmup for name, loss in output.losses.items()})


class ForgottenBuffer(TinySegmenter):
    """A running mean of scores that training changes and checkpoints leave out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(1), persistent=False)

    def features(self, images):
        *others, prototypes = super().features(images)
        if self.training:
            self.level = 0.9 * self.level + 0.2
        return *others, prototypes * self.level


class LateLayer(TinySegmenter):
    def features(self, images):
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(1))
        return super().features(images)


class DropsInEvaluation(TinySegmenter):
    def features(self, images):
        *others, prototypes = super().features(images)
        return *others, nn.functional.dropout(prototypes, 0.2)


class WithoutParameters(nn.Module):
    mask_stride, size_divisor = 4, 32

    def forward_teacher(self, images): ...

    def forward_student(self, images, targets): ...


class StrideInWords(TinySegmenter):
    mask_stride = "4"


class AllMasks(TinySegmenter):
    """Masks of all candidates, whichever were asked for."""

    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        every = torch.arange(len(found.scores))
        return replace(found, decode_masks=lambda index, *wanted: found.decode_masks(every, *wanted))


class RefusesImagesWithoutBoxes(TinySegmenter):
    def forward_student(self, images, targets):
        if any(len(target["boxes"]) == 0 for target in targets):
            raise InputError("an image has no boxes: leave it out")
        return super().forward_student(images, targets)


class RefusesOneImage(TinySegmenter):
    def forward_student(self, images, targets):
        if len(images) == 1:
            raise InputError("a batch of one image is too small: give two")
        return super().forward_student(images, targets)


class RefusesInAWord(TinySegmenter):
    def forward_student(self, images, targets):
        if max(len(target["boxes"]) for target in targets) > 100:
            raise InputError("crowded")
        return super().forward_student(images, targets)


class FailsOnOneCell(TinySegmenter):
    def train(self, mode=True):
        """Keeps batch norms as they are, for whose sake the core would refuse such a batch before."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward_student(self, images, targets):
        if len(images) == 1 and max(images[0].shape[1:]) <= 32:
            raise ValueError("Expected more than 1 value per channel when training")
        return super().forward_student(images, targets)


class MasksOfNothing(TinySegmenter):
    """Whatever is found in tiny images has a mask of NaN."""

    def forward(self, images):
        found = super().forward(images)
        if max(images[0].shape[1:]) < 32:
            for each, image in zip(found, images, strict=True):
                each["boxes"], each["scores"] = torch.zeros(1, 4), torch.zeros(1)
                each["labels"], each["masks"] = torch.zeros(1, dtype=torch.int64), image[None, :1] * torch.nan
        return found


class HalfBoxes(TinySegmenter):
    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        return replace(found, boxes=found.boxes.bfloat16()) if torch.is_autocast_enabled("cpu") else found


class RoundedBoxes(TinySegmenter):
    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        rounded = found.boxes.bfloat16().float()
        return replace(found, boxes=rounded) if torch.is_autocast_enabled("cpu") else found


class NothingInHalf(TinySegmenter):
    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        if not torch.is_autocast_enabled("cpu"):
            return found
        return replace(
            found,
            boxes=found.boxes[:0],
            scores=found.scores[:0],
            labels=found.labels[:0],
            image_index=found.image_index[:0],
        )


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ModulesInAList, r"state_dict: layers\[0\] \(Conv2d\) is in a plain list.*nn.ModuleList"),
        (TensorsInADict, "state_dict: the copy's .*register_buffer"),
        (
            TensorOfTheClass,
            r"deepcopy: gain\[0\] of a copy is the original's own tensor.*keep none in a class",
        ),
        (CountsSteps, "state_dict: the copy's loss_class differ.*numbers in such buffers"),
        (ForgottenBuffer, "state_dict: the copy's masks of candidates differ.*register_buffer"),
        (LateLayer, "the first call made late: make all parameters and buffers in __init__"),
        (DropsInEvaluation, "determinism of forward_teacher: masks of two calls .*dropout"),
        (WithoutParameters, "parts of the protocol: it has no parameters"),
        (StrideInWords, "mask_stride is '4': make it a whole number of pixels"),
        (AllMasks, "on decode_masks: decode_masks of .*the mask of each index"),
        (RefusesImagesWithoutBoxes, "an image without boxes: it refuses sound images.*accept them"),
        (RefusesOneImage, "a batch of one image: it refuses sound images"),
        (RefusesInAWord, "120 boxes: its InputError says 'crowded': say problem and remedy"),
        (
            FailsOnOneCell,
            "one image of 8 × 8 pixels: it raised ValueError .Expected more.*or raise boxteacher.InputError",
        ),
        (MasksOfNothing, "smaller than the coarsest stride: masks of image 0 holds NaN"),
        (HalfBoxes, "candidates' boxes are torch.bfloat16 under autocast, which rounds"),
        (RoundedBoxes, "half precision: .*from the origin are off by .*keep coordinates"),
        (NothingInHalf, "under bfloat16 autocast there are no candidates at all"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_defect_is_named_with_its_remedy(broken, words, monkeypatch):
    assert_fails(broken(), words, monkeypatch)
