"""A copy that has learnt known boxes, since an untrained network may find nothing that could be looked at."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from boxteacher.supervision import MaskSupervised
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.placement import lands
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes

_STEPS = 200
_LOOK_EVERY = 20


def learn(subject: Subject) -> nn.Module:
    """A copy that was trained with drawn masks until known boxes land, or for 200 steps.

    Raises:
        ProtocolError: a loss is not finite, or a trainable parameter never got a gradient.
    """
    model = copy.deepcopy(subject.model)
    learner = MaskSupervised(model).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = dict(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-4, weight_decay=0.0)
    for step in range(_STEPS):
        with finding(subject.model, "training and its gradients"):
            losses = _losses(subject, learner, step)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
        silent = {name: p for name, p in silent.items() if p.grad is None or not bool(p.grad.any())}
        nn.utils.clip_grad_norm_(trained.values(), 5.0)
        optimizer.step()
        if step % _LOOK_EVERY == _LOOK_EVERY - 1 and lands(replace(subject, model=model)):
            break
    with finding(subject.model, "training and its gradients"):
        require(
            not silent,
            f"no gradient reaches {', '.join(list(silent)[:4])} ({len(silent)} of {len(trained)} trainable "
            "parameters): use them in a loss or in the mask logits, do not detach what they make, or freeze "
            "them with requires_grad_(False)",
        )
    return model


def _losses(subject: Subject, learner: nn.Module, step: int) -> dict[str, Tensor]:
    """Losses of the step's own batch; square and oblong canvases, one object and two, take turns."""
    odd = step % 2
    sizes, counts = (SQUARE, OBLONG)[odd], (1 + odd, 2)
    batch = known_boxes(subject.num_classes, subject.device, seed=step, sizes=sizes, counts=counts)
    losses: dict[str, Tensor] = learner(*batch)
    for name, loss in losses.items():
        require(bool(loss.isfinite()), f"{name} is {loss.item():g} at step {step}: find what divides by zero")
    return losses
