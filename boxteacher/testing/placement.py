"""A known box must land where it should: in the student's masks, the teacher's candidates, the detections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boxteacher.errors import ProtocolError
from boxteacher.testing.explanation import explain_boxes, explain_masks
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.measure import (
    Batch,
    Found,
    Masks,
    found_candidates,
    found_detections,
    median_offset,
    student_masks,
)
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes

UNSEEN = 1_000_000  # seeds from here on are not trained on
_NUM_SCENES = 4
_CHECK = "where a known box lands"
_FIND = {"candidates": found_candidates, "detections": found_detections}


@dataclass(frozen=True)
class Limits:
    """How well known boxes must be found.

    Attributes:
        overlap: least mean IoU, of boxes and of masks; a grid that is scaled or turned stays below 0.5.
        right: least part of the labels that are right; two classes that are swapped leave at most half.
        offset: greatest median offset in cells of the mask grid: of boxes from the known ones twice that, of
            masks that much from the student's, which have the same weights.
    """

    overlap: float
    right: float
    offset: float


CHECKED = Limits(overlap=0.6, right=0.7, offset=0.5)
LEARNT = Limits(overlap=0.65, right=0.8, offset=0.4)
"""Stricter, so that training that reached it passes the check."""


def lands(subject: Subject) -> bool:
    """Whether boxes never seen before are found well enough to stop training."""
    with finding(subject.model, _CHECK):
        return _first_fault(subject, LEARNT) is None


def check_landing(subject: Subject) -> None:
    """Checks the student's masks, and boxes, labels and masks of candidates and detections."""
    with finding(subject.model, _CHECK):
        fault = _first_fault(subject, CHECKED)
        if fault is not None:
            raise ProtocolError(fault())


def check_padding(subject: Subject) -> None:
    """Checks that a larger companion image, and so a larger canvas, moves no boxes or masks of an image."""
    sizes = ((51, 61), (93, 91))
    pairs = [
        known_boxes(subject.num_classes, subject.device, seed=UNSEEN + i, sizes=sizes, counts=(1, 1))
        for i in range(_NUM_SCENES)
    ]
    with finding(subject.model, "an image beside a larger one"):
        alone = found_candidates(subject, [(images[:1], targets[:1]) for images, targets in pairs])
        beside = found_candidates(subject, pairs)
        first = torch.minimum(alone.box_overlap, alone.mask_overlap).median()
        # The larger images' boxes take turns with those of the image itself.
        second = torch.minimum(beside.box_overlap, beside.mask_overlap)[::2].median()
        require(
            float(min(first, second)) >= CHECKED.overlap * float(max(first, second)),
            f"boxes of images of {sizes[0]} are found with an IoU of {float(first):.2f} alone, but of "
            f"{float(second):.2f} beside images of {sizes[1]}; {_rounded(alone.known[0])} becomes "
            f"{_rounded(beside.boxes[0])}: pad images at the right and bottom only, and measure coordinates "
            "in pixels, not in parts of the canvas",
        )


def _first_fault(subject: Subject, limits: Limits) -> Callable[[], str] | None:
    """What says the first thing that is wrong, as explaining it takes longer than seeing it."""
    shapes = (SQUARE, OBLONG)
    scenes = [
        known_boxes(subject.num_classes, subject.device, seed=UNSEEN + i, sizes=shapes[i % 2], counts=(2, 2))
        for i in range(_NUM_SCENES)
    ]
    student = student_masks(subject, scenes)
    overlap = float(student.overlap.mean())
    if overlap < limits.overlap:
        return lambda: (
            "after training with drawn masks, the student's masks overlap their boxes by an IoU of only "
            f"{overlap:.2f}; {explain_masks(subject, scenes)}"
        )
    for what in _FIND:
        fault = _fault_of(subject, scenes, what, student, limits)
        if fault is not None:
            return fault
    return None


def _fault_of(
    subject: Subject, scenes: Sequence[Batch], what: str, student: Masks, limits: Limits
) -> Callable[[], str] | None:
    find = _FIND[what]
    found = find(subject, scenes)
    if bool(found.boxes.isnan().all()):
        return lambda: (
            f"there are no {what} at all in images of known boxes, though the student draws their masks: "
            "keep thresholds on scores low, and take boxes and scores from what was trained"
        )
    overlap = float(found.box_overlap.mean())
    if overlap < limits.overlap:
        return lambda: (
            f"the {what}' boxes overlap the known ones by an IoU of only {overlap:.2f}; "
            f"{explain_boxes(subject, scenes, find)}"
        )
    limit = limits.offset * subject.provider.mask_stride  # pixels
    return _fault_of_boxes(what, found, limits, 2 * limit) or _fault_of_masks(
        what, found, student, limits, limit
    )


def _fault_of_boxes(what: str, found: Found, limits: Limits, limit: float) -> Callable[[], str] | None:
    offset = median_offset(found.box_offset)
    if max(map(abs, offset)) > limit:
        return lambda: (
            f"the {what}' boxes are off by {_pixels(offset)} from the known ones: boxes are in pixels of the "
            "image as it was given, and the middle of a cell is not its corner"
        )
    right = float(found.right.float().mean())
    if right < limits.right:
        return lambda: (
            f"only {right:.0%} of the {what}' labels are right, though their boxes are: return the classes "
            "as targets have them, 0 to C−1 without background"
        )
    return None


def _fault_of_masks(
    what: str, found: Found, student: Masks, limits: Limits, limit: float
) -> Callable[[], str] | None:
    source, remedy = _MASKS[what]
    overlap = float(found.mask_overlap.mean())
    if overlap < limits.overlap:
        return lambda: (
            f"the {what}' boxes are right, but {source} overlap them by an IoU of only {overlap:.2f}: "
            f"{remedy}"
        )
    theirs, ours = median_offset(found.mask_offset), median_offset(student.offset)
    offset = (theirs[0] - ours[0], theirs[1] - ours[1])
    if max(map(abs, offset)) > limit:
        return lambda: (
            f"{source} are off by {_pixels(offset)} from the student's, which have the same weights: {remedy}"
        )
    return None


_MASKS = {
    "candidates": (
        "masks from decode_masks",
        "return logits of the candidate asked for, drawn from its own image, on the grid that the student's "
        "masks lie on",
    ),
    "detections": (
        "masks of model(images)",
        "enlarge each box's own mask from the grid by mask_stride (boxteacher.grid.upsample_aligned), "
        "and cut the image out of the canvas at the top left, without resizing",
    ),
}


def _pixels(offset: tuple[float, float]) -> str:
    y, x = offset
    return f"({y:+.1f}, {x:+.1f}) pixels (y, x)"


def _rounded(box: Tensor) -> list[int]:
    return [round(value) for value in box.nan_to_num().tolist()]
