"""Other ways to run the same network: half precision, and compiled."""

import copy
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher.protocol import Candidates, Target
from boxteacher.supervision import MaskSupervised
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import known_boxes

_HALF = 0.05  # mean difference of mask probabilities that half precision may make
_FAR = 512  # pixels from here on: bfloat16 knows every fourth alone, and beyond twice that every eighth
_MOST_APART = 0.5  # median in pixels; a sound network's is below 0.1, that of rounded sides 1 to 2
_LEAST_OVERLAP = 0.5  # with a known box, of a candidate that is worth comparing
_FULL_PRECISION = (
    "keep coordinates, boxes and dynamic filters in float32 (boxteacher.precision.full_precision)"
)

_NO_CLAIM = "avoid Python side effects and graph breaks in forward, or do not claim compiles=True"


def check_half_precision(subject: Subject) -> None:
    """Checks a step and candidates under bfloat16 autocast: finite, and like those in float32."""
    with finding(subject.model, "half precision"):
        _check_half_step(subject)
        _check_half_masks(subject)
        _check_half_boxes(subject)


def _check_half_step(subject: Subject) -> None:
    images, targets = known_boxes(subject.num_classes, subject.device, seed=8)
    model = MaskSupervised(copy.deepcopy(subject.model)).train()
    with torch.autocast(subject.device.type, torch.bfloat16):
        losses = model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
    for name, loss in losses.items():
        require(
            bool(loss.isfinite()), f"{name} is {loss.item():g} under autocast: compute it on logits.float()"
        )
    total.backward()
    broken = [
        name
        for name, p in model.student.named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    require(
        not broken, f"gradients of {', '.join(broken[:3])} are not finite under autocast: use float32 there"
    )


def _check_half_masks(subject: Subject) -> None:
    """The best candidate of all has the same score and mask; of equals, rounding may prefer another."""
    images, _ = known_boxes(subject.num_classes, subject.device, seed=8)
    (scores, masks), (half_scores, half_masks) = _whole_and_half(subject, images, _scores_and_masks)
    if not len(scores):
        return
    require(
        len(half_scores) > 0, f"under bfloat16 autocast there are no candidates at all: {_FULL_PRECISION}"
    )
    score, mask = scores.max(), masks[scores.argmax()]
    alike = half_scores >= min(score - 2 * _HALF, half_scores.max())  # (K',)
    difference = float((half_masks[alike] - mask).abs().mean((1, 2)).min())
    require(
        difference < _HALF and abs(float(score - half_scores.max())) < 2 * _HALF,
        f"under bfloat16 autocast the best candidate scores {half_scores.max():.2f} instead of {score:.2f}, "
        f"and its mask probabilities are off by {difference:.2f} on average: {_FULL_PRECISION}",
    )


def _check_half_boxes(subject: Subject) -> None:
    """Boxes far from the origin, where bfloat16 rounds to multiples of 4 and 8 pixels, stay as they are."""
    images, targets = known_boxes(
        subject.num_classes, subject.device, seed=8, sizes=((61, 3 * _FAR),), counts=(16,)
    )
    whole, half = _whole_and_half(subject, images, attrgetter("boxes"))
    require(
        half.dtype not in (torch.bfloat16, torch.float16),
        f"candidates' boxes are {half.dtype} under autocast, which rounds pixels: {_FULL_PRECISION}",
    )
    apart = _apart(targets[0]["boxes"], whole, half)
    require(
        not apart.numel() or float(apart.median()) <= _MOST_APART,
        f"under bfloat16 autocast the sides of boxes further than {_FAR} pixels from the origin are off by "
        f"{float(apart.median()):.1f} pixels: {_FULL_PRECISION}",
    )


def _apart(known: Tensor, whole: Tensor, half: Tensor) -> Tensor:
    """Pixels (N, 2) that half precision moves the left and right sides of boxes far from the origin.

    Of boxes (K, 4) those are looked at that lie on known ones (T, 4), beside the nearest of (K', 4).
    """
    if not len(whole) or not len(half):
        return whole.new_zeros(0, 2)
    overlap, best = box_iou(known[known[:, 0] > _FAR], whole.float()).max(1)  # (T',) each
    boxes = whole[best[overlap > _LEAST_OVERLAP]].float()  # (N, 4)
    nearest = box_iou(boxes, half.float()).argmax(1)  # (N,)
    return (boxes - half[nearest])[:, 0::2].abs()


def _whole_and_half(subject: Subject, images: list[Tensor], look: Callable[[Candidates], Any]) -> list[Any]:
    """What is seen of the candidates in float32, and under autocast."""
    provider = subject.twin(training=False).provider
    seen = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast(subject.device.type, torch.bfloat16, enabled=enabled):
            seen.append(look(provider.forward_teacher(images)))
    return seen


def _scores_and_masks(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Scores (K,), and mask probabilities (K, h, w)."""
    every = torch.arange(len(candidates.scores), device=candidates.scores.device)
    return candidates.scores.float(), candidates.own_masks(every).float().sigmoid()


def check_compiled(subject: Subject) -> None:
    """Checks that a compiled `forward_student` and evaluation call give what the plain ones give.

    Graph breaks are allowed: looking at labels, as every student must, makes one, and so does NMS. But the
    layers themselves must be in compiled graphs.
    """
    images, targets = known_boxes(subject.num_classes, subject.device, seed=9, sizes=((64, 64),), counts=(1,))
    with finding(subject.model, "torch.compile of forward_student"):
        plain = _losses(subject.twin(training=True).provider.forward_student, images, targets)
        twin, graphs = subject.twin(training=True), _Graphs()
        compiled = _losses(torch.compile(twin.provider.forward_student, backend=graphs), images, targets)
        for name in plain:
            require(
                not subject.differ(compiled[name], plain[name]),
                f"{name} is {float(compiled[name]):g} compiled, {float(plain[name]):g} not: {_NO_CLAIM}",
            )
        outside = [name for name, p in twin.model.named_parameters() if p.data_ptr() not in graphs.tensors]
        require(not outside, f"{', '.join(outside[:3])} are in no compiled graph: {_NO_CLAIM}")
    with finding(subject.model, "torch.compile of the evaluation call"), torch.no_grad():
        model, graphs = subject.twin(training=False).model, _Graphs()
        compiled_model = torch.compile(model, backend=graphs)
        for theirs, ours in zip(model(images), compiled_model(images), strict=True):
            for key in ("scores", "boxes", "masks"):
                require(
                    not subject.differ(ours[key], theirs[key]), f"{key} differ when compiled: {_NO_CLAIM}"
                )
        inside = any(p.data_ptr() in graphs.tensors for p in model.parameters())
        require(inside, f"no parameter is in a compiled graph: {_NO_CLAIM}")


class _Graphs:
    """Traces as torch.compile does, forward and backward, but runs without a C++ compiler.

    Attributes:
        tensors: addresses of what the graphs took.
    """

    def __init__(self) -> None:
        self.tensors: set[int] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        taken = (*inputs, *graph.parameters())
        self.tensors.update(each.data_ptr() for each in taken if isinstance(each, Tensor))
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return compiled


def _losses(run: Any, images: list[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    output = run(images, targets)
    torch.stack([*output.losses.values(), *(masks.logits.mean() for masks in output.masks)]).sum().backward()
    logits = {
        f"the mean mask logit of round {i}": masks.logits.mean() for i, masks in enumerate(output.masks)
    }
    return {name: value.detach() for name, value in {**output.losses, **logits}.items()}
