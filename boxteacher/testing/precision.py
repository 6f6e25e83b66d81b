"""Other ways to run the same network: half precision, and compiled."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from boxteacher.supervision import MaskSupervised
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import known_boxes

_HALF = 0.05  # mean difference of mask probabilities that half precision may make


def check_half_precision(subject: Subject) -> None:
    """Checks a step under bfloat16 autocast: losses and gradients finite, masks like those in float32."""
    images, targets = known_boxes(subject.num_classes, subject.device, seed=8)
    with finding(subject.model, "half precision"):
        model = MaskSupervised(copy.deepcopy(subject.model)).train()
        with torch.autocast(subject.device.type, torch.bfloat16):
            losses = model(images, targets)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        for name, loss in losses.items():
            require(
                bool(loss.isfinite()),
                f"{name} is {loss.item():g} under autocast: compute it on logits.float()",
            )
        total.backward()
        broken = [
            name
            for name, p in model.student.named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        require(
            not broken,
            f"gradients of {', '.join(broken[:3])} are not finite under autocast: use float32 there",
        )
        whole = _candidates(subject, images)
        with torch.autocast(subject.device.type, torch.bfloat16):
            half = _candidates(subject, images)
        _check_close(*whole, *half)


def check_compiled(subject: Subject) -> None:
    """Checks that a compiled `forward_student` and evaluation call give what the plain ones give."""
    images, targets = known_boxes(subject.num_classes, subject.device, seed=9, sizes=((64, 64),), counts=(1,))
    with finding(subject.model, "torch.compile of forward_student"):
        plain, compiled = (_losses(subject, images, targets, run) for run in (_as_it_is, _compiled))
        for name in plain:
            require(
                not subject.differ(compiled[name], plain[name]),
                f"{name} is {float(compiled[name]):g} compiled, {float(plain[name]):g} not: avoid "
                "Python side effects "
                "in forward, or do not claim compiles=True",
            )
    with finding(subject.model, "torch.compile of the evaluation call"), torch.no_grad():
        model = subject.twin(training=False).model
        for theirs, ours in zip(model(images), _compiled(model)(images), strict=True):
            for key in ("scores", "boxes", "masks"):
                require(
                    not subject.differ(ours[key], theirs[key]),
                    f"{key} differ when compiled: avoid Python side effects in forward, or do not "
                    "claim compiles=True",
                )


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traced as torch.compile does, forward and backward, but run without a C++ compiler."""
    return torch.compile(function, backend="aot_eager")


def _losses(
    subject: Subject, images: list[Tensor], targets: Any, run: Callable[..., Any]
) -> dict[str, Tensor]:
    twin = subject.twin(training=True)
    torch.manual_seed(7)
    output = run(twin.provider.forward_student)(images, targets)
    torch.stack([*output.losses.values(), *(masks.logits.mean() for masks in output.masks)]).sum().backward()
    logits = {
        f"the mean mask logit of round {i}": masks.logits.mean() for i, masks in enumerate(output.masks)
    }
    return {name: value.detach() for name, value in {**output.losses, **logits}.items()}


def _candidates(subject: Subject, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Score and mask probabilities (h, w) of the best candidate of image 0."""
    with torch.no_grad():
        candidates = subject.twin(training=False).provider.forward_teacher(images)
        mine = (candidates.image_index == 0).nonzero()[:, 0]
        best = mine[candidates.scores[mine].argmax()][None]
        return candidates.scores[best], candidates.own_masks(best)[0].float().sigmoid()


def _check_close(score: Tensor, mask: Tensor, half_score: Tensor, half_mask: Tensor) -> None:
    difference = float((mask - half_mask).abs().mean())
    require(
        difference < _HALF and abs(float(score) - float(half_score)) < 2 * _HALF,
        f"under bfloat16 autocast the best candidate scores {float(half_score):.2f} instead of "
        f"{float(score):.2f}, and "
        f"its mask probabilities are off by {difference:.2f} on average: keep coordinates and "
        "dynamic filters in "
        "float32 (boxteacher.precision.full_precision)",
    )
