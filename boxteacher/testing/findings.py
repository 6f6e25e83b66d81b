"""How a check speaks: the model under test, and errors that name the check, the finding and the remedy."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from boxteacher.errors import InconclusiveError, InputError, ProtocolError
from boxteacher.protocol import PseudoMaskProvider


@dataclass(frozen=True)
class Subject:
    """A model under test, of C classes, and the relative difference allowed between two equal runs.

    `steps` counts the training steps that the kit has spent on it.
    """

    model: nn.Module
    num_classes: int
    tolerance: float
    steps: int = 0

    @property
    def provider(self) -> PseudoMaskProvider:
        return self.model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def copy(self, *, training: bool) -> "Subject":
        """The same with a copy of the model, in training or evaluation mode."""
        return replace(self, model=copy.deepcopy(self.model).train(training))

    def require_same(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], message: str) -> None:
        """Raises ProtocolError with the name of the first entry that differs by more than the tolerance."""
        for name, expected in theirs.items():
            same = ours[name].shape == expected.shape
            if same and expected.numel():
                apart = (ours[name].float() - expected.float()).abs().max()
                same = bool(apart <= self.tolerance * (expected.float().abs().max() + 1e-3))  # NaN differs
            require(same, f"{name} {message}")

    def require_tensor(
        self,
        name: str,
        value: object,
        shape: tuple[int, ...],
        kind: str,
        within: tuple[float, float] = (-math.inf, math.inf),
        remedy: str = "",
    ) -> Tensor:
        """The value, if it is a finite tensor of that shape, kind ("float" or "int64") and range."""
        if not isinstance(value, Tensor):
            raise ProtocolError(f"{name} is a {type(value).__name__}: return a tensor {shape}")
        require(value.shape == shape, f"{name} has shape {tuple(value.shape)}: return {shape}")
        fits = value.is_floating_point() if kind == "float" else value.dtype == torch.int64
        require(fits, f"{name} is {value.dtype}: return {kind}")
        moved = value.device == self.device
        require(moved, f"{name} is on {value.device}, the images on {self.device}: make it there")
        require(bool(value.isfinite().all()), f"{name} holds NaN or infinity: find what is divided by 0")
        low, high = (float(each) for each in value.detach().aminmax()) if value.numel() else within
        require(
            within[0] <= low and high <= within[1],
            f"{name} reaches from {low:g} to {high:g}, allowed is {within[0]:g} to {within[1]:g}: {remedy}",
        )
        return value


@contextmanager
def finding(model: nn.Module, check: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into one line that names the model and the check."""
    try:
        yield
    except InconclusiveError:
        raise
    except Exception as error:  # an adapter raises whatever its defect leads to
        first_line = (str(error).splitlines() or [""])[0]
        found = f"it raised {type(error).__name__} ({first_line}): make this case work"
        if isinstance(error, ProtocolError):
            found = str(error)
        elif isinstance(error, InputError):
            found = (
                f"it refuses sound images and targets ({first_line}): accept them, or give check_provider "
                "the model's own num_classes"
            )
        raise ProtocolError(f"{type(model).__name__} fails check_provider on {check}: {found}") from error


def require(condition: bool, message: str) -> None:
    """Raises ProtocolError with `message`, which says what was found and what to change."""
    if not condition:
        raise ProtocolError(message)


def not_learned(subject: Subject, found: str, remedy: str) -> InconclusiveError:
    """The verdict on what a sound model that learns slowly would show as well."""
    return InconclusiveError(
        f"{type(subject.model).__name__} has not learned enough in {subject.steps} steps for check_provider "
        f"to judge it: {found}; give steps={2 * max(subject.steps, 1)} or more, or a trained model, and "
        f"if that does not help: {remedy}"
    )


def require_finite_step(model: nn.Module, losses: Mapping[str, Tensor]) -> None:
    """Runs backward; raises ProtocolError unless losses and gradients are finite."""
    for name, loss in losses.items():
        require(
            bool(loss.isfinite()),
            f"{name} is {loss.item():g}: divide by max(count, 1), bound logarithms, use logits.float()",
        )
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    require(
        not broken,
        f"the gradient of {', '.join(broken[:3])} is NaN or infinite: bound what is divided by or rooted",
    )
