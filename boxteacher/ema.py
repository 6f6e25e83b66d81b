"""The teacher's weights follow the student's."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_momentum(step: int, maximum: float = 0.999) -> float:
    """min(maximum, 1 − 1/(step + 1)): a plain mean at first, then an exponential one.

    Args:
        step: number of updates before this one, ≥ 0.
        maximum: momentum in [0, 1] that is approached.
    """
    return min(maximum, 1 - 1 / (step + 1))


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, buffers included (BoxTeacher, Eq. 1).

    Entries that are not floating point (counters) are copied. One fused pass per device and dtype.

    Args:
        teacher: same architecture as `student`; changed in place.
        student: left as it is.
        momentum: in [0, 1].
    """
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for ours, theirs in zip(_tensors(teacher), _tensors(student), strict=True):
        teachers, students = groups[ours.device, ours.dtype]
        teachers.append(ours)
        students.append(theirs)
    average = get_ema_multi_avg_fn(momentum)
    for (_, dtype), (teachers, students) in groups.items():
        if dtype.is_floating_point or dtype.is_complex:
            average(teachers, students, None)
        else:
            torch._foreach_copy_(teachers, students)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
