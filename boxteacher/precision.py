"""Parts that half precision would ruin, and parts that it only makes faster."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off on that device."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """A context in which that device computes in that type; None leaves everything as it is."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
