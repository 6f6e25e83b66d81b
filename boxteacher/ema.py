"""The teacher's weights, and when they move.

Every `torch.optim.Optimizer` announces its steps to hooks, so no training loop has to. A step that
`GradScaler` skips is not announced, or, by an optimizer that checks for infinities itself, announced together
with them; gradient accumulation announces nothing until it steps. So every counted step moved the weights.
Steps of other optimizers, and steps over copies of the parameters, have to be told to `StepCounter.notice`.
"""

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.optim.swa_utils import get_ema_multi_avg_fn

from boxteacher.errors import InputError
from boxteacher.state_dicts import compare_states


def ema_momentum(step: int, maximum: float = 0.999) -> float:
    """min(maximum, 1 − 1/(step + 1)): a plain mean at first, then an exponential one.

    A teacher that begins as a copy of the student has had update 0, which is a copy.

    Args:
        step: number of updates before this one, at least 0.
        maximum: limit of the momentum, in [0, 1].
    """
    return min(maximum, 1 - 1 / (step + 1))


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float, *, buffers: bool = True) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student (BoxTeacher, Eq. 1).

    Entries that are not floating point (counters) are copied. One fused pass per device and dtype.

    Args:
        teacher: module of the same architecture as `student`; changed in place.
        student: module that is left unchanged.
        momentum: weight of the teacher, in [0, 1].
        buffers: whether buffers are averaged too, or stay the teacher's own.

    Raises:
        InputError: the two have other parameters or buffers; the message names them.
    """
    teacher_tensors, student_tensors = _tensors(teacher), _tensors(student)
    if difference := compare_states(student_tensors, teacher_tensors):
        raise InputError(
            f"the student was changed after its teacher was made of it; entries of the teacher that differ: "
            f"{difference}; change the network first (LoRA, a new head), then give it to BoxTeacher"
        )
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for name, ours in (teacher_tensors if buffers else dict(teacher.named_parameters())).items():
        teachers, students = groups[ours.device, ours.dtype]
        teachers.append(ours)
        students.append(student_tensors[name])
    average = get_ema_multi_avg_fn(momentum)
    for (_, dtype), (teachers, students) in groups.items():
        if dtype.is_floating_point or dtype.is_complex:
            average(teachers, students, None)
        else:
            torch._foreach_copy_(teachers, students)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class StepCounter:
    """Notices optimizer steps over the parameters of `module`.

    Optimizers that step one after another, without a call of `advance` in between, make one step together:
    each may hold a part of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._stepped = False
        self._found_inf: list[Tensor] = []  # of announced steps that may have been skipped
        _counters.add(self)

    @property
    def module(self) -> nn.Module | None:
        """The module whose steps count; None once nothing else holds it."""
        return self._module()

    @property
    def has_stepped(self) -> bool:
        """Whether there was a step since the last `advance`; reading it changes nothing."""
        # Each is read once: a second read would wait for what the device was given in between.
        self._stepped = self._stepped or any(not found.item() for found in self._found_inf)
        self._found_inf = []
        return self._stepped

    def advance(self) -> bool:
        """Whether there was a step since the last call; later steps then count as another."""
        stepped = self.has_stepped
        self._stepped, self._found_inf = False, []
        return stepped

    def notice(self, found_inf: Tensor | None = None) -> None:
        """Notices a step over the module's parameters.

        Args:
            found_inf: scalar, not 0 if infinite gradients made the optimizer skip the step.
        """
        if found_inf is None:
            self._stepped = True
        else:  # read in `has_stepped`, when it has long been computed
            self._found_inf.append(found_inf.clone())


_counters: "weakref.WeakSet[StepCounter]" = weakref.WeakSet()


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if not _counters:
        return
    # GradScaler leaves this on an optimizer that skips steps with infinite gradients by itself.
    found_inf = getattr(optimizer, "found_inf", None)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for counter in _counters:
        if counter.module is not None and any(id(each) in stepped for each in counter.module.parameters()):
            counter.notice(found_inf)


register_optimizer_step_post_hook(_after_optimizer_step)
