"""Optimizer and learning rate of a run."""

import logging

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

_SGD_MOMENTUM = 0.9


def build_optimizer(student: nn.Module, settings: TrainSettings) -> Optimizer:
    """AdamW or SGD for the parameters that are trained.

    By default only the weights of linear and convolutional layers decay. Biases, norms, and learned queries,
    anchors and embeddings do not: weight decay would make these equal to one another.

    Raises:
        InputError: `backbone_lr_factor` is not 1, and `student` has no `backbone` that is trained.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    body = [(name, p) for name, p in named if name.startswith("backbone.")]
    head = [(name, p) for name, p in named if not name.startswith("backbone.")]
    embeddings = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    if settings.backbone_lr_factor != 1 and not body:
        raise InputError(
            f"backbone_lr_factor is {settings.backbone_lr_factor}, but {settings.model} has no trainable "
            "parameter backbone.…: leave --backbone-lr-factor out"
        )

    def decays(name: str, parameter: nn.Parameter) -> bool:
        if settings.decayed == "all":
            return True
        return parameter.ndim > 1 and name.endswith("weight") and id(parameter) not in embeddings

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
        return SGD(groups, lr=settings.lr, momentum=_SGD_MOMENTUM)
    return AdamW(groups, lr=settings.lr, fused=named[0][1].device.type in ("cpu", "cuda"))


def build_schedule(optimizer: Optimizer, settings: TrainSettings) -> LRScheduler:
    """Linear warm-up; then a division by 10 after each of `lr_steps`, or, without any, cosine decay to 0."""
    warmup, milestones = settings.lr_warmup_steps, settings.lr_steps
    if milestones and milestones[0] >= settings.steps:
        logger.warning(
            "the learning rate never falls: the first of lr_steps is %d, the run ends at %d",
            milestones[0],
            settings.steps,
        )
    decay: LRScheduler = (
        MultiStepLR(optimizer, milestones, gamma=0.1)
        if milestones
        else CosineAnnealingLR(optimizer, T_max=max(1, settings.steps - warmup))
    )
    if warmup == 0:
        return decay
    # The k-th step of the warm-up, counted from 1, has k / warmup of the peak rate.
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    if milestones:
        return ChainedScheduler([rise, decay])
    return SequentialLR(optimizer, [rise, decay], milestones=[warmup])
