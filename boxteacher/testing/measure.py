"""How what a model finds lies on boxes that are known: overlap, offset and label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher.grid import mask_grid, padded_size
from boxteacher.protocol import Candidates, Detections, Target
from boxteacher.targets import GridTargets, grid_targets
from boxteacher.testing.findings import Subject, finding, require_tensor

Batch = tuple[list[Tensor], list[Target]]


@dataclass(frozen=True)
class Masks:
    """How masks lie on the boxes that they ought to fill.

    Attributes:
        overlap: (M,) IoU.
        offset: (M, 2) y, x in pixels from the box's centre to the mask's; NaN for an empty mask.
    """

    overlap: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Found:
    """For each known box the entry of its image whose score times IoU is highest, and how it lies.

    Attributes:
        known: (T, 4) the known boxes in pixels.
        boxes: (T, 4) the boxes that were found; NaN where the image has no entry.
        box_overlap: (T,) IoU.
        right: (T,) bool, whether the label is right.
        mask_overlap: (T,) IoU of the mask and the known box.
        mask_offset: (T, 2) as in `Masks`.
    """

    known: Tensor
    boxes: Tensor
    box_overlap: Tensor
    right: Tensor
    mask_overlap: Tensor
    mask_offset: Tensor

    @property
    def box_offset(self) -> Tensor:
        """(T, 2) y, x in pixels from the known box's centre to the found one's; NaN where they are apart."""
        apart = (self.boxes[:, :2] + self.boxes[:, 2:] - self.known[:, :2] - self.known[:, 2:]) / 2
        return torch.where(self.box_overlap[:, None] > 0, apart.flip(1), torch.nan)


def median_offset(offset: Tensor) -> tuple[float, float]:
    """y, x in pixels of offsets (M, 2), without those that are NaN; 0 if all are."""
    y, x = offset.nanmedian(0).values.nan_to_num().tolist()
    return y, x


@torch.no_grad()
def student_masks(subject: Subject, batches: Sequence[Batch], *, swapped: bool = False) -> Masks:
    """The last round's masks of a copy in training mode; `swapped` tells it targets' boxes y, x, y, x."""
    provider = subject.twin(training=True).provider
    overlaps, offsets = [], []
    for images, targets in batches:
        told = [with_swapped_boxes(target) for target in targets] if swapped else targets
        masks = provider.forward_student(images, told).masks[-1]
        grid = grid_targets(images, targets, mask_grid(images, provider.mask_stride, provider.size_divisor))
        due = grid.box_masks[masks.target_index]  # (M, h, w)
        overlaps.append(_overlap(masks.logits > 0, due))
        offsets.append(_apart(masks.logits > 0, due) * provider.mask_stride)
    return Masks(torch.cat(overlaps), torch.cat(offsets))


def with_swapped_boxes(target: Target) -> Target:
    """The target with boxes y0, x0, y1, x1."""
    return {**target, "boxes": target["boxes"][:, [1, 0, 3, 2]]}


@torch.no_grad()
def found_candidates(subject: Subject, batches: Sequence[Batch]) -> Found:
    """What `forward_teacher` of a copy in evaluation mode finds, each mask drawn for its known box."""
    provider = subject.twin(training=False).provider
    found = []
    for images, targets in batches:
        grid = grid_targets(images, targets, mask_grid(images, provider.mask_stride, provider.size_divisor))
        found.append(_candidates(subject, provider.forward_teacher(images), images, grid))
    return _together(found)


@torch.no_grad()
def found_detections(subject: Subject, batches: Sequence[Batch]) -> Found:
    """What `model(images)` of a copy in evaluation mode finds."""
    model = subject.twin(training=False).model
    return _together(
        [
            _detections(found, target)
            for images, targets in batches
            for found, target in zip(model(images), targets, strict=True)
        ]
    )


def _candidates(
    subject: Subject, candidates: Candidates, images: Sequence[Tensor], grid: GridTargets
) -> Found:
    def masks(winners: Tensor) -> Tensor:
        with finding(subject.model, "decode_masks"):
            return decoded(subject, candidates, winners, grid.boxes, grid.labels, images) > 0

    same_image = candidates.image_index[:, None] == grid.image_index  # (K, T)
    entries = (candidates.boxes, candidates.scores, candidates.labels)
    stride = subject.provider.mask_stride
    return _best(entries, same_image, masks, (grid.boxes, grid.labels, grid.box_masks), stride)


def _detections(found: Detections, target: Target) -> Found:
    entries = (found["boxes"], found["scores"], found["labels"])
    same_image = torch.ones(
        len(found["scores"]), len(target["boxes"]), dtype=torch.bool, device=target["boxes"].device
    )
    known = (target["boxes"], target["labels"], target["masks"])
    return _best(entries, same_image, lambda winners: found["masks"][winners, 0] > 0.5, known, stride=1)


def decoded(
    subject: Subject,
    candidates: Candidates,
    indices: Tensor,
    boxes: Tensor,
    labels: Tensor,
    images: Sequence[Tensor],
) -> Tensor:
    """Mask logits (M, h, w) of candidates (M,) for boxes (M, 4) and labels (M,).

    Raises:
        ProtocolError: `decode_masks` gave anything but finite floats of that shape.
    """
    height, width = padded_size(images, subject.provider.size_divisor)
    stride = subject.provider.mask_stride
    masks = candidates.decode_masks(indices, boxes, labels)
    name = f"decode_masks of {len(indices)} of {len(candidates.scores)} candidates"
    shape = (len(indices), height // stride, width // stride)
    return require_tensor(name, masks, shape, "float", subject.device)


def _best(
    entries: tuple[Tensor, Tensor, Tensor],
    same_image: Tensor,
    masks: Callable[[Tensor], Tensor],
    known: tuple[Tensor, Tensor, Tensor],
    stride: int,
) -> Found:
    """The best of K entries for each of T known boxes.

    Args:
        entries: boxes (K, 4), scores (K,), labels (K,).
        same_image: (K, T) bool.
        masks: (T, h, w) bool of entries (T,) int64.
        known: boxes (T, 4), labels (T,), and masks (T, h, w) bool.
        stride: pixels per cell of the masks.
    """
    boxes, scores, labels = entries
    known_boxes, known_labels, due = known
    if not len(scores):
        nothing = torch.zeros(len(known_boxes), device=known_boxes.device)
        nowhere = torch.full_like(known_boxes, torch.nan)
        return Found(known_boxes, nowhere, nothing, nothing > 0, nothing, nowhere[:, :2])
    overlap = torch.where(same_image, box_iou(boxes.float(), known_boxes), 0.0)  # (K, T)
    winners = (overlap * scores[:, None].float()).argmax(0)  # (T,)
    drawn = masks(winners)  # (T, h, w)
    return Found(
        known=known_boxes,
        boxes=boxes[winners].float(),
        box_overlap=overlap.gather(0, winners[None])[0],
        right=labels[winners] == known_labels,
        mask_overlap=_overlap(drawn, due),
        mask_offset=_apart(drawn, due) * stride,
    )


def _together(found: Sequence[Found]) -> Found:
    return Found(*(torch.cat([getattr(each, field.name) for each in found]) for field in fields(Found)))


def _overlap(masks: Tensor, due: Tensor) -> Tensor:
    """IoU (M,) of masks (M, h, w) bool."""
    union = (masks | due).flatten(1).sum(1)
    return (masks & due).flatten(1).sum(1) / union.clamp(min=1)


def _apart(masks: Tensor, due: Tensor) -> Tensor:
    """y, x (M, 2) in cells from the centres of due masks (M, h, w) bool to those of masks; NaN for none."""
    return centers(masks.float()) - centers(due.float())


def centers(weights: Tensor) -> Tensor:
    """Row and column (M, 2) of the centres of mass of weights (M, h, w); NaN where all are 0."""
    rows, columns = (torch.arange(n, device=weights.device, dtype=weights.dtype) for n in weights.shape[1:])
    row, column = (weights.sum(2) * rows).sum(1), (weights.sum(1) * columns).sum(1)  # (M,) each
    return torch.stack([row, column], 1) / weights.flatten(1).sum(1)[:, None]
