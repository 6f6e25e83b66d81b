"""The optimizer of a run, and how its learning rate goes."""

import logging
import math
from bisect import bisect_right

import torch
from torch import nn

from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

_SGD_MOMENTUM = 0.9


def build_optimizer(student: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW or SGD for the parameters that are trained.

    Only the weights of linear and convolutional layers decay: not biases and norms, and not what is learnt as
    a place or a table, such as queries, anchors and embeddings, which decay would pull to one point.

    Raises:
        InputError: the backbone has a learning rate of its own, and `student` has no `backbone`.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    body = [(name, p) for name, p in named if name.startswith("backbone.")]
    head = [(name, p) for name, p in named if not name.startswith("backbone.")]
    tables = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    if settings.backbone_lr_factor != 1 and not body:
        raise InputError(
            f"backbone_lr_factor is {settings.backbone_lr_factor}, and no parameter of {settings.model} that "
            "is trained is called backbone.…: leave --backbone-lr-factor out"
        )

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and name.endswith("weight") and id(parameter) not in tables

    groups = [
        {
            "params": [p for name, p in parameters if decays(name, p) == decayed],
            "lr": lr,
            "weight_decay": decay,
        }
        for parameters, lr in ((head, settings.lr), (body, settings.lr * settings.backbone_lr_factor))
        for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=_SGD_MOMENTUM)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=named[0][1].device.type in ("cpu", "cuda"))


def build_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up; then down to a tenth at each of `lr_steps`, or, without any, in a cosine to nothing."""
    settings = settings.resolved()
    warmup = settings.lr_warmup_steps or 0
    if settings.lr_steps and settings.lr_steps[0] >= settings.steps:
        logger.warning(
            "the learning rate never falls: lr_steps begin at %d, the run ends at %d",
            settings.lr_steps[0],
            settings.steps,
        )

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, warmup))
        if settings.lr_steps:
            return rise * 0.1 ** bisect_right(settings.lr_steps, step)
        angle = math.pi * max(0, step - warmup) / max(1, settings.steps - warmup)
        return rise * 0.5 * (1 + math.cos(angle))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
