"""A known box must land where it should: a copy is trained on known boxes, then asked about others."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from boxteacher.protocol import Target
from boxteacher.supervision import MaskSupervised
from boxteacher.targets import grid_targets
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes

_STEPS = 200
_LOOK_EVERY = 20
_ENOUGH = 0.6  # IoU of masks and of boxes; a grid that is scaled, turned or swapped stays below 0.4
_SHAPES = (SQUARE, OBLONG)
_UNSEEN = 1_000_000  # seeds from here on are not trained on
_PLACES = ((0.3, 0.75), (0.75, 0.3), (0.45, 0.6))  # row and column of cells, in parts of the image
_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "the place is right, so check that target_index names the target of each mask, and that the "
    "right features, "
    "coordinates and parameters are used": lambda due: due,
    "rows and columns are swapped; return logits (M, h, w), rows first": lambda due: due.flip(1),
    "the grid is enlarged twice too much; check mask_stride, and the stride of the features": lambda due: (
        due / 2
    ),
    "the grid is enlarged half as much as is due; check mask_stride, and the stride of the features": (
        lambda due: due * 2
    ),
}


def learn(subject: Subject) -> nn.Module:
    """A copy that was trained with drawn masks until known boxes land, or for 200 steps.

    Raises:
        ProtocolError: a loss is not finite, or a trainable parameter never got a gradient.
    """
    model = copy.deepcopy(subject.model)
    learner = MaskSupervised(model).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = dict(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-4, weight_decay=0.0)
    with finding(subject.model, "training and its gradients"):
        for step in range(_STEPS):
            images, targets = known_boxes(
                subject.num_classes,
                subject.device,
                seed=step,
                sizes=_SHAPES[step % 2],
                counts=(1 + step % 2, 2),
            )
            losses = learner(images, targets)
            total = torch.stack(list(losses.values())).sum()
            require(bool(total.isfinite()), f"the losses are {_numbers(losses)} at step {step}: find the NaN")
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            silent = {name: p for name, p in silent.items() if p.grad is None or not bool(p.grad.any())}
            nn.utils.clip_grad_norm_(trained.values(), 5.0)
            optimizer.step()
            if step % _LOOK_EVERY == _LOOK_EVERY - 1 and _lands(replace(subject, model=model)):
                break
        require(
            not silent,
            f"no gradient reaches {', '.join(list(silent)[:4])} ({len(silent)} of {len(trained)} trainable "
            "parameters): use them in a loss or in the mask logits, do not detach what they make, "
            "or freeze them "
            "with requires_grad_(False)",
        )
    return model


def check_landing(subject: Subject) -> None:
    """Checks that masks of student and teacher, and boxes of the teacher, lie on boxes never seen "
    "before."""
    with finding(subject.model, "where a known box lands"):
        overlap = _student_overlap(subject)
        require(
            float(overlap.mean()) >= _ENOUGH,
            f"after {_STEPS} steps with drawn masks, the student's masks overlap their boxes by an "
            "IoU of only "
            f"{float(overlap.mean()):.2f}; {_explanation(subject)}",
        )
        images, targets = known_boxes(subject.num_classes, subject.device, seed=_UNSEEN + 1)
        boxes, box_overlap, mask_overlap = _teacher_overlap(subject, images, targets)
        require(
            float(box_overlap.mean()) >= _ENOUGH,
            "the candidates' boxes overlap the known ones by an IoU of only "
            f"{float(box_overlap.mean()):.2f}; "
            f"nearest to {_rounded(targets[0]['boxes'][0])} is {_rounded(boxes[0])}: boxes are x0, "
            "y0, x1, y1 in pixels of "
            "the image as it was given; undo any resizing, and check the order of coordinates",
        )
        require(
            float(mask_overlap.mean()) >= _ENOUGH,
            f"the candidates' boxes are right, but masks from decode_masks overlap them by an IoU of only "
            f"{float(mask_overlap.mean()):.2f}: draw the mask of the candidate asked for, from its "
            "own image, on "
            "the grid that the student's masks lie on",
        )


def check_padding(subject: Subject) -> None:
    """Checks that a larger companion image, and so a larger canvas, does not move an image's "
    "boxes or masks."""
    images, targets = known_boxes(
        subject.num_classes, subject.device, seed=_UNSEEN, sizes=((51, 61), (93, 91)), counts=(1, 1)
    )
    with finding(subject.model, "an image beside a larger one"):
        overlaps = []
        for count in (1, 2):
            boxes, box_overlap, mask_overlap = _teacher_overlap(subject, images[:count], targets[:count])
            overlaps.append(min(float(box_overlap[0]), float(mask_overlap[0])))
        require(
            min(overlaps) >= _ENOUGH * max(overlaps),
            f"the box {_rounded(targets[0]['boxes'][0])} of an image of "
            f"{tuple(images[0].shape[1:])} is found with an "
            f"IoU of {overlaps[0]:.2f} alone, but of {overlaps[1]:.2f} at {_rounded(boxes[0])} "
            "beside an image of "
            f"{tuple(images[1].shape[1:])}: pad images at the right and bottom only, and measure "
            "coordinates in "
            "pixels, not in parts of the canvas",
        )


def _lands(subject: Subject) -> bool:
    if float(_student_overlap(subject).mean()) < _ENOUGH + 0.1:
        return False
    batch = known_boxes(subject.num_classes, subject.device, seed=_UNSEEN + 1)
    _, box_overlap, mask_overlap = _teacher_overlap(subject, *batch)
    return min(float(box_overlap.mean()), float(mask_overlap.mean())) >= _ENOUGH + 0.1


@torch.no_grad()
def _student_overlap(subject: Subject) -> Tensor:
    """IoU (M,) of the last round's masks of an unseen batch with the boxes that they ought to fill."""
    images, targets = known_boxes(subject.num_classes, subject.device, seed=_UNSEEN)
    output = subject.twin(training=True).provider.forward_student(images, targets)
    masks = output.masks[-1]
    grid = grid_targets(images, targets, subject.provider.mask_stride, subject.provider.size_divisor)
    return _overlap(masks.logits > 0, grid.box_masks[masks.target_index])


@torch.no_grad()
def _teacher_overlap(
    subject: Subject, images: list[Tensor], targets: list[Target]
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate box (T, 4) nearest to each known one, and the IoU (T,) of the boxes and of "
    "their masks."""
    grid = grid_targets(images, targets, subject.provider.mask_stride, subject.provider.size_divisor)
    candidates = subject.twin(training=False).provider.forward_teacher(images)
    if not len(candidates.scores):
        nothing = torch.zeros(len(grid.boxes), device=subject.device)
        return torch.zeros_like(grid.boxes), nothing, nothing
    same_image = candidates.image_index[:, None] == grid.image_index  # (K, T)
    overlap = torch.where(same_image, box_iou(candidates.boxes.float(), grid.boxes), 0.0)  # (K, T)
    best, nearest = overlap.max(0)  # (T,) each
    masks = candidates.decode_masks(nearest, grid.boxes, grid.labels) > 0  # (T, h, w)
    return candidates.boxes[nearest], best, _overlap(masks, grid.box_masks)


def _overlap(masks: Tensor, others: Tensor) -> Tensor:
    """IoU (M,) of masks (M, h, w) bool."""
    union = (masks | others).flatten(1).sum(1)
    return (masks & others).flatten(1).sum(1) / union.clamp(min=1)


def _explanation(subject: Subject) -> str:
    """Which pixels the mask logits of grid cells answer to, and what that says of the grid."""
    subject = subject.twin(training=True)
    stride = subject.provider.mask_stride
    images, targets = known_boxes(subject.num_classes, subject.device, seed=_UNSEEN)
    image = images[0].requires_grad_()
    output = subject.provider.forward_student(images, targets)
    masks = output.masks[-1]
    logits = masks.logits[masks.target_index == 0].float().mean(0)  # (h, w)
    height, width = image.shape[-2:]
    cells = [(int(y * height) // stride, int(x * width) // stride) for y, x in _PLACES]
    found = []
    for row, column in cells:
        (gradient,) = torch.autograd.grad(logits[row, column], image, retain_graph=True)
        found.append(_center(gradient.square().sum(0)))
    due = torch.tensor([[row, column] for row, column in cells]) * float(stride) + stride // 2  # (P, 2) y, x
    centers = torch.tensor(found)  # (P, 2) y, x
    guesses = {name: float((centers - guess(due)).abs().mean()) for name, guess in _GRIDS.items()}
    best = min(guesses, key=guesses.__getitem__)
    y, x = (round(v) for v in found[0])
    where = (
        f"the logit of grid cell {cells[0]} depends most on the pixels round ({y}, {x}) (row, column), due "
    )
    return f"{where}is ({int(due[0, 0])}, {int(due[0, 1])}): {best}"


def _center(weight: Tensor) -> tuple[float, float]:
    """Row and column of the weight's (H, W) centre of mass."""
    total = weight.sum().clamp(min=1e-30)
    rows, columns = (torch.arange(n, device=weight.device, dtype=weight.dtype) for n in weight.shape)
    return float((weight.sum(1) * rows).sum() / total), float((weight.sum(0) * columns).sum() / total)


def _rounded(box: Tensor) -> list[int]:
    return [round(value) for value in box.tolist()]


def _numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
