"""The kernel under the two pair losses: −log P(a cell and its neighbour bear the same label).

With the logits x and y of a pair, −log P(same) = softplus(x) + softplus(y) − softplus(x + y)
(BoxInst, Eq. 4, in logits). A loss says which pairs count; the sum over them is one pass for all losses.
Each unordered pair is computed once: the weights of both its orders are added before they meet the term.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.neighbours import Offset, neighbour_offsets, pair_slices

PairSelection = Callable[[Offset], Tensor]
"""Maps an offset to (M, h, w) bool: which cells, as centres, count their neighbour at that offset."""


def pair_term(x: Tensor, y: Tensor) -> Tensor:
    """−log P(same label) of two cells with mask logits `x` and `y`; any shape, never negative."""
    return F.softplus(x) + F.softplus(y) - F.softplus(x + y)


def pair_sums(
    mask_logits: Tensor, selections: Sequence[PairSelection], kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Sums `pair_term` over the pairs that each loss selects.

    Args:
        mask_logits: (M, h, w).
        selections: one per loss, S of them. Pairs that reach outside the grid never count.
        kernel_size: side of the window of neighbours, odd.
        dilation: cells between neighbours in the window.

    Returns:
        sums (S, M), differentiable in `mask_logits`, and counts (S, M), the number of selected pairs.
    """
    offsets = neighbour_offsets(kernel_size, dilation)
    sums, counts = _PairSums.apply(mask_logits, selections, offsets[: len(offsets) // 2])
    return sums, counts


class _PairSums(torch.autograd.Function):
    """Keeps one gradient map per loss instead of what autograd would keep of every offset."""

    @staticmethod
    def forward(
        ctx: Any, mask_logits: Tensor, selections: Sequence[PairSelection], offsets: list[Offset]
    ) -> tuple[Tensor, Tensor]:
        logits = mask_logits.double() if mask_logits.dtype == torch.float64 else mask_logits.float()
        shape = (len(selections), *logits.shape)
        sums = logits.new_zeros(shape[:2])  # (S, M)
        counts = logits.new_zeros(shape[:2])  # (S, M)
        gradients = logits.new_zeros(shape if ctx.needs_input_grad[0] else 0)  # (S, M, h, w)
        for offset in offsets:
            here, there = pair_slices(offset)
            x, y = logits[:, here[0], here[1]], logits[:, there[0], there[1]]
            term = pair_term(x, y)
            if ctx.needs_input_grad[0]:
                same = torch.sigmoid(x + y)
                x_gradient, y_gradient = torch.sigmoid(x) - same, torch.sigmoid(y) - same
            opposite = (-offset[0], -offset[1])
            for s, selected in enumerate(selections):
                weight = selected(offset)[:, here[0], here[1]].to(term.dtype)
                weight = weight + selected(opposite)[:, there[0], there[1]]
                sums[s] += (term * weight).sum((1, 2))
                counts[s] += weight.sum((1, 2))
                if ctx.needs_input_grad[0]:
                    gradients[s, :, here[0], here[1]] += weight * x_gradient
                    gradients[s, :, there[0], there[1]] += weight * y_gradient
        ctx.save_for_backward(gradients)
        ctx.logits_dtype = mask_logits.dtype
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, sums_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors  # (S, M, h, w)
        return torch.einsum("sm,smhw->mhw", sums_gradient, gradients).to(ctx.logits_dtype), None, None
