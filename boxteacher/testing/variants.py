"""The same network in other guises: copied, restored from a `state_dict`, in half precision, compiled."""

import copy
import io

import torch
from torch import Tensor, nn

from boxteacher.supervision import MaskSupervised
from boxteacher.testing.findings import Subject, finding, require, require_finite_step
from boxteacher.testing.found import find
from boxteacher.testing.outputs import candidate_answers, student_answers
from boxteacher.testing.placement import MIN_OVERLAP
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes

_NEAR = (SQUARE, OBLONG, SQUARE, OBLONG)
_WIDE = ((61, 2000),)  # height and width
_FAR = 1024  # pixels; beyond, bfloat16 knows every eighth alone
_MAX_APART = 1.0  # median in pixels, beyond that of boxes near the origin; rounded sides are off by 2


def check_copies(subject: Subject, untrained: nn.Module) -> None:
    """Checks that `deepcopy` shares nothing, and that a `state_dict` turns the untrained model into it."""
    model = subject.model
    expected = _answers(subject, model)
    with finding(model, "deepcopy"):
        other = copy.deepcopy(model)
        ours = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
        theirs = (*other.named_parameters(), *other.named_buffers())
        shared = [name for name, tensor in theirs if tensor.data_ptr() in ours]
        require(
            not shared,
            f"{', '.join(shared[:3])} of a copy is the original's own tensor: define no __deepcopy__ that "
            "shares it",
        )
        remedy = "of the copy differ: keep weights in parameters and buffers"
        subject.require_same(_answers(subject, other), expected, remedy)
    with finding(model, "state_dict"):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        restored = copy.deepcopy(untrained)
        restored.load_state_dict(torch.load(file, weights_only=True, map_location=subject.device))
        remedy = (
            "of a model that loads it differ: save and load all that training changes, tensors as parameters "
            "or by register_buffer, numbers in such buffers"
        )
        subject.require_same(_answers(subject, restored), expected, remedy)


@torch.no_grad()
def _answers(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """A copy's candidates in evaluation mode, and its losses in training mode."""
    model = copy.deepcopy(model).eval()
    images, targets = known_boxes(subject, seed=4)
    candidates = candidate_answers(model.forward_teacher(images))  # type: ignore[operator]
    return {**candidates, **student_answers(model.train().forward_student, images, targets)}


def check_half_precision(subject: Subject) -> None:
    """Checks, under bfloat16 autocast, that a step is finite, and that boxes and masks stay in place.

    Half precision moves every network's boxes a little. So what counts is how much further it moves those
    that lie far from the origin, whose coordinates it would round.
    """
    near = [known_boxes(subject, seed=8 + i, sizes=sizes, counts=(2, 2)) for i, sizes in enumerate(_NEAR)]
    wide = [known_boxes(subject, seed=8, sizes=_WIDE, counts=(21,))]
    with finding(subject.model, "half precision"):
        autocast = torch.autocast(subject.device.type, torch.bfloat16)
        model = MaskSupervised(copy.deepcopy(subject.model)).train()
        with autocast:
            losses = model(*near[0])
        require_finite_step(model.student, losses)
        apart_near = 0.0
        for scenes, minimum in ((near, 0), (wide, _FAR)):
            whole = find(subject, scenes)
            found = (whole.box_overlap > MIN_OVERLAP) & (whole.known[:, 0] >= minimum)  # (T,)
            if not bool(found.any()):
                continue
            with autocast:
                half = find(subject, scenes)
            nothing = bool(half.boxes.isnan().any())
            require(not nothing, "under bfloat16 autocast there are no candidates: score in float32")
            apart = float((half.boxes - whole.boxes)[found][:, 0::2].abs().median())
            limit = _MAX_APART + apart_near if minimum else subject.provider.mask_stride
            overlap, half_overlap = (each.mask_overlap[found].mean() for each in (whole, half))
            require(
                apart <= limit and bool(half_overlap >= MIN_OVERLAP * overlap),
                f"under bfloat16 autocast boxes beyond {minimum} pixels are off by {apart:.1f} pixels, and "
                f"masks overlap the known ones by an IoU of {half_overlap:.2f} instead of {overlap:.2f}: "
                "keep coordinates, boxes and dynamic filters in float32 (boxteacher.adapter.full_precision)",
            )
            apart_near = apart


def check_compiled(subject: Subject) -> None:
    """Checks that a compiled `forward_student` and evaluation call give what the plain ones give."""
    images, targets = known_boxes(subject, seed=9, sizes=((64, 64),), counts=(1,))
    remedy = "differs when compiled: avoid Python side effects, or do not claim compiles=True"
    with finding(subject.model, "torch.compile of forward_student"):
        plain, other = (subject.copy(training=True).provider.forward_student for _ in range(2))
        compiled = torch.compile(other, backend="aot_eager")  # which needs no compiler
        ours, theirs = (student_answers(run, images, targets) for run in (compiled, plain))
        subject.require_same(ours, theirs, remedy)
    with finding(subject.model, "torch.compile of the evaluation call"), torch.no_grad():
        model = subject.copy(training=False).model
        compiled_model = torch.compile(subject.copy(training=False).model, backend="aot_eager")
        for ours, theirs in zip(compiled_model(images), model(images), strict=True):
            subject.require_same(ours, theirs, remedy)
