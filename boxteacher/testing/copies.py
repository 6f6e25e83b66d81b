"""Copies: `deepcopy` and `state_dict` make the same network, and none shares anything with another."""

import copy
import io
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import known_boxes


def check_copies(subject: Subject, untrained: nn.Module) -> None:
    """Checks that `deepcopy` shares nothing, and that a `state_dict` that goes through a file holds all.

    Args:
        subject: a trained model.
        untrained: the same before training, which the trained one's `state_dict` must turn into it.
    """
    expected = _answers(subject.model, subject)
    with finding(subject.model, "deepcopy"):
        twin = copy.deepcopy(subject.model)
        shared = _shared(subject.model, twin)
        require(
            not shared,
            f"{', '.join(shared[:3])} of a copy is the original's own tensor: define no __deepcopy__ that "
            "shares them, and keep none in a class",
        )
        _check_same(subject, _answers(twin, subject), expected, "keep weights in parameters and buffers")
    with finding(subject.model, "state_dict"):
        _check_unregistered(subject.model)
        plain = [name for name, _ in _unregistered(subject.model)]
        remedy = (
            "save and load all that counts and all that training changes: tensors as parameters, or as "
            "buffers by register_buffer, numbers in such buffers"
            + (f"; no state_dict knows {', '.join(plain[:3])}" if plain else "")
        )
        _check_same(subject, _answers(_restored(subject, untrained), subject), expected, remedy)


def _restored(subject: Subject, untrained: nn.Module) -> nn.Module:
    """What the trained model's `state_dict` makes of an untrained one whose own tensors are 0."""
    file = io.BytesIO()
    torch.save(subject.model.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(untrained)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *_persistent_buffers(twin), *(t for _, t in _unregistered(twin))):
            tensor.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True, map_location=subject.device))
    return twin


def _answers(model: nn.Module, subject: Subject) -> dict[str, Tensor]:
    """A copy's scores, boxes and mask logits in evaluation mode, and its losses in training mode."""
    model = copy.deepcopy(model).eval()
    images, targets = known_boxes(subject.num_classes, subject.device, seed=4)
    with torch.no_grad():
        candidates = model.forward_teacher(images)  # type: ignore[operator]
        every = torch.arange(len(candidates.scores), device=subject.device)
        masks = candidates.own_masks(every)
        torch.manual_seed(7)
        losses = model.train().forward_student(images, targets).losses  # type: ignore[operator]
    return {
        "scores of candidates": candidates.scores,
        "boxes of candidates": candidates.boxes,
        "masks of candidates": masks,
        **losses,
    }


def _check_same(subject: Subject, ours: dict[str, Tensor], theirs: dict[str, Tensor], remedy: str) -> None:
    for name, value in theirs.items():
        require(
            not subject.differ(ours[name], value), f"the copy's {name} differ from the original's: {remedy}"
        )


def _check_unregistered(model: nn.Module) -> None:
    registered = {*model.modules()}
    hidden = [
        f"{name} ({type(value).__name__})"
        for name, value in _plain_attributes(model)
        if isinstance(value, nn.Module) and value not in registered and any(True for _ in value.parameters())
    ]
    require(
        not hidden,
        f"{', '.join(hidden[:3])} is in a plain list, tuple or dict, so nothing trains, moves or saves it: "
        "use nn.ModuleList or nn.ModuleDict",
    )


def _shared(model: nn.Module, twin: nn.Module) -> list[str]:
    ours = {tensor.data_ptr() for _, tensor in _tensors(model) if tensor.numel()}
    return [name for name, tensor in _tensors(twin) if tensor.numel() and tensor.data_ptr() in ours]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    yield from _unregistered(model)


def _persistent_buffers(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


def _unregistered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that modules hold as ordinary attributes, which no `state_dict` knows."""
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, value in _plain_attributes(model):
        if isinstance(value, Tensor) and id(value) not in registered:
            yield name, value


def _plain_attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Names and values of modules' own and their classes' attributes, and what lists and the like hold."""
    torchs_own = vars(nn.Module()).keys()
    for prefix, module in model.named_modules():
        # torch's and torchvision's modules keep constants in lists, which they make anew.
        bases = type(module).__mro__
        of_torch = type(module).__module__.split(".")[0] == "torch"
        if of_torch or any(base.__module__.split(".")[0] == "torchvision" for base in bases):
            continue
        for owner in (module, *bases[: bases.index(nn.Module)]):
            for name, value in vars(owner).items():
                if name not in torchs_own:
                    yield from _within(f"{prefix}.{name}" if prefix else name, value)


def _within(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The value itself, or what it holds if it is a list, tuple or dict."""
    if isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _within(f"{name}[{i}]", each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _within(f"{name}[{key!r}]", each)
    else:
        yield name, value
