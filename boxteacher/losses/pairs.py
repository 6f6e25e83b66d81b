"""The kernel of both pair losses: −log P(a cell and its neighbor have the same label).

With the logits x and y of a pair, −log P(same) = softplus(x) + softplus(y) − softplus(x + y)
(BoxInst, Eq. 4, in logits), whose gradient in x is σ(x) − σ(x + y). Only cells in a box and their neighbors
are looked at, each unordered pair once, in one pass for all losses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.grid import NEIGHBOR_DILATION, Offset, neighbor_offsets, pair_slices
from boxteacher.losses.packing import BoxRegions, PackedBoxes, pack_boxes

PairRelation = Callable[[PackedBoxes], Callable[[Offset], Tensor]]
"""Says which pairs of packed boxes a loss is about: bool for each offset, in the order of `pair_slices`."""

_BORDER = NEIGHBOR_DILATION + 1  # one cell beyond the neighbors: relations may smooth over 3 × 3 cells
_OFFSETS = neighbor_offsets()[4:]  # one of each two opposite ones; rows down, not up


def pair_term(x: Tensor, y: Tensor) -> Tensor:
    """−log P(same label) of two cells with mask logits `x` and `y`; any shape, never negative."""
    return F.softplus(x) + F.softplus(y) - F.softplus(x + y)


def pair_sums(
    mask_logits: Tensor, regions: BoxRegions, relations: Sequence[PairRelation]
) -> tuple[Tensor, Tensor]:
    """Sums `pair_term` over each relation's pairs of a center in the box and a valid neighbor.

    A pair counts twice if either cell can be the center.

    Args:
        mask_logits: (M, h, w).
        regions: of the M masks.
        relations: one per loss, L of them, each symmetric in the two cells.

    Returns:
        sums (L, M), differentiable in `mask_logits`, and counts (L, M), the number of pairs.
    """
    sums, counts = _PairSums.apply(mask_logits, regions, relations)
    return sums, counts


class _PairSums(torch.autograd.Function):
    """Keeps one gradient per loss and cell of a box instead of what autograd would keep of every offset."""

    @staticmethod
    def forward(
        ctx: Any, mask_logits: Tensor, regions: BoxRegions, relations: Sequence[PairRelation]
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(mask_logits.dtype, torch.float32)
        sums = mask_logits.new_zeros(len(relations), len(mask_logits), dtype=dtype)  # (L, M)
        counts = torch.zeros_like(sums)  # (L, M)
        grid = (mask_logits.shape[1], mask_logits.shape[2])
        packings, gradients = [], []
        for packed in pack_boxes(regions.extents, grid, _BORDER):
            logits = packed.pack(mask_logits).to(dtype)  # (R, S)
            valid = packed.pack(regions.valid, regions.image_index)  # (R, S)
            related = [relation(packed) for relation in relations]
            row_sums, row_counts, gradient = _packed_sums(logits, packed.in_box, valid, related)
            sums.index_add_(1, packed.mask, row_sums)
            counts.index_add_(1, packed.mask, row_counts)
            if ctx.needs_input_grad[0]:
                packings.append(packed)
                gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        ctx.packings = packings
        ctx.logits = mask_logits.shape, mask_logits.dtype
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, sums_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.logits
        cells = torch.zeros(shape.numel() + 1, dtype=dtype, device=sums_gradient.device)
        for packed, gradient in zip(ctx.packings, ctx.saved_tensors, strict=True):  # (L, R, S)
            weight = sums_gradient[:, packed.mask, None]  # (L, R, 1)
            packed.unpack_into(cells, (gradient * weight).sum(0))
        return cells[:-1].view(shape), None, None


def _packed_sums(
    logits: Tensor, in_box: Tensor, valid: Tensor, related: Sequence[Callable[[Offset], Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts (L, R) of each row's pairs, and the gradient (L, R, S) of the sums.

    Args:
        logits: (R, S).
        in_box: (R, S) bool.
        valid: (R, S) bool.
        related: the relation of each loss on these packed boxes.
    """
    sums = logits.new_zeros(len(related), len(logits))  # (L, R)
    counts = torch.zeros_like(sums)  # (L, R)
    # Σ weight · (σ(x) − σ(x + y)) over a cell's pairs is degree · σ(x) − Σ weight · σ(x + y).
    degree = logits.new_zeros(len(related), *logits.shape)  # (L, R, S)
    gradient = torch.zeros_like(degree)  # (L, R, S)
    softplus = F.softplus(logits)
    for offset in _OFFSETS:
        here, there = pair_slices(offset)
        both = logits[here] + logits[there]
        term = softplus[here] + softplus[there] - F.softplus(both)
        same = torch.sigmoid(both)
        centers = (in_box[here] & valid[there]).to(torch.uint8) + (in_box[there] & valid[here])
        for i, relation in enumerate(related):
            weight = (centers * relation(offset)).to(logits.dtype)
            sums[i, here[0]] += (term * weight).sum(1)
            counts[i, here[0]] += weight.sum(1)
            weighted = weight * same
            for cells in (here, there):
                degree[i][cells] += weight
                gradient[i][cells] -= weighted
    return sums, counts, gradient.addcmul_(degree, torch.sigmoid(logits))
