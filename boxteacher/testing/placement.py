"""A known box must be found where it is: in the student's masks, the teacher's candidates, the detections."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.errors import ProtocolError
from boxteacher.grid import mask_grid
from boxteacher.targets import grid_targets
from boxteacher.testing.findings import Subject, finding, not_learned, require
from boxteacher.testing.found import Found, box_offset, find, mask_iou, mask_offsets, mean_box_iou
from boxteacher.testing.scenes import OBLONG, SQUARE, Batch, known_boxes

MIN_OVERLAP = 0.6  # mean IoU, of boxes and of masks; a grid that is scaled or turned stays below 0.5
_MIN_RIGHT = 0.7  # share of the labels; two classes that are swapped leave at most half
_THROUGHOUT = 0.9  # share of a class's boxes that have its most frequent labels
_MAX_OFFSET = 0.5  # median offset of masks in cells of the mask grid; of boxes twice that
_MIN_SWAPPED = 0.35  # mean IoU of boxes whose x and y are exchanged back; some are cut at a side
_CLEARLY = 0.15  # difference of mean IoUs that chance does not make
_EXPLAINED = 0.1  # gain in mean IoU by which a common move, scale or order explains where boxes are
_MOST = 0.75  # share of the masks that lie off to the same side where all are moved
_UNSEEN = 1_000_000  # seeds from here on are not trained on
_STUDENT_REMEDY = (
    "check that targets' boxes are read as x0, y0, x1, y1, that target_index names the target of each mask, "
    "and that logits lie on the padded batch's grid at mask_stride, rows before columns"
)
_MASK_REMEDIES = {
    "candidates": "decode logits of the candidate asked for, from its own image, on the student's grid, and "
    "check that the student's target_index names the target of each mask",
    "detections": "enlarge each box's own mask by mask_stride (boxteacher.adapter.upsample_aligned), and cut "
    "the image out of the padded batch at the top left, without resizing",
}


@dataclass(frozen=True)
class StudentMasks:
    """Mean IoU of the student's masks with the known ones, and their median offset y, x (2,) in pixels."""

    overlap: float
    offset: Tensor


def check_places(subject: Subject, margin: float = 1.0) -> None:
    """Checks where boxes that were not trained on are found, with limits that are stricter by a margin.

    A sound network that has learned too little misses them too. So a fault is named only with evidence:
    masks or boxes that fit once they are moved, scaled, turned or exchanged, or masks and detections that are
    wrong where those that they are made of are right. All else is inconclusive.
    """
    scenes = [
        known_boxes(subject, seed=_UNSEEN + i, sizes=sizes, counts=(2, 2))
        for i, sizes in enumerate((SQUARE, OBLONG, SQUARE, OBLONG))
    ]
    with finding(subject.model, "where known boxes are found"), torch.no_grad():
        student = _check_student_masks(subject, scenes, margin)
        candidates = find(subject, scenes, "candidates")
        _check_boxes(subject, scenes, candidates, "candidates", student.overlap, margin)
        _check_labels(subject, candidates, "candidates", margin)
        _check_masks(subject, candidates, "candidates", student, margin)
        detections = find(subject, scenes, "detections")
        box_overlap = float(candidates.box_overlap.mean())
        _check_boxes(subject, scenes, detections, "detections", box_overlap, margin)
        _check_labels(subject, detections, "detections", margin)
        _check_masks(subject, detections, "detections", student, margin)


def _check_student_masks(subject: Subject, scenes: Sequence[Batch], margin: float) -> StudentMasks:
    """Checks the masks of the last decoder layer, and measures them."""
    provider = subject.copy(training=True).provider
    shown, offsets, logits = [], [], []
    for images, targets in scenes:
        masks = provider.forward_student(images, targets).masks[-1]
        grid = mask_grid(images, provider.mask_stride, provider.size_divisor)
        truth = grid_targets(images, targets, grid).masks  # (T, h, w)
        shown.append((masks.logits > 0, truth, masks.target_index))
        offsets.append(mask_offsets(masks.logits > 0, truth[masks.target_index], grid))
        logits.append(masks.logits.flatten())
    overlap = float(torch.cat([mask_iou(masks, truth[index]) for masks, truth, index in shown]).mean())
    student = StudentMasks(overlap, torch.cat(offsets).nanmedian(0).values)
    if overlap >= MIN_OVERLAP * margin:
        return student

    faults = _misplacement(shown, overlap, (student.offset / provider.mask_stride).nan_to_num())
    low, high = (float(value) for value in torch.cat(logits).aminmax())
    if 0 <= low <= high <= 1:
        faults.append("all mask logits lie in [0, 1]: return logits, not probabilities")
    if _order_explains(subject, scenes, "candidates", float(find(subject, scenes).box_overlap.mean())):
        faults.append("boxes are found with x and y swapped")
    found = (
        "after training with annotated masks, the student's masks overlap the known ones by an IoU of only "
        f"{overlap:.2f} and are off by {_pixels(student.offset)}"
    )
    require(not faults, f"{found}: {'; '.join(faults)}; {_STUDENT_REMEDY}")
    raise not_learned(subject, found, _STUDENT_REMEDY)


def _misplacement(shown: Sequence[tuple[Tensor, Tensor, Tensor]], overlap: float, shift: Tensor) -> list[str]:
    """The faults that would explain where masks lie.

    Args:
        shown: per batch masks (M, h, w) bool, known masks (T, h, w) bool, and the index (M,) of each mask's.
        overlap: mean IoU of the masks and their known ones.
        shift: (2,) median offset of the masks down and right, in cells.
    """
    down, right = shift.round().int().tolist()
    placed: dict[str, list[Tensor]] = defaultdict(list)
    for masks, known, index in shown:
        height, width = known.shape[1:]
        turned = F.interpolate(known.transpose(1, 2)[:, None].float(), (height, width))[:, 0] > 0
        half = F.pad(known[:, ::2, ::2], (0, width - (width + 1) // 2, 0, height - (height + 1) // 2))
        twice = known.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
        moved = known.roll((down, right), (1, 2))
        others = torch.stack([mask_iou(masks, each.expand_as(masks)) for each in known], 1)  # (M, T)
        placed["they fit another target"].append(others.scatter(1, index[:, None], 0.0).amax(1))
        for name, each in (
            ("they fit with rows and columns swapped", turned),
            ("they fit at half the size", half),
            ("they fit at twice the size", twice),
            ("they fit when moved back", moved),
        ):
            there = each.flatten(1).any(1)[index]  # the rest lies outside of the grid
            placed[name].append(mask_iou(masks, each[index]).where(there, torch.nan))
    enough = max(MIN_OVERLAP, overlap + _CLEARLY)
    return [name for name, each in placed.items() if float(torch.cat(each).nanmean()) >= enough]


def _order_explains(subject: Subject, scenes: Sequence[Batch], what: str, overlap: float) -> bool:
    """Whether boxes fit once x and y are exchanged."""
    swapped = float(find(subject, scenes, what, order=(1, 0, 3, 2)).box_overlap.mean())
    return swapped >= max(_MIN_SWAPPED, overlap + _EXPLAINED)


def _check_boxes(
    subject: Subject, scenes: Sequence[Batch], found: Found, what: str, expected: float, margin: float
) -> None:
    """Checks boxes; `expected` is the IoU that they may be expected to have if nothing is wrong with them."""
    require(
        not bool(found.boxes.isnan().all()),
        f"there are no {what} at all in images of known boxes, though the student's masks are right: keep "
        "thresholds on scores low, and take boxes and scores from what was trained",
    )
    limit = 2 * _MAX_OFFSET / margin * subject.provider.mask_stride  # pixels
    offset = box_offset(found)  # (2,) y, x
    overlap = float(found.box_overlap.mean())
    if overlap >= MIN_OVERLAP * margin and bool((offset.abs() <= limit).all()):
        return
    fitted, description = _fitted(found)
    fault = fitted >= max(MIN_OVERLAP, overlap + _EXPLAINED)
    off = f"{_pixels(offset)}{description if fault else ''}"
    described = f"the {what}' boxes overlap the known ones by an IoU of {overlap:.2f} and are off by {off}"
    remedy = (
        "boxes are x0, y0, x1, y1 in pixels of the image as it was given; undo any resizing, and take a "
        "cell's middle, not its corner"
    )
    if _order_explains(subject, scenes, what, overlap):
        raise ProtocolError(f"{described}, x and y are swapped: {remedy}")
    if fault or overlap < expected / 2:
        raise ProtocolError(f"{described}: {remedy}")
    raise not_learned(subject, described, remedy)


def _fitted(found: Found) -> tuple[float, str]:
    """IoU of the boxes once a common move or scale is undone, whichever fits better, and its name."""
    there = ~found.boxes.isnan().any(1)
    boxes, known = found.boxes[there], found.known[there]  # (T', 4) each
    y, x = box_offset(found).tolist()
    scale = (boxes[:, 2:] / known[:, 2:]).median(0).values.clamp(min=0.01)  # (2,) x, y
    moved = mean_box_iou(boxes - boxes.new_tensor([x, y, x, y]), known)
    scaled = mean_box_iou(boxes / scale.repeat(2), known)
    by = ", ".join(f"{each:.2f}" for each in scale.flip(0).tolist())
    return max((moved, ", all moved alike"), (scaled, f", all scaled by ({by})"))


def _check_labels(subject: Subject, found: Found, what: str, margin: float) -> None:
    """Checks labels; those that are wrong throughout, each class's by the same label, are a fault."""
    right = float((found.labels == found.known_labels).float().mean())
    if right >= _MIN_RIGHT * margin:
        return
    described = f"only {right:.0%} of the {what}' labels are right, though their boxes are"
    remedy = "return the classes as targets have them, 0 to C−1 without background"
    same = (found.known_labels[:, None] == found.known_labels) & (found.labels[:, None] == found.labels)
    alike = same.sum(1) / (found.known_labels[:, None] == found.known_labels).sum(1)  # (T,) of its class
    require(float(alike.mean()) < _THROUGHOUT, f"{described}: {remedy}")
    raise not_learned(subject, described, remedy)


def _check_masks(subject: Subject, found: Found, what: str, student: StudentMasks, margin: float) -> None:
    """Checks masks of entries whose boxes are right."""
    limit = _MAX_OFFSET / margin * subject.provider.mask_stride  # pixels
    offset, of_boxes = found.mask_offset.nanmedian(0).values - student.offset, box_offset(found)
    # A mask that is cut to the entry's own box may lack what that lacks, and be off as far as that is.
    beyond = offset - offset.clamp(of_boxes.clamp(max=0), of_boxes.clamp(min=0))
    overlap = float(found.mask_overlap.maximum(found.cut_overlap).mean())
    if overlap >= MIN_OVERLAP * margin and bool((beyond.abs() <= limit).all()):
        return
    described = (
        f"the {what}' boxes are right, but their masks overlap the known ones by an IoU of {overlap:.2f} and "
        f"are off by {_pixels(offset)} from the student's"
    )
    same_side = (found.mask_offset - student.offset) * beyond.sign() > limit / 2  # (T, 2)
    moved = (beyond.abs() > limit) & (same_side.float().mean(0) >= _MOST)  # (2,)
    fault = overlap < student.overlap - _CLEARLY or bool(moved.any())
    require(not fault, f"{described}: {_MASK_REMEDIES[what]}")
    raise not_learned(subject, described, _MASK_REMEDIES[what])


def check_padding(subject: Subject) -> None:
    """Checks that a larger image in the batch, and so a larger padded batch, moves no boxes or masks."""
    sizes = ((51, 61), (93, 91))
    pairs = [known_boxes(subject, seed=_UNSEEN + i, sizes=sizes, counts=(1, 0)) for i in range(4)]
    with finding(subject.model, "an image beside a larger one"):
        found = [find(subject, [(i[:n], t[:n]) for i, t in pairs]) for n in (1, 2)]
        alone, beside = (float(torch.minimum(f.box_overlap, f.mask_overlap).median()) for f in found)
        require(
            min(alone, beside) >= MIN_OVERLAP * max(alone, beside),
            f"boxes of images of {sizes[0]} are found with an IoU of {alone:.2f} alone, but of {beside:.2f} "
            f"beside images of {sizes[1]}: pad images at the right and bottom only, and measure coordinates "
            "in pixels, not in parts of the padded batch",
        )


def _pixels(offset: Tensor) -> str:
    y, x = offset.tolist()
    return f"({y:+.1f}, {x:+.1f}) pixels (y, x)"
