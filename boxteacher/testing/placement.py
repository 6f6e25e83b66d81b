"""A known box must be found where it is: in the student's masks, the teacher's candidates, the detections."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher.errors import ProtocolError
from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.protocol import Candidates
from boxteacher.targets import GridTargets, grid_targets
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.outputs import decode
from boxteacher.testing.scenes import OBLONG, SQUARE, Batch, known_boxes

MIN_OVERLAP = 0.6  # mean IoU, of boxes and of masks; a grid that is scaled or turned stays below 0.5
_MIN_RIGHT = 0.7  # share of the labels; two classes that are swapped leave at most half
_MAX_OFFSET = 0.5  # median offset of masks in cells of the mask grid; of boxes twice that
_UNSEEN = 1_000_000  # seeds from here on are not trained on
_MASK_REMEDIES = {
    "candidates": "decode logits of the candidate asked for, from its own image, on the student's grid, and "
    "check that the student's target_index names the target of each mask",
    "detections": "enlarge each box's own mask by mask_stride (boxteacher.adapter.upsample_aligned), and cut "
    "the image out of the padded batch at the top left, without resizing",
}


@dataclass(frozen=True)
class Found:
    """For each known box the entry of its image whose score times IoU is highest."""

    known: Tensor  # (T, 4) known boxes in pixels
    boxes: Tensor  # (T, 4) boxes that were found; NaN where there is no entry at all
    box_overlap: Tensor  # (T,) IoU
    right: Tensor  # (T,) bool, whether the label is right
    mask_overlap: Tensor  # (T,) IoU of the mask and the known one
    mask_offset: Tensor  # (T, 2) y, x in pixels from the known mask's center; NaN for an empty mask


def check_places(subject: Subject, margin: float = 1.0) -> None:
    """Checks where boxes that were not trained on are found, with limits that are stricter by a margin."""
    scenes = [
        known_boxes(subject, seed=_UNSEEN + i, sizes=sizes, counts=(2, 2))
        for i, sizes in enumerate((SQUARE, OBLONG, SQUARE, OBLONG))
    ]
    with finding(subject.model, "where known boxes are found"), torch.no_grad():
        student_offset = _check_student_masks(subject, scenes, margin)
        for what in ("candidates", "detections"):
            _check_found(subject, scenes, what, student_offset, margin)


def _check_student_masks(subject: Subject, scenes: Sequence[Batch], margin: float) -> Tensor:
    """Checks the masks of the last decoder layer; returns their median offset y, x (2,) in pixels."""
    provider = subject.copy(training=True).provider
    overlaps, offsets, logits = [], [], []
    for images, targets in scenes:
        masks = provider.forward_student(images, targets).masks[-1]
        grid = mask_grid(images, provider.mask_stride, provider.size_divisor)
        known = grid_targets(images, targets, grid).masks[masks.target_index]  # (M, h, w)
        overlap, offset = _compare(masks.logits > 0, known, grid)
        overlaps.append(overlap)
        offsets.append(offset)
        logits.append(masks.logits.flatten())
    low, high = (float(value) for value in torch.cat(logits).aminmax())
    hint = "all mask logits lie in [0, 1]: return logits, not probabilities; "
    overlap, offset = torch.cat(overlaps).mean(), torch.cat(offsets).nanmedian(0).values
    require(
        bool(overlap >= MIN_OVERLAP * margin),
        "after training with annotated masks, the student's masks overlap the known ones by an IoU of only "
        f"{overlap:.2f} and are off by {_pixels(offset)}: {hint if 0 <= low <= high <= 1 else ''}check that "
        "targets' boxes are read as x0, y0, x1, y1, that target_index names the target of each mask, and "
        "that logits lie on the padded batch's grid at mask_stride, rows before columns",
    )
    return offset


def _check_found(
    subject: Subject, scenes: Sequence[Batch], what: str, student_offset: Tensor, margin: float
) -> None:
    found = find(subject, scenes, what)
    require(
        not bool(found.boxes.isnan().all()),
        f"there are no {what} at all in images of known boxes, though the student's masks are right: keep "
        "thresholds on scores low, and take boxes and scores from what was trained",
    )
    limit = _MAX_OFFSET / margin * subject.provider.mask_stride  # pixels
    apart = (found.boxes - found.known).unflatten(1, (2, 2)).mean(1)  # (T, 2) x, y
    overlap, box_offset = found.box_overlap.mean(), apart.median(0).values.flip(0)  # y, x
    if bool(overlap < MIN_OVERLAP * margin) or bool((box_offset.abs() > 2 * limit).any()):
        swapped = find(subject, scenes, what, order=(1, 0, 3, 2)).box_overlap.mean() > 1.2 * overlap
        raise ProtocolError(
            f"the {what}' boxes overlap the known ones by an IoU of {overlap:.2f} and are off by "
            f"{_pixels(box_offset)}{', x and y are swapped' if bool(swapped) else ''}: boxes are x0, y0, x1, "
            "y1 in pixels of the image as it was given; undo any resizing, and take a cell's middle, not its "
            "corner"
        )
    right = float(found.right.float().mean())
    require(
        right >= _MIN_RIGHT * margin,
        f"only {right:.0%} of the {what}' labels are right, though their boxes are: return the classes as "
        "targets have them, 0 to C−1 without background",
    )
    overlap, offset = found.mask_overlap.mean(), found.mask_offset.nanmedian(0).values - student_offset
    beyond = offset - offset.clamp(box_offset.clamp(max=0), box_offset.clamp(min=0))
    require(
        # A mask that is cut to the entry's own box may be off as far as that is.
        bool(overlap >= MIN_OVERLAP * margin) and bool((beyond.abs() <= limit).all()),
        f"the {what}' boxes are right, but their masks overlap the known ones by an IoU of {overlap:.2f} and "
        f"are off by {_pixels(offset)} from the student's: {_MASK_REMEDIES[what]}",
    )


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


@torch.no_grad()
def find(
    subject: Subject, batches: Sequence[Batch], what: str = "candidates", order: Sequence[int] = (0, 1, 2, 3)
) -> Found:
    """The candidates, or "detections", of a copy in evaluation mode, for boxes of that coordinate order."""
    subject = subject.copy(training=False)
    provider, found = subject.provider, []
    for images, targets in batches:
        if what == "candidates":
            grid = mask_grid(images, provider.mask_stride, provider.size_divisor)
            entries = provider.forward_teacher(images)
        else:
            grid = mask_grid(images, 1, 1)
            entries = _as_candidates(subject.model(images), grid)
        found.append(_best(subject, entries, grid, grid_targets(images, targets, grid), order))
    return Found(*(torch.cat([getattr(each, field.name) for each in found]) for field in fields(Found)))


def _as_candidates(detections: list[dict[str, Tensor]], grid: MaskGrid) -> Candidates:
    """Detections of a batch, with masks on a grid of stride 1."""
    masks = torch.cat([grid.sample(found["masks"][:, 0]) for found in detections]) - 0.5  # (K, H, W)
    index = torch.cat([torch.full_like(found["labels"], i) for i, found in enumerate(detections)])  # (K,)
    boxes, scores, labels = (torch.cat([d[key] for d in detections]) for key in ("boxes", "scores", "labels"))
    return Candidates(boxes, scores, labels, index, lambda indices, *_: masks[indices])


def _best(
    subject: Subject, entries: Candidates, grid: MaskGrid, truth: GridTargets, order: Sequence[int]
) -> Found:
    known = truth.boxes[:, order]  # (T, 4)
    if not len(entries.scores):
        nothing, nowhere = torch.zeros(len(known), device=known.device), torch.full_like(known, torch.nan)
        return Found(known, nowhere, nothing, nothing > 0, nothing, nowhere[:, :2])
    overlap = box_iou(entries.boxes.float(), known)  # (K, T)
    overlap = torch.where(entries.image_index[:, None] == truth.image_index, overlap, 0.0)
    best = (overlap * entries.scores[:, None].float()).argmax(0)  # (T,)
    masks = decode(subject, entries, grid, best, known, truth.labels) > 0  # (T, h, w)
    return Found(
        known,
        entries.boxes[best].float(),
        overlap.gather(0, best[None])[0],
        entries.labels[best] == truth.labels,
        *_compare(masks, truth.masks, grid),
    )


def _compare(masks: Tensor, known: Tensor, grid: MaskGrid) -> tuple[Tensor, Tensor]:
    """IoU (M,) of masks (M, h, w) bool, and y, x (M, 2) in pixels from the known ones' centers to theirs."""
    union = (masks | known).flatten(1).sum(1)
    overlap = (masks & known).flatten(1).sum(1) / union.clamp(min=1)
    return overlap, (_centers(masks) - _centers(known)) * grid.stride


def _centers(masks: Tensor) -> Tensor:
    """Row and column (M, 2) of the centers of masks (M, h, w) bool; NaN for an empty one."""
    rows, columns = (torch.arange(n, device=masks.device) for n in masks.shape[1:])
    row, column = (masks.sum(2) * rows).sum(1), (masks.sum(1) * columns).sum(1)  # (M,) each
    return torch.stack([row, column], 1) / masks.flatten(1).sum(1)[:, None]


def _pixels(offset: Tensor) -> str:
    y, x = offset.tolist()
    return f"({y:+.1f}, {x:+.1f}) pixels (y, x)"
