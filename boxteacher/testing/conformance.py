"""`check_provider`: every check of the kit, the cheap ones first."""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.adaptation import as_provider
from boxteacher.errors import InconclusiveError, ProtocolError
from boxteacher.supervision import MaskSupervised
from boxteacher.testing.edge_cases import check_edge_cases
from boxteacher.testing.findings import Subject, finding, require, require_finite_step
from boxteacher.testing.outputs import check_candidates, check_detections, check_student
from boxteacher.testing.placement import check_padding, check_places
from boxteacher.testing.scenes import OBLONG, SQUARE, known_boxes
from boxteacher.testing.variants import check_compiled, check_copies, check_half_precision
from boxteacher.validation import check_whole

logger = logging.getLogger(__name__)

_LOOK_EVERY = 20
_MIN_STEPS_TO_SILENCE = 100  # before a parameter without a gradient is taken for unused
_MARGIN = 1.1  # by which training is to exceed what is required
_MIN_MOMENTUM = 0.1  # of batch norms


def check_provider(
    model: nn.Module,
    *,
    num_classes: int | None = None,
    compiles: bool = False,
    tolerance: float = 1e-3,
    steps: int = 400,
    seed: int = 0,
) -> None:
    """Checks that a model does all that the core relies on, and says what to change where it does not.

    The model itself stays as it is, and so do the generators of random numbers: copies of it are run, and
    one is trained on small images with known boxes, until boxes, labels and masks are found where they are.
    Seconds for a small network; build a large one with its smallest settings. The logger `boxteacher.testing`
    reports the training's progress at level INFO.

    Example:
        >>> def test_my_segmenter_can_be_taught():  # doctest: +SKIP
        ...     check_provider(MySegmenter(num_classes=3))

    Args:
        model: what `BoxTeacher` is given; trained or not, on the device to be checked.
        num_classes: C; labels are 0 … C−1. The provider's attribute of that name if not given.
        compiles: whether to check `forward_student` and the evaluation call under `torch.compile` as well.
        tolerance: relative difference allowed between two runs that ought to agree.
        steps: maximum number of training steps, two images each.
        seed: seed of the random numbers that the model draws.

    Raises:
        ProtocolError: a check failed; one line names the check, what was found and what to change.
        InconclusiveError: known boxes are not found after `steps` steps, and no fault explains it.
        InputError: `steps` is not a whole number, at least 1.
    """
    check_whole("steps", steps, minimum=1)
    with _own_random_numbers(seed), torch.enable_grad():
        with finding(model, "the parts of the protocol"):
            subject = _subject(model, num_classes, tolerance)
        check_student(subject)
        check_candidates(subject)
        check_detections(subject)
        # An untrained network may find nothing, so whatever needs candidates looks at a trained copy.
        trained = _trained(subject, steps)
        check_candidates(trained)
        check_detections(trained)
        check_places(trained)
        check_padding(trained)
        check_copies(trained, subject.model)
        check_edge_cases(trained)
        check_half_precision(trained)
        if compiles:
            check_compiled(trained)


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seeds torch's generators and Python's, and leaves them as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


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


def _trained(subject: Subject, steps: int) -> Subject:
    """The same with a copy, trained with annotated masks until known boxes are found or steps run out."""
    learner = MaskSupervised(copy.deepcopy(subject.model)).train()
    _hasten_batch_norms(learner.student)
    parameters = {name: p for name, p in learner.student.named_parameters() if p.requires_grad}
    silent = dict(parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-4, weight_decay=0.0)
    # Decay in the second half sharpens what a slow network has learned.
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for step in range(1, steps + 1):
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
        decay.step()
        if step % _LOOK_EVERY == 0:
            trained = replace(subject, model=learner.student, steps=step)
            if _is_learned(trained) and (not silent or step >= _MIN_STEPS_TO_SILENCE):
                break
    with finding(subject.model, "training and its gradients"):
        require(
            not silent,
            f"no gradient reaches {', '.join([*silent][:4])} ({len(silent)} of {len(parameters)} trainable "
            "parameters): use them in a loss or in the mask logits, do not detach what they make, or freeze "
            "them with requires_grad_(False)",
        )
    return replace(subject, model=learner.student, steps=step)


def _is_learned(trained: Subject) -> bool:
    """Whether known boxes are found, with a margin; `check_provider` says in the end what is missing."""
    try:
        check_places(trained, margin=_MARGIN)
    except (ProtocolError, InconclusiveError) as error:
        logger.info("%s after %d steps: %s", type(trained.model).__name__, trained.steps, error)
        return False
    logger.info("%s after %d steps finds known boxes", type(trained.model).__name__, trained.steps)
    return True


def _hasten_batch_norms(model: nn.Module) -> None:
    """Lets running statistics follow within a few steps, where a network's own take thousands."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, _MIN_MOMENTUM)


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
