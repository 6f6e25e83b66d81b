"""The entries that are found for known boxes, and how far they and their masks are off."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.protocol import Candidates
from boxteacher.targets import GridTargets, box_masks, grid_targets
from boxteacher.testing.findings import Subject
from boxteacher.testing.outputs import decode
from boxteacher.testing.scenes import Batch


@dataclass(frozen=True)
class Found:
    """For each known box the entry of its image whose score times IoU is highest."""

    known: Tensor  # (T, 4) known boxes in pixels
    boxes: Tensor  # (T, 4) boxes that were found; NaN where there is no entry at all
    box_overlap: Tensor  # (T,) IoU
    known_labels: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64; −1 where there is no entry at all
    mask_overlap: Tensor  # (T,) IoU of the mask and the known one
    cut_overlap: Tensor  # (T,) IoU of the mask and the known one, as far as that lies in the found box
    mask_offset: Tensor  # (T, 2) y, x in pixels from the known mask's center; NaN for an empty mask


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
        unlabeled = torch.full_like(truth.labels, -1)
        return Found(known, nowhere, nothing, truth.labels, unlabeled, nothing, nothing, nowhere[:, :2])
    overlap = box_iou(entries.boxes.float(), known)  # (K, T)
    overlap = torch.where(entries.image_index[:, None] == truth.image_index, overlap, 0.0)
    best = (overlap * entries.scores[:, None].float()).argmax(0)  # (T,)
    masks = decode(subject, entries, grid, best, known, truth.labels) > 0  # (T, h, w)
    boxes = entries.boxes[best].float()  # (T, 4)
    return Found(
        known,
        boxes,
        overlap.gather(0, best[None])[0],
        truth.labels,
        entries.labels[best],
        mask_iou(masks, truth.masks),
        mask_iou(masks, truth.masks & box_masks(boxes, *grid.coordinates(boxes.device))),
        mask_offsets(masks, truth.masks, grid),
    )


def mask_offsets(masks: Tensor, known: Tensor, grid: MaskGrid) -> Tensor:
    """y, x (M, 2) in pixels from the centers of known masks (M, h, w) bool to those of the masks."""
    return (mask_centers(masks) - mask_centers(known)) * grid.stride


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """IoU (M,) of each of the masks (M, h, w) bool with the other at its place."""
    union = (masks | others).flatten(1).sum(1)
    return (masks & others).flatten(1).sum(1) / union.clamp(min=1)


def mean_box_iou(boxes: Tensor, others: Tensor) -> float:
    """Mean IoU of each of the boxes (T, 4) with the other at its place."""
    return float(box_iou(boxes, others).diagonal().mean())


def box_offset(found: Found) -> Tensor:
    """Median y, x (2,) in pixels from the known boxes' centers to those of the boxes found."""
    return (found.boxes - found.known).unflatten(1, (2, 2)).mean(1).nanmedian(0).values.flip(0)


def mask_centers(masks: Tensor) -> Tensor:
    """Row and column (M, 2) of the centers of masks (M, h, w) bool; NaN for an empty one."""
    rows, columns = (torch.arange(n, device=masks.device) for n in masks.shape[1:])
    row, column = (masks.sum(2) * rows).sum(1), (masks.sum(1) * columns).sum(1)  # (M,) each
    return torch.stack([row, column], 1) / masks.flatten(1).sum(1)[:, None]
