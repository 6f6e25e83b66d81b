"""The kernel under the two pair losses: −log P(a cell and its neighbour bear the same label).

With the logits x and y of a pair, −log P(same) = softplus(x) + softplus(y) − softplus(x + y)
(BoxInst, Eq. 4, in logits), whose gradient in x is σ(x) − σ(x + y). Only cells in a box and their
neighbours are looked at, each unordered pair once, in one pass for all losses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.losses.canvas import BoxCanvas, BoxRegions, box_canvases
from boxteacher.neighbours import Offset, neighbour_offsets, pair_slices

PairRelation = Callable[[BoxCanvas], Callable[[Offset], Tensor]]
"""Says which pairs on a canvas a loss is about: for each offset bool, as `pair_slices` lines the cells up."""


def pair_term(x: Tensor, y: Tensor) -> Tensor:
    """−log P(same label) of two cells with mask logits `x` and `y`; any shape, never negative."""
    return F.softplus(x) + F.softplus(y) - F.softplus(x + y)


def pair_sums(
    mask_logits: Tensor,
    regions: BoxRegions,
    relations: Sequence[PairRelation],
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Sums `pair_term` over each relation's pairs of a centre in the box and a valid neighbour.

    A pair counts twice if either cell can be the centre.

    Args:
        mask_logits: (M, h, w).
        regions: of the M masks.
        relations: one per loss, S of them, each symmetric in the two cells.
        kernel_size: side of the window of neighbours, odd.
        dilation: cells between neighbours in the window.

    Returns:
        sums (S, M), differentiable in `mask_logits`, and counts (S, M), the number of pairs.
    """
    sums, counts = _PairSums.apply(mask_logits, regions, relations, kernel_size, dilation)
    return sums, counts


class _PairSums(torch.autograd.Function):
    """Keeps one gradient per loss and cell of a box instead of what autograd would keep of every offset."""

    @staticmethod
    def forward(
        ctx: Any,
        mask_logits: Tensor,
        regions: BoxRegions,
        relations: Sequence[PairRelation],
        kernel_size: int,
        dilation: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(mask_logits.dtype, torch.float32)
        sums = mask_logits.new_zeros(len(relations), len(mask_logits), dtype=dtype)  # (S, M)
        counts = torch.zeros_like(sums)  # (S, M)
        offsets = neighbour_offsets(kernel_size, dilation)
        # One cell more than the farthest neighbour: relations may smooth over 3 × 3 cells.
        border = dilation * (kernel_size // 2) + 1
        grid = (mask_logits.shape[1], mask_logits.shape[2])
        canvases, gradients = [], []
        for canvas in box_canvases(regions.extents, grid, border):
            logits = canvas.pack(mask_logits).to(dtype)
            valid = canvas.pack(regions.valid, regions.image_index)
            related = [relation(canvas) for relation in relations]
            row_sums, row_counts, gradient = _sheet_sums(
                logits, canvas.in_box, valid, related, offsets[len(offsets) // 2 :]
            )
            sums.index_add_(1, canvas.mask, row_sums)
            counts.index_add_(1, canvas.mask, row_counts)
            if ctx.needs_input_grad[0]:
                canvases.append(canvas)
                gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        ctx.canvases = canvases
        ctx.logits = mask_logits.shape, mask_logits.dtype
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, sums_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.logits
        cells = torch.zeros(shape.numel() + 1, dtype=dtype, device=sums_gradient.device)
        for canvas, gradient in zip(ctx.canvases, ctx.saved_tensors, strict=True):  # (S, R, S)
            weight = sums_gradient[:, canvas.mask, None]  # (S, R, 1)
            canvas.unpack_into(cells, (gradient * weight).sum(0))
        return cells[:-1].view(shape), None, None, None, None


def _sheet_sums(
    logits: Tensor,
    in_box: Tensor,
    valid: Tensor,
    related: Sequence[Callable[[Offset], Tensor]],
    offsets: Sequence[Offset],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts (S, R) of each row's pairs, and the sums' gradient (S, R, columns), on one canvas.

    Args:
        logits: (R, columns).
        in_box: (R, columns) bool.
        valid: (R, columns) bool.
        related: one per loss.
        offsets: one of each two opposite ones; rows down, not up.
    """
    sums = logits.new_zeros(len(related), len(logits))  # (S, R)
    counts = torch.zeros_like(sums)  # (S, R)
    # Σ weight · (σ(x) − σ(x + y)) over a cell's pairs is degree · σ(x) − Σ weight · σ(x + y).
    degree = logits.new_zeros(len(related), *logits.shape)  # (S, R, columns)
    gradient = torch.zeros_like(degree)  # (S, R, columns)
    softplus = F.softplus(logits)
    for offset in offsets:
        here, there = pair_slices(offset)
        both = logits[here] + logits[there]
        term = softplus[here] + softplus[there] - F.softplus(both)
        same = torch.sigmoid(both)
        centres = (in_box[here] & valid[there]).to(torch.uint8) + (in_box[there] & valid[here])
        for s, relation in enumerate(related):
            weight = (centres * relation(offset)).to(logits.dtype)
            sums[s, here[0]] += (term * weight).sum(1)
            counts[s, here[0]] += weight.sum(1)
            weighted = weight * same
            for cells in (here, there):
                degree[s][cells] += weight
                gradient[s][cells] -= weighted
    return sums, counts, gradient.addcmul_(degree, torch.sigmoid(logits))
