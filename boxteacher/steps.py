"""Counts the optimizer's steps over a module's parameters, without being called by the training loop.

Every `torch.optim.Optimizer` announces its steps to hooks. A step that `GradScaler` skips is not announced,
or, by an optimizer that looks for infinities itself, announced with them; gradient accumulation announces
nothing until it steps. So what is counted are the times that the weights really moved.
"""

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_counters: "weakref.WeakSet[StepCounter]" = weakref.WeakSet()


class StepCounter:
    """The number of rounds of optimizer steps over the parameters of `module`.

    Steps that follow one another without a call of `settle` in between are one round: two optimizers that
    each hold a part of the module make one round together.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._pending = False
        self._found_inf: list[Tensor] = []  # of announced steps that may have been skipped
        self.steps = 0
        _counters.add(self)

    def settle(self) -> bool:
        """Counts the round that has ended since the last call, and tells whether there was one."""
        ended = self._pending or any(not found.item() for found in self._found_inf)
        self.reset(self.steps + ended)
        return ended

    def reset(self, steps: int) -> None:
        """Sets the count, as after loading a checkpoint; a round not yet settled is forgotten."""
        self.steps, self._pending, self._found_inf = steps, False, []

    def _notice(self, stepped: set[int], found_inf: Tensor | None) -> None:
        module = self._module()
        if module is None or not any(id(parameter) in stepped for parameter in module.parameters()):
            return
        if found_inf is None:
            self._pending = True
        else:  # asked for its value in `settle`, when it has long been computed
            self._found_inf.append(found_inf.clone())


def _after_optimizer_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if not _counters:
        return
    # GradScaler leaves this on an optimizer that skips steps with infinite gradients by itself.
    found_inf = getattr(optimizer, "found_inf", None)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for counter in _counters:
        counter._notice(stepped, found_inf)


register_optimizer_step_post_hook(_after_optimizer_step)
