"""Mask2Former's Hungarian matching of queries to targets, by boxes or by annotated masks."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.adapter import GridTargets, InputError
from boxteacher_adapters.parts.maps import projection_boxes

_CLASS_COST = 2.0
_BOX_COST = 5.0
_PROJECTION_COST = 5.0
_PIXEL_COST = 5.0
_DICE_COST = 5.0


@dataclass(frozen=True)
class MatchingTargets:
    """The targets of B images in N slots each, where N is the maximum number of targets in an image.

    Attributes:
        slot: (T,) int64, the slot of each target of the batch; the slots after an image's own are blank.
        labels: (B, N) int64.
        boxes: (B, N, 4) in grid cells.
        rows: (B, N, h) of {0., 1.}, the box's projection onto the grid's rows.
        columns: (B, N, w) of {0., 1.}, the box's projection onto the grid's columns.
        masks: (B, N, h, w) of {0., 1.}; None if no target has one.
        has_mask: (B, N) bool.
    """

    slot: Tensor
    labels: Tensor
    boxes: Tensor
    rows: Tensor
    columns: Tensor
    masks: Tensor | None
    has_mask: Tensor


def matching_targets(
    grid: GridTargets, counts: Sequence[int], mask_stride: int, with_masks: bool
) -> MatchingTargets:
    """Sorts a batch's targets into slots.

    Args:
        grid: T targets laid end to end.
        counts: number of targets of each image.
        mask_stride: pixels per grid cell.
        with_masks: whether any target may have an annotated mask.
    """
    slot = torch.cat([torch.arange(count) for count in counts]).to(grid.boxes.device)  # (T,)

    def sorted_in(values: Tensor) -> Tensor:
        table = values.new_zeros(len(counts), max(counts), *values.shape[1:])
        table[grid.image_index, slot] = values
        return table

    return MatchingTargets(
        slot=slot,
        labels=sorted_in(grid.labels),
        boxes=sorted_in(grid.boxes.float() / mask_stride),
        rows=sorted_in(grid.box_masks.any(2).float()),
        columns=sorted_in(grid.box_masks.any(1).float()),
        masks=sorted_in(grid.masks.float()) if with_masks else None,
        has_mask=sorted_in(grid.mask_confidence > 0),
    )


def matching_cost(class_logits: Tensor, mask_logits: Tensor, targets: MatchingTargets) -> Tensor:
    """Cost of assigning each query to each target, (B, Q, N).

    A target with an annotated mask costs 2 · class + 5 · cross-entropy + 5 · Dice (Mask2Former, CVPR 2022,
    Sec. 4.1), here over the whole grid. One that has a box alone costs 2 · class + 5 · box + 5 · projection:
    the L1 distance between the box and the predicted mask's extent in fractions of the padded batch's size
    (as DETR's), and the Dice distance between their max-projections, added over both axes (BoxInst, CVPR
    2021, Eq. 3).

    Args:
        class_logits: (B, Q, C + 1).
        mask_logits: (B, Q, h, w).
        targets: targets of the B images.
    """
    labels = targets.labels[:, None].expand(-1, class_logits.shape[1], -1)  # (B, Q, N)
    cost = -_CLASS_COST * class_logits.float().softmax(-1).gather(2, labels)
    logits = mask_logits.float()
    probability = logits.sigmoid()  # (B, Q, h, w)
    rows, columns = probability.amax(3), probability.amax(2)  # (B, Q, h), (B, Q, w)
    extent = projection_boxes(*(each > each.amax(2, keepdim=True) / 2 for each in (rows, columns)))
    size = extent.new_tensor([logits.shape[3], logits.shape[2]]).repeat(2)  # (4,)
    box = torch.cdist(extent / size, targets.boxes / size, p=1)  # (B, Q, N)
    projection = _dice(rows, targets.rows) + _dice(columns, targets.columns)  # (B, Q, N)
    from_box = _BOX_COST * box + _PROJECTION_COST * projection
    if targets.masks is None:
        return cost + from_box
    masks = targets.masks.flatten(2)  # (B, N, h · w)
    flat = logits.flatten(2)  # (B, Q, h · w)
    # The cross-entropy of logit x with t is softplus(x) − x · t.
    pixel = F.softplus(flat).mean(2, keepdim=True) - flat @ masks.transpose(1, 2) / flat.shape[2]
    from_mask = _PIXEL_COST * pixel + _DICE_COST * _dice(probability.flatten(2), masks)
    return cost + torch.where(targets.has_mask[:, None], from_mask, from_box)


def _dice(probability: Tensor, truth: Tensor) -> Tensor:
    """1 − (2 Σpt + 1) / (Σp + Σt + 1) of each (B, Q, K) with each (B, N, K): (B, Q, N)."""
    both = probability @ truth.transpose(1, 2)  # (B, Q, N)
    either = probability.sum(2)[:, :, None] + truth.sum(2)[:, None]  # (B, Q, N)
    return 1 - (2 * both + 1) / (either + 1)


def assign(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """The queries of the targets with the minimum sum of costs, each query for one target at most.

    Synchronizes with the device once: the costs of all images and decoder layers are moved together, and the
    assignment is found on the CPU.

    Args:
        costs: (R, B, Q, N) of R decoder layers; slots after an image's own targets are ignored.
        counts: number of targets of each image, at most Q.

    Returns:
        (R, T) int64, the targets of all images laid end to end.

    Raises:
        InputError: scipy is not installed.
    """
    check_scipy()
    from scipy.optimize import linear_sum_assignment

    # A network that has diverged gets some assignment, so that its loss is what is reported.
    table = costs.detach().nan_to_num().cpu().numpy()
    layers = []
    for layer_costs in table:
        queries = [
            torch.from_numpy(linear_sum_assignment(cost[:, :count].T)[1])
            for cost, count in zip(layer_costs, counts, strict=True)
        ]
        layers.append(torch.cat(queries))
    return torch.stack(layers).to(costs.device)


def check_scipy() -> None:
    """Raises InputError if scipy, which training needs, is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "Mask2Former is trained with scipy's linear_sum_assignment: install boxteacher[mask2former]"
        )
