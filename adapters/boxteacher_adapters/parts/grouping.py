"""The best few of each group, without a loop over groups."""

import torch
from torch import Tensor


def rank_in_group(group: Tensor, score: Tensor) -> Tensor:
    """How many entries of an entry's own group have a higher score (ties: the earlier entry is higher).

    Args:
        group: (N,) int64.
        score: (N,).

    Returns:
        (N,) int64, 0 for the best of each group.
    """
    by_score = score.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]  # (N,) groups together, best first
    sorted_group = group[order]
    first = torch.searchsorted(sorted_group, sorted_group)  # (N,) where each entry's group begins
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - first
    return rank
