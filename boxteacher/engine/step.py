"""One step of a run."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.engine.run import RunState
from boxteacher.supervision import TrainingWrapper
from boxteacher.teacher import BoxTeacher


def take_step(
    state: RunState, images: list[Tensor], targets: list[dict[str, Any]], gradient_clip: float
) -> dict[str, float]:
    """Takes an optimizer step on a batch.

    Args:
        state: state of the run, which is changed.
        images: (3, H_i, W_i) each, RGB in [0, 1].
        targets: one per image, with its `file_name`.
        gradient_clip: maximum norm of the gradient; 0: no clipping.

    Returns:
        Losses, the gradient's norm, number and mean confidence of the pseudo masks, and the learning rate.

    Raises:
        FloatingPointError: a loss or the gradient is infinite or NaN; the weights are as they were.
    """
    losses = state.model(images, targets)
    state.optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    norm = nn.utils.clip_grad_norm_(state.model.student.parameters(), gradient_clip or math.inf)
    scalars = {**losses, "gradient_norm": norm, **_pseudo_masks(state.model)}
    # One transfer of all scalars, so one synchronization with the device.
    values = torch.stack([scalar.detach().float() for scalar in scalars.values()]).tolist()
    numbers = dict(zip(scalars, values, strict=True))
    _check_finite(numbers, state, targets)
    numbers["lr"] = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.schedule.step()
    state.step += 1
    return numbers


def _pseudo_masks(model: TrainingWrapper) -> dict[str, Tensor]:
    if not isinstance(model, BoxTeacher) or model.last_pseudo_masks is None:
        return {}
    confidence = model.last_pseudo_masks.confidence  # (T,)
    number = (confidence > 0).sum()
    return {"pseudo_masks": number, "confidence": confidence.sum() / number.clamp(min=1)}


def _check_finite(numbers: dict[str, float], state: RunState, targets: list[dict[str, Any]]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            images = ", ".join(target["file_name"] for target in targets)
            raise FloatingPointError(
                f"{name} is {value} at step {state.step + 1}, images {images}: "
                "try a lower --lr, or check the boxes of these images"
            )
