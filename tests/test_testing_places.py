"""The conformance kit: boxes, masks and labels that do not lie on known boxes are named with their remedy."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.grid import padded_size
from boxteacher.protocol import Candidates
from tests.example_support import TinySegmenter
from tests.testing_support import NUM_CLASSES, assert_fails

Found = dict[str, Tensor]


def stretched(masks: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(masks, size, mode="bilinear")


def half_scale(masks: Tensor) -> Tensor:
    height, width = masks.shape[2:]
    return F.pad(masks[..., ::2, ::2], (0, width // 2, 0, height // 2))[..., :height, :width]


def with_masks(change: Callable[[Tensor], Tensor]) -> Callable[[Found], Found]:
    return lambda found: {**found, "masks": change(found["masks"])}


DETECTED: dict[str, tuple[Callable[[Found], Found], str]] = {
    "masks upside down": (with_masks(lambda m: m.flip(2)), "cut the image out of the canvas"),
    "masks of the next object": (with_masks(lambda m: m.roll(1, 0)), "each box's own mask"),
    "masks in reverse order": (with_masks(lambda m: m.flip(0)), "each box's own mask"),
    "masks at half scale": (with_masks(half_scale), "by mask_stride"),
    "masks transposed": (
        with_masks(lambda m: stretched(m.transpose(2, 3), list(m.shape[2:]))),
        "masks of model.images. overlap them by an IoU of only",
    ),
    "masks 6 pixels off": (with_masks(lambda m: m.roll(6, 3)), r"off by \(.*, \+.*\) pixels"),
    "boxes that are nothing": (
        lambda found: {**found, "boxes": found["boxes"] * 0},
        "the detections' boxes overlap the known ones by an IoU of only 0.00",
    ),
    "nothing": (
        lambda found: {key: value[:0] for key, value in found.items()},
        "there are no detections at all.*thresholds on scores low",
    ),
    "labels one too high": (
        lambda found: {**found, "labels": (found["labels"] + 1).clamp(max=NUM_CLASSES - 1)},
        "of the detections' labels are right",
    ),
    "labels that are all 0": (
        lambda found: {**found, "labels": found["labels"] * 0},
        "of the detections' labels are right",
    ),
}


@pytest.mark.parametrize("name", DETECTED)
def test_detections_lie_on_known_boxes(name, monkeypatch):
    change, words = DETECTED[name]

    class Broken(TinySegmenter):
        def forward(self, images):
            return [change(found) for found in super().forward(images)]

    assert_fails(Broken(NUM_CLASSES), f"where a known box lands: .*{words}", monkeypatch)


class StretchedFromTheCanvas(TinySegmenter):
    """Masks of the canvas are resized to the image instead of being cut to it."""

    def forward(self, images):
        height, width = padded_size(images, self.size_divisor)
        found = []
        for each, image in zip(super().forward(images), images, strict=True):
            masks = F.pad(each["masks"], (0, width - image.shape[2], 0, height - image.shape[1]))
            found.append({**each, "masks": stretched(masks, list(image.shape[1:]))})
        return found


def test_detected_masks_are_cut_out_of_the_canvas(monkeypatch):
    words = "where a known box lands: .*masks of model.*without resizing"
    assert_fails(StretchedFromTheCanvas(NUM_CLASSES), words, monkeypatch)


def rolled(found: Candidates, pixels: int) -> Candidates:
    return replace(found, decode_masks=lambda *wanted: found.decode_masks(*wanted).roll(pixels, 2))


PROPOSED: dict[str, tuple[Callable[[Candidates], Candidates], str]] = {
    "labels permuted": (
        lambda found: replace(found, labels=(found.labels + 1) % NUM_CLASSES),
        "of the candidates' labels are right",
    ),
    "labels that are all 0": (
        lambda found: replace(found, labels=found.labels * 0),
        "of the candidates' labels are right",
    ),
    "labels one too high": (
        lambda found: replace(found, labels=(found.labels + 1).clamp(max=NUM_CLASSES - 1)),
        "of the candidates' labels are right",
    ),
    "masks one cell off": (lambda found: rolled(found, 1), r"decode_masks are off by \(.*, \+.*\) pixels"),
    "boxes 6 pixels off": (
        lambda found: replace(found, boxes=(found.boxes - 6).clamp(min=0)),
        r"off by \(-.*, -.*\) pixels",
    ),
    "probabilities for logits": (
        lambda found: replace(found, decode_masks=lambda *wanted: found.decode_masks(*wanted).sigmoid()),
        "return logits",
    ),
    "nothing": (
        lambda found: replace(
            found,
            boxes=found.boxes[:0],
            scores=found.scores[:0],
            labels=found.labels[:0],
            image_index=found.image_index[:0],
        ),
        "there are no candidates at all",
    ),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_candidates_lie_on_known_boxes(name, monkeypatch):
    change, words = PROPOSED[name]

    class Broken(TinySegmenter):
        def forward_teacher(self, images):
            return change(super().forward_teacher(images))

        def forward(self, images):
            self.forward_teacher = super().forward_teacher  # detections stay right
            try:
                return super().forward(images)
            finally:
                del self.forward_teacher

    assert_fails(Broken(NUM_CLASSES), f"where a known box lands: .*{words}", monkeypatch)


class ProbabilitiesForLogits(TinySegmenter):
    def masks(self, *arguments):
        return super().masks(*arguments).sigmoid()


class TargetsRowsFirst(TinySegmenter):
    def forward_student(self, images, targets):
        swapped = [{**target, "boxes": target["boxes"][:, [1, 0, 3, 2]]} for target in targets]
        return super().forward_student(images, swapped)


class ShiftedGrid(TinySegmenter):
    """Masks lie six cells further right than what they show."""

    def masks(self, *arguments):
        return F.pad(super().masks(*arguments), (6, 0))[..., :-6]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ProbabilitiesForLogits, "return logits, not the probabilities"),
        (TargetsRowsFirst, "x and y are swapped: read targets' boxes"),
        (ShiftedGrid, r"the grid is off by \([+-]\d, -\d+\) pixels"),
    ],
)
def test_what_is_wrong_with_the_students_masks_is_guessed(broken, words, monkeypatch):
    assert_fails(broken(NUM_CLASSES), f"where a known box lands: .*{words}", monkeypatch)


def test_a_model_of_fewer_classes_is_told_so(monkeypatch):
    words = "forward_student: it refuses .*labels reach from 0 to 4.*the model's own num_classes"
    assert_fails(TinySegmenter(NUM_CLASSES), words, monkeypatch, num_classes=5)


def test_a_label_that_is_bent_to_fit_is_not_learnt(monkeypatch):
    class Bent(TinySegmenter):
        def forward_student(self, images, targets):
            labels = [target["labels"].clamp(max=NUM_CLASSES - 2) for target in targets]
            changed = [{**t, "labels": one} for t, one in zip(targets, labels, strict=True)]
            return super().forward_student(images, changed)

    torch.manual_seed(0)
    assert_fails(Bent(NUM_CLASSES), "of the candidates' labels are right", monkeypatch)
