"""Copies: `deepcopy` and `state_dict` make the same network, and none shares anything with another."""

import copy
import io

import torch
from torch import Tensor, nn

from boxteacher.teacher import BoxTeacher
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import known_boxes


def check_copies(subject: Subject) -> None:
    """Checks `deepcopy`, a `state_dict` that goes through a file, and that the teacher learns by "
    "average alone."""
    expected = _answers(subject.model, subject)
    with finding(subject.model, "deepcopy"):
        twin = copy.deepcopy(subject.model)
        shared = _shared(subject.model, twin)
        require(
            not shared,
            f"{', '.join(shared[:3])} of a copy is the original's own tensor: define no "
            "__deepcopy__ that shares them",
        )
        _check_same(subject, _answers(twin, subject), expected, "keep weights in parameters and buffers")
    with finding(subject.model, "state_dict"):
        file = io.BytesIO()
        torch.save(subject.model.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            for entry in [*twin.parameters(), *_persistent_buffers(twin), *_plain_tensors(twin)]:
                entry.zero_()
        twin.load_state_dict(torch.load(file, weights_only=True, map_location=subject.device))
        _check_same(
            subject,
            _answers(twin, subject),
            expected,
            "save and load every tensor that counts: make it a parameter, or a buffer by register_buffer",
        )
    with finding(subject.model, "a teacher without gradients"):
        images, targets = known_boxes(subject.num_classes, subject.device, seed=5)
        model = BoxTeacher(copy.deepcopy(subject.model)).train()
        torch.stack(list(model(images, targets).values())).sum().backward()
        reached = [name for name, p in model.teacher.named_parameters() if p.grad is not None]
        require(not reached, f"gradients reach the teacher's {', '.join(reached[:3])}: share no parameters")


def _answers(model: nn.Module, subject: Subject) -> dict[str, Tensor]:
    """Scores, boxes and mask logits of a copy in evaluation mode."""
    model = copy.deepcopy(model).eval()
    images, _ = known_boxes(subject.num_classes, subject.device, seed=4)
    with torch.no_grad():
        candidates = model.forward_teacher(images)  # type: ignore[operator]
        every = torch.arange(len(candidates.scores), device=subject.device)
        return {
            "scores": candidates.scores,
            "boxes": candidates.boxes,
            "masks": candidates.own_masks(every),
        }


def _check_same(subject: Subject, ours: dict[str, Tensor], theirs: dict[str, Tensor], remedy: str) -> None:
    for name, value in theirs.items():
        require(
            not subject.differ(ours[name], value), f"the candidates' {name} are not the original's: {remedy}"
        )


def _shared(model: nn.Module, twin: nn.Module) -> list[str]:
    ours = {p.data_ptr() for p in (*model.parameters(), *model.buffers()) if p.numel()}
    theirs = (*twin.named_parameters(), *twin.named_buffers())
    return [name for name, value in theirs if value.numel() and value.data_ptr() in ours]


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as ordinary attributes, which no state dict knows."""
    return [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    ]
