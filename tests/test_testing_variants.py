"""The conformance kit: what copies forget or share, unusual batches, half precision and compilation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from boxteacher import InputError, ProtocolError
from boxteacher.testing.edge_cases import check_edge_cases
from boxteacher.testing.findings import Subject
from boxteacher.testing.variants import check_compiled, check_half_precision
from tests.example_support import TinySegmenter
from tests.support import ScriptedSegmenter
from tests.testing_support import NUM_CLASSES, Broken, assert_fails, chosen, subject, trained_weights


class CountsSteps(TinySegmenter):
    """A warm-up by a plain number, which no checkpoint knows."""

    steps = 0

    def forward_student(self, images, targets):
        self.steps += self.training
        output = super().forward_student(images, targets)
        warmup = min(self.steps, 30) / 30
        return replace(output, losses={name: loss * warmup for name, loss in output.losses.items()})


class ForgottenBuffer(TinySegmenter):
    """A running mean that training changes and checkpoints leave out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(1), persistent=False)

    def features(self, images):
        features = super().features(images)
        if self.training:
            self.level = 0.9 * self.level + 0.2
        return replace(features, prototypes=features.prototypes * self.level)


class SharedCopies(TinySegmenter):
    def __deepcopy__(self, memo):
        other = TinySegmenter.__new__(type(self))
        nn.Module.__init__(other)
        other.__dict__.update(self.__dict__)
        other._modules = {name: copy.copy(module) for name, module in self._modules.items()}
        return other


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (CountsSteps, "state_dict: loss_class of a model that loads it differ.*numbers in such buffers"),
        (ForgottenBuffer, "state_dict: masks of candidates of a model that loads it differ.*register_buffer"),
        (SharedCopies, "deepcopy: .* of a copy is the original's own tensor"),
    ],
)
def test_what_a_copy_forgets_or_shares_is_named(broken, words):
    assert_fails(broken(), words)


def nan_without_samples(output, targets):
    """The mean over no positive sample is NaN."""
    mean = output.masks[0].logits.mean((1, 2)).mean() * 0
    return replace(output, losses={**output.losses, "loss_mean": mean})


def bends_labels(targets):
    return [{**target, "labels": target["labels"].clamp(max=NUM_CLASSES - 1)} for target in targets]


def indexes_boxes(targets):
    for target in targets:
        target["boxes"].amax(0)
    return targets


def refuses(words, when):
    def check(targets):
        if when(targets):
            raise InputError(words)
        return targets

    return check


class FailsOnOneCell(TinySegmenter):
    def train(self, mode=True):
        """Keeps batch norms as they are, for whose sake the core would refuse such a batch before."""
        super().train(mode)
        self.backbone.stem.eval()
        return self

    def forward_student(self, images, targets):
        if len(images) == 1 and max(images[0].shape[1:]) <= 32:
            raise ValueError("Expected more than 1 value per channel when training")
        return super().forward_student(images, targets)


def nan_in_tiny_images(found, images):
    for each, image in zip(found, images, strict=True):
        if max(image.shape[1:]) < 32:
            each["boxes"], each["scores"] = torch.zeros(1, 4), torch.zeros(1)
            each["labels"], each["masks"] = torch.zeros(1, dtype=torch.int64), image[None, :1] * torch.nan
    return found


EDGES = {
    "a mean of nothing": (
        Broken(output=nan_without_samples),
        "a batch without any box: loss_mean is nan: divide",
    ),
    "an error without boxes": (
        Broken(targets=indexes_boxes),
        "an image without boxes: it raised IndexError .*make this case work",
    ),
    "a refusal without boxes": (
        Broken(targets=refuses("no boxes: leave it out", lambda t: any(len(x["boxes"]) == 0 for x in t))),
        "an image without boxes: it refuses sound images .*leave it out.: accept them",
    ),
    "a refusal of one image": (
        Broken(targets=refuses("give two", lambda t: len(t) == 1)),
        "a batch of one image: it refuses sound images",
    ),
    "an error on one cell": (
        FailsOnOneCell(),
        "one image of 8 × 8 pixels .which boxteacher.adapter.InputError may refuse.: it raised ValueError",
    ),
    "detections of NaN": (
        Broken(detections=nan_in_tiny_images),
        "13 × 9 pixels .*masks of image 0 holds NaN",
    ),
    "labels bent to fit": (
        Broken(targets=bends_labels),
        "which boxteacher.adapter.check_labels refuses: 5 of 3 classes passes without a word",
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_an_unusual_batch_that_fails_is_named(name):
    model, words = EDGES[name]
    assert_fails(model, words, check=check_edge_cases)


def in_half(change):
    return lambda value: change(value) if torch.is_autocast_enabled("cpu") else value


HALVES = {
    "boxes in bfloat16": (
        {"candidates": in_half(lambda found: replace(found, boxes=found.boxes.bfloat16()))},
        "boxes beyond 1024 pixels are off by .* pixels.*full_precision",
    ),
    "nothing": (
        {"candidates": in_half(lambda found: chosen(found, torch.arange(0)))},
        "there are no candidates",
    ),
    "positions of masks": ({"masks": in_half(lambda masks: masks.roll(8, 2))}, "masks overlap .* instead of"),
}


@pytest.mark.parametrize("name", HALVES)
def test_what_half_precision_rounds_is_named(name):
    changes, words = HALVES[name]
    words = f"half precision: under bfloat16 autocast .*{words}"
    assert_fails(Broken(**changes), words, check=check_half_precision)


def test_what_half_precision_moves_everywhere_alike_is_not_rounding():
    """Boxes a pixel and a half off near the origin may be so far from it too."""
    model = Broken(candidates=in_half(lambda found: replace(found, boxes=found.boxes + 1.5)))
    model.load_state_dict(trained_weights())
    check_half_precision(subject(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": bends_labels}, "labels out of range"),
        (HALVES["positions of masks"][0], "half precision"),
    ],
)
def test_the_kit_runs_these_checks(changes, words):
    assert_fails(Broken(**changes), words)


class TwiceWhenCompiled(ScriptedSegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        factor = 2 if torch.compiler.is_compiling() else 1
        return replace(output, losses={name: loss * factor for name, loss in output.losses.items()})


def test_what_differs_when_compiled_must_not_claim_to_compile():
    check_compiled(Subject(ScriptedSegmenter(), 1, 1e-3))
    with pytest.raises(
        ProtocolError, match=r"forward_student: loss_class differs when .*not claim compiles=True"
    ):
        check_compiled(Subject(TwiceWhenCompiled(), 1, 1e-3))
