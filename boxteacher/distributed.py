"""Counts over all processes of a run."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_count(count: Tensor, minimum: float = 0.0) -> Tensor:
    """A normalizer: the mean of a count over all processes, which in one process is the count itself.

    `DistributedDataParallel` averages gradients over the processes. A sum of losses that is divided by this
    therefore has the gradient that one process with the whole batch would compute. Every process must call
    it the same number of times in the same order, also with a count of 0.

    Args:
        count: count of this process, of any shape, at least 0.
        minimum: minimum of the sum over all processes, so that nothing is divided by 0.

    Returns:
        Of the same shape; floating point if there are several processes or a minimum.
    """
    processes = num_processes()
    if processes > 1:
        total = count.detach().to(torch.float32, copy=True)
        dist.all_reduce(total)
        count = total / processes
    return count.clamp(min=minimum / processes) if minimum else count


def global_mean(values: Tensor) -> Tensor:
    """The sum of this process's values (N,) over the global count of values; 0 without values."""
    count = torch.full((), len(values), device=values.device)
    return values.sum() / global_count(count, minimum=1)
