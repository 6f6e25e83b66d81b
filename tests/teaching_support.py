"""A `BoxTeacher` of a segmenter with scripted candidates, and a batch for it."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher import BoxTeacher, EMATeacher
from tests.support import (
    Script,
    ScriptedSegmenter,
    filled,
    script,
    seeded_images,
    target,
)

BOX_LOSSES = {"loss_class", "loss_projection", "loss_pairwise"}
TEACHER_LOSSES = BOX_LOSSES | {"loss_pixel", "loss_affinity"}


def teacher_of(plan: Script | None = None, samples: int = 1, layers: int = 1, **settings: Any) -> BoxTeacher:
    """A `BoxTeacher` in training mode, with settings of `EMATeacher` and of `BoxTeacher`."""
    torch.manual_seed(0)
    segmenter = ScriptedSegmenter(plan, samples=samples, layers=layers)
    return box_teacher(segmenter, **{"augmentation": nn.Identity(), "warmup_steps": 0, **settings}).train()


def box_teacher(segmenter: nn.Module, **settings: Any) -> BoxTeacher:
    """A `BoxTeacher` with settings of `EMATeacher` and of `BoxTeacher`."""
    names = signature(EMATeacher.__init__).parameters.keys() & settings.keys()
    teacher = EMATeacher(segmenter, **{name: settings.pop(name) for name in names})
    return BoxTeacher(segmenter, teacher=teacher, **settings)


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


def plateau(*boxes: tuple[int, int, int, int], height: int = 12, width: int = 16) -> Tensor:
    """Logits (K, height, width): +3 in a box of grid cells, −3 elsewhere."""
    return torch.stack([filled(box, height, width).float() * 6 - 3 for box in boxes])


IMAGES = seeded_images((48, 64), (40, 50))
TARGETS = [target((4, 4, 30, 30), (20, 10, 60, 44)), target((10, 10, 40, 36))]
PLAN = script(
    (0, (4, 4, 30, 30), 0.9),
    (0, (22, 10, 60, 44), 0.6),
    (1, (10, 10, 40, 36), 0.8),
    logits=plateau((2, 2, 6, 6), (4, 4, 12, 9), (0, 0, 16, 12)),
)
IMAGE = torch.rand(3, 32, 48)
