"""The best few of each group, without a loop over groups."""

import torch
from torch import Tensor


def rank_in_group(group: Tensor, score: Tensor) -> Tensor:
    """The number of entries of the same group with a higher score; of equal ones, the earlier is higher.

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
    rank[order] = torch.arange(group.shape[0], device=group.device) - first
    return rank


def share_evenly(
    image_index: Tensor, target_index: Tensor, score: Tensor, num_images: int, max_samples: int
) -> Tensor:
    """Samples that are kept: at most `max_samples` per image, shared evenly by its targets.

    A target keeps those with the highest scores, up to `max_samples` over the number of targets of its image
    that have a sample, and at least one, even if an image has more targets than `max_samples`.

    Args:
        image_index: (P,) int64 of each sample, in 0 … num_images − 1.
        target_index: (P,) int64 of each sample; no two images share a target.
        score: (P,), the higher the better.
        num_images: of the batch.
        max_samples: number of samples per image, at least 1.

    Returns:
        (M,) int64 in ascending order, M ≤ P.
    """
    rank = rank_in_group(target_index, score)  # (P,)
    zeros = torch.zeros(num_images, dtype=torch.int64, device=rank.device)
    targets = zeros.index_add(0, image_index, (rank == 0).to(rank))  # (num_images,) that have a sample
    share = (max_samples // targets.clamp(min=1)).clamp(min=1)
    return (rank < share[image_index]).nonzero()[:, 0]
