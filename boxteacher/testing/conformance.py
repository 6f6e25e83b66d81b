"""`check_provider`: every check of the kit, the cheap ones first."""

import copy
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.adaptation import as_provider
from boxteacher.errors import ProtocolError
from boxteacher.supervision import MaskSupervised
from boxteacher.testing.edge_cases import check_edge_cases
from boxteacher.testing.findings import Subject, finding, require, require_finite_step
from boxteacher.testing.outputs import check_candidates, check_detections, check_student
from boxteacher.testing.placement import check_padding, check_places
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes
from boxteacher.testing.variants import check_compiled, check_copies, check_half_precision

_STEPS = 200
_LOOK_EVERY = 20


def check_provider(
    model: nn.Module, *, num_classes: int | None = None, compiles: bool = False, tolerance: float = 1e-3
) -> None:
    """Checks that a model does all that the core relies on, and says what to change where it does not.

    The model itself stays as it is: copies of it are run, and one is trained for up to 200 steps on small
    images with known boxes, to see that boxes, labels and masks are found where they are. Seconds for a small
    network; build a large one with its smallest settings.

    Example:
        >>> def test_my_segmenter_can_be_taught():  # doctest: +SKIP
        ...     check_provider(MySegmenter(num_classes=3))

    Args:
        model: what `BoxTeacher` is given; trained or not, on the device to be checked.
        num_classes: C; labels are 0 … C−1. The provider's attribute of that name if not given.
        compiles: whether to check `forward_student` and the evaluation call under `torch.compile` as well.
        tolerance: relative difference allowed between two runs that ought to agree.

    Raises:
        ProtocolError: a check failed; one line names the check, what was found and what to change.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with finding(model, "the parts of the protocol"):
            subject = _subject(model, num_classes, tolerance)
        check_student(subject)
        check_candidates(subject)
        check_detections(subject)
        # An untrained network may find nothing, so whatever needs candidates looks at a trained copy.
        trained = _trained(subject)
        check_candidates(trained)
        check_detections(trained)
        check_places(trained)
        check_padding(trained)
        check_copies(trained, subject.model)
        check_edge_cases(trained)
        check_half_precision(trained)
        if compiles:
            check_compiled(trained)


def _subject(model: nn.Module, num_classes: int | None, tolerance: float) -> Subject:
    """A copy of the model, or of its type's adapter around it."""
    for name in ("mask_stride", "size_divisor"):
        pixels = getattr(model, name, 1)  # `as_provider` says what is missing altogether
        whole = isinstance(pixels, int) and pixels > 0
        require(whole, f"{name} is {pixels!r}: make it a whole number of pixels")
    provider = as_provider(copy.deepcopy(model))
    require(any(True for _ in provider.parameters()), "it has no parameters: register layers as attributes")
    classes = getattr(provider, "num_classes", None) if num_classes is None else num_classes
    if not isinstance(classes, int) or classes < 1:
        raise ProtocolError(f"num_classes is {classes!r}: give it to check_provider, or to the model")
    return Subject(provider, classes, tolerance)


def _trained(subject: Subject) -> Subject:
    """The same with a copy, trained with annotated masks until known boxes are found, or for 200 steps."""
    learner = MaskSupervised(copy.deepcopy(subject.model)).train()
    trained = replace(subject, model=learner.student)
    parameters = {name: p for name, p in learner.student.named_parameters() if p.requires_grad}
    silent = dict(parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-4, weight_decay=0.0)
    for step in range(1, _STEPS + 1):
        # Square and oblong padded batches, one object and two, take turns.
        sizes, counts = ((SQUARE, (1, 2)), (OBLONG, (2, 2)))[step % 2]
        batch = known_boxes(subject, seed=step, sizes=sizes, counts=counts)
        with finding(subject.model, "training and its gradients"):
            losses = learner(*batch)
            if step == 1:
                _check_registered(learner.student, losses)
            optimizer.zero_grad()
            require_finite_step(learner.student, losses)
        silent = {name: p for name, p in silent.items() if p.grad is None or not bool(p.grad.any())}
        nn.utils.clip_grad_norm_(parameters.values(), 5.0)
        optimizer.step()
        if step % _LOOK_EVERY == 0:
            with suppress(ProtocolError):  # which `check_provider` raises in the end
                check_places(trained, margin=1.1)
                break
    with finding(subject.model, "training and its gradients"):
        require(
            not silent,
            f"no gradient reaches {', '.join([*silent][:4])} ({len(silent)} of {len(parameters)} trainable "
            "parameters): use them in a loss or in the mask logits, do not detach what they make, or freeze "
            "them with requires_grad_(False)",
        )
    return trained


def _check_registered(model: nn.Module, losses: dict[str, Tensor]) -> None:
    """Checks that every tensor that the gradient of a loss reaches is a parameter."""
    nodes: list[Any] = [loss.grad_fn for loss in losses.values()]
    seen = {*nodes, None}
    for node in nodes:  # grows on the way
        new = {each for each, _ in node.next_functions} - seen
        seen |= new
        nodes += new
    parameters = {id(parameter) for parameter in model.parameters()}
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    hidden = sorted(str(tuple(leaf.shape)) for leaf in leaves if id(leaf) not in parameters)
    require(
        not hidden,
        f"the losses depend on tensors {', '.join(hidden[:3])} that are not in parameters(), so nothing "
        "trains or saves them: keep layers in nn.ModuleList or nn.ModuleDict, not in a plain list or dict",
    )
