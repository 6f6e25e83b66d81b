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
    rank[order] = torch.arange(group.shape[0], device=group.device) - first
    return rank


def share_evenly(image: Tensor, target: Tensor, score: Tensor, num_images: int, most: int) -> Tensor:
    """Which samples have their masks drawn where an image must not have more than so many.

    An image that has too many gives each of its targets the same number, that target's best; a target
    keeps at least one, even if an image has more targets than `most`.

    Args:
        image: (P,) int64 of each sample, in 0 … num_images − 1.
        target: (P,) int64 of each sample; no two images share a target.
        score: (P,), the higher the better.
        num_images: of the batch.
        most: samples per image, at least 1.

    Returns:
        (M,) int64 in rising order, M ≤ P.
    """
    rank = rank_in_group(target, score)  # (P,)
    none = torch.zeros(num_images, dtype=torch.int64, device=image.device)
    samples = none.index_add(0, image, torch.ones_like(image))  # (num_images,)
    targets = none.index_add(0, image, (rank == 0).to(image))  # (num_images,) that have a sample
    share = (most // targets.clamp(min=1)).clamp(min=1)
    return ((samples <= most)[image] | (rank < share[image])).nonzero()[:, 0]
