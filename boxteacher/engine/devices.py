"""Devices: picked by name, and batches moved to them."""

from typing import Any

import torch
from torch import Tensor

from boxteacher.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}): give --device auto or cpu") from error
    return device


def to_device(
    images: list[Tensor], targets: list[dict[str, Any]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A batch with all its tensors on the device."""
    moved = [
        {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in t.items()
        }
        for t in targets
    ]
    return [image.to(device, non_blocking=True) for image in images], moved
