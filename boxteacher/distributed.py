"""Counts over all processes of a run."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_count(count: Tensor) -> Tensor:
    """A loss's normalizer over all processes, divided by their number; the count itself in one process.

    `DistributedDataParallel` averages gradients over the processes. A sum of losses that is divided by this
    therefore has the gradient that one process with the whole batch would compute. Every process must call
    it the same number of times in the same order, also with a count of 0.

    Args:
        count: of this process, any shape, without gradient.

    Returns:
        Of the same shape; floating point if there are several processes.
    """
    if num_processes() == 1:
        return count
    total = count.detach().to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / num_processes()


def global_mean(values: Tensor) -> Tensor:
    """The sum of this process's values (N,) over the global count of values; 0 without values."""
    count = torch.full((), len(values), device=values.device)
    return values.sum() / global_count(count).clamp(min=1)
