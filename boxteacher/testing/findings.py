"""How a check speaks: the model under test, and errors that name the check, the finding and the remedy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from boxteacher.errors import InputError, ProtocolError
from boxteacher.protocol import PseudoMaskProvider


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        model: follows `PseudoMaskProvider`.
        num_classes: C.
        tolerance: relative difference allowed between two runs that ought to agree.
    """

    model: nn.Module
    num_classes: int
    tolerance: float

    @property
    def provider(self) -> PseudoMaskProvider:
        return self.model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def twin(self, *, training: bool) -> "Subject":
        """The same with a copy of the model, in training or evaluation mode."""
        return replace(self, model=copy.deepcopy(self.model).train(training))

    def differ(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether two tensors are further apart than the tolerance allows."""
        if ours.shape != theirs.shape:
            return True
        if not ours.numel():
            return False
        greatest = theirs.abs().max().float()
        apart = (ours.float() - theirs.float()).abs().max()
        return not bool(apart <= self.tolerance * (greatest + 1e-3))  # NaN differs


class FindingError(ProtocolError):
    """A ProtocolError that names its model and check already."""


@contextmanager
def finding(model: nn.Module, check: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line that names the model and the (innermost) check."""
    try:
        yield
    except FindingError:
        raise
    except ProtocolError as error:
        raise FindingError(f"{type(model).__name__} fails check_provider on {check}: {error}") from error
    except InputError as error:
        raise FindingError(
            f"{type(model).__name__} fails check_provider on {check}: it refuses sound images and targets "
            f"({first_line(error)}): accept them, or give check_provider the model's own num_classes"
        ) from error
    except Exception as error:  # an adapter raises whatever its defect leads to
        raise FindingError(
            f"{type(model).__name__} fails check_provider on {check}: it raised {type(error).__name__} "
            f"({first_line(error)}): make this case work"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of its message; empty if it has none."""
    return (str(error).splitlines() or [""])[0]


def require(condition: bool, message: str) -> None:
    """Raises ProtocolError with `message`, which says what was found and what to change."""
    if not condition:
        raise ProtocolError(message)


def require_tensor(
    name: str, value: object, shape: tuple[int, ...], kind: str, device: torch.device
) -> Tensor:
    """The value, if it is a finite tensor of that shape and kind ("float" or "int64") on that device."""
    if not isinstance(value, Tensor):
        raise ProtocolError(f"{name} is a {type(value).__name__}: return a tensor {shape}")
    require(tuple(value.shape) == shape, f"{name} has shape {tuple(value.shape)}: return {shape}")
    fits = value.is_floating_point() if kind == "float" else value.dtype == torch.int64
    require(fits, f"{name} is {value.dtype}: return {kind}")
    require(value.device == device, f"{name} is on {value.device}, the images on {device}: make it there")
    require(
        bool(value.isfinite().all()), f"{name} holds NaN or infinity: find what divides by zero or overflows"
    )
    return value


def require_within(name: str, value: Tensor, least: float, most: float, remedy: str) -> None:
    """Raises ProtocolError unless every entry lies in [least, most]."""
    if value.numel():
        low, high = float(value.min()), float(value.max())
        require(
            least <= low and high <= most,
            f"{name} reaches from {low:g} to {high:g}, allowed is {least:g} to {most:g}: {remedy}",
        )
