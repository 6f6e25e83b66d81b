"""`forward_student`: types, shapes, index ranges, and masks drawn from their own target's image."""

import copy

import torch
from torch import Tensor

from boxteacher.grid import padded_size
from boxteacher.protocol import MaskPredictions, StudentOutput, Target
from boxteacher.testing.findings import Subject, finding, require, require_tensor, require_within
from boxteacher.testing.scenes import OBLONG, known_boxes


def check_student(subject: Subject) -> None:
    """Checks what `forward_student` returns for odd and mixed image sizes, and that it changes no input."""
    subject = subject.twin(training=True)
    model = subject.model
    images, targets = known_boxes(subject.num_classes, subject.device, seed=1, sizes=OBLONG)
    images = [image.requires_grad_() for image in images]
    given = copy.deepcopy([image.detach() for image in images]), copy.deepcopy(targets)
    with finding(model, "forward_student"):
        output = subject.provider.forward_student([image.clone() for image in images], targets)
        check_output(subject, output, images, targets)
        _check_images_of_masks(output, images, targets)
    with finding(model, "inputs that must stay as they are"):
        plain = [image.detach() for image in images]
        subject.provider.forward_student(plain, targets)
        _check_unchanged(plain, targets, *given)
    with finding(model, "determinism"):
        first, second = (_seeded_losses(subject, *given) for _ in range(2))
        for name in first:
            require(
                not subject.differ(first[name], second[name]),
                f"{name} is {float(first[name]):g} and then {float(second[name]):g} with the same weights, "
                "batch and torch.manual_seed: draw random numbers from torch's own generator, and keep no "
                "state between calls",
            )


def check_output(
    subject: Subject, output: StudentOutput, images: list[Tensor], targets: list[Target]
) -> None:
    """Raises ProtocolError unless a student's output is what `StudentOutput` says."""
    require(
        isinstance(output, StudentOutput),
        f"it returned a {type(output).__name__}: return boxteacher.StudentOutput(losses, masks)",
    )
    for name, loss in output.losses.items():
        require_tensor(f"the loss {name}", loss, (), "float", subject.device)
        require(
            loss.requires_grad,
            f"the loss {name} has no gradient: do not detach it or compute it under no_grad",
        )
    provider = subject.provider
    total = sum(len(target["boxes"]) for target in targets)
    canvas = padded_size(images, provider.size_divisor)
    grid = (canvas[0] // provider.mask_stride, canvas[1] // provider.mask_stride)
    require(
        len(output.masks) > 0, "masks is empty: return a MaskPredictions, if need be with no sample in it"
    )
    for masks in output.masks:
        require(
            isinstance(masks, MaskPredictions),
            f"masks hold a {type(masks).__name__}: return boxteacher.MaskPredictions(logits, target_index)",
        )
        count = len(masks.target_index)
        index = require_tensor("target_index", masks.target_index, (count,), "int64", subject.device)
        require_within(
            "target_index",
            index,
            0,
            total - 1,
            "index all targets of the batch laid end to end, without background",
        )
        missing = sorted({*range(total)} - {*index.tolist()})
        require(
            not missing,
            f"target_index names {sorted({*index.tolist()})}, so no mask is drawn for targets {missing} of "
            f"{total}: index all targets of the batch laid end to end (add the number of boxes in the images "
            "before), and give every box a positive sample",
        )
        shape = tuple(masks.logits.shape)
        require(
            shape == (count, *grid),
            f"mask logits have shape {shape} where {(count, *grid)} is due: one map per sample, rows before "
            f"columns, on the grid of the canvas {canvas} at mask_stride {provider.mask_stride}; pad images "
            "with boxteacher.grid.pad_images(images, size_divisor)",
        )
        require_tensor("mask logits", masks.logits, (count, *grid), "float", subject.device)
        require(masks.logits.requires_grad, "mask logits have no gradient: do not detach or threshold them")


def _check_images_of_masks(output: StudentOutput, images: list[Tensor], targets: list[Target]) -> None:
    """A mask must depend on the pixels of its own target's image more than on any other's."""
    counts = torch.tensor([len(target["boxes"]) for target in targets])
    owner = torch.repeat_interleave(torch.arange(len(images)), counts)  # (T,)
    for masks in output.masks:
        image_of_mask = owner[masks.target_index.cpu()]  # (M,)
        for i in range(len(images)):
            mine = masks.logits[(image_of_mask == i).to(masks.logits.device)]
            gradients = torch.autograd.grad(
                mine.float().square().sum(), images, retain_graph=True, allow_unused=True
            )
            pull = [0.0 if g is None else float(g.norm()) for g in gradients]
            strongest = max(range(len(pull)), key=pull.__getitem__)
            require(
                strongest == i and pull[i] > 0,
                f"masks whose target_index says image {i} are drawn from the pixels of image {strongest} "
                f"(gradient norms {[f'{p:.2g}' for p in pull]}): target_index counts the targets of image 0 "
                "first, then those of image 1, …; bring it into that order",
            )


def _seeded_losses(subject: Subject, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    twin = subject.twin(training=True)
    torch.manual_seed(7)
    output = twin.provider.forward_student(copy.deepcopy(images), copy.deepcopy(targets))
    logits = {f"the mean mask logit of round {i}": m.logits.mean() for i, m in enumerate(output.masks)}
    return {name: value.detach() for name, value in {**output.losses, **logits}.items()}


def _check_unchanged(
    images: list[Tensor], targets: list[Target], images_before: list[Tensor], targets_before: list[Target]
) -> None:
    for i, (now, before) in enumerate(zip(images, images_before, strict=True)):
        require(torch.equal(now, before), f"image {i} was changed in place: normalise a copy of it")
    for i, (target, earlier) in enumerate(zip(targets, targets_before, strict=True)):
        require(target.keys() == earlier.keys(), f"target {i} gained or lost keys: work on a copy of it")
        for key in ("boxes", "labels", "masks"):
            require(
                torch.equal(target[key], earlier[key]), f"target {i}: {key} were changed in place: copy them"
            )
