"""What data sets hold now and then: a step on it has finite losses and gradients, or says what is wrong."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from boxteacher.errors import InputError, ProtocolError
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.teacher import BoxTeacher
from boxteacher.testing.findings import Subject, finding, first_line, require
from boxteacher.testing.measure import Batch
from boxteacher.testing.scenes import known_boxes
from boxteacher.testing.teacher import require_detections


@dataclass(frozen=True)
class _Case:
    """A batch, and whether an adapter may refuse it by an InputError."""

    make: Callable[[Subject], Batch]
    may_refuse: bool = False


def check_edge_cases(subject: Subject) -> None:
    """Runs a BoxTeacher step on every batch of `_CASES`, and looks for a complaint about wrong labels."""
    for name, case in _CASES.items():
        with finding(subject.model, name):
            _check_step(subject, case.make(subject), may_refuse=case.may_refuse)
    with finding(subject.model, "a batch without candidates"):
        # No score is above 1, so nothing is left to decode.
        _check_step(subject, known_boxes(subject.num_classes, subject.device, seed=6), score_threshold=1.0)
    if subject.device.type == "cpu":  # elsewhere, looking at labels would wait for the device
        with finding(subject.model, "labels out of range"):
            _check_labels(subject)


def _check_step(
    subject: Subject, batch: Batch, *, may_refuse: bool = False, score_threshold: float = 0.0
) -> None:
    images, targets = batch
    student = copy.deepcopy(subject.model)
    model = BoxTeacher(student, teacher=EMATeacher(student, score_threshold=score_threshold)).train()
    with _refusal(may_refuse):
        losses = model(images, targets)
        for name, loss in losses.items():
            require(
                bool(loss.isfinite()),
                f"{name} is {loss.item():g}: divide by max(count, 1), and bound logarithms",
            )
        torch.stack(list(losses.values())).sum().backward()
        broken = [
            name
            for name, p in model.student.named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        require(
            not broken,
            f"the gradient of {', '.join(broken[:3])} is NaN or infinite: bound what is divided by or rooted",
        )
    with _refusal(may_refuse), torch.no_grad():
        require_detections(subject, model.eval()(images), images)


@contextmanager
def _refusal(allowed: bool) -> Iterator[None]:
    """Lets an InputError pass where one is allowed, if it says in one line what is wrong and what to do."""
    try:
        yield
    except ProtocolError:
        raise
    except InputError as error:
        message = str(error)
        require(
            "\n" not in message and len(message.split()) > 3,
            f"its InputError says {message!r}: say problem and remedy in one line",
        )
        if not allowed:
            raise
    except Exception as error:  # an adapter raises whatever its defect leads to
        if not allowed:
            raise
        raise ProtocolError(
            f"it raised {type(error).__name__} ({first_line(error)}): make this case work, or raise "
            "boxteacher.InputError with a remedy for the user"
        ) from error


def _check_labels(subject: Subject) -> None:
    images, targets = known_boxes(subject.num_classes, subject.device, seed=6)
    targets[1]["labels"] = targets[1]["labels"] + subject.num_classes
    model = BoxTeacher(copy.deepcopy(subject.model)).train()
    refused = True
    with _refusal(allowed=True):
        model(images, targets)
        refused = False
    require(
        refused,
        f"label {int(targets[1]['labels'].max())} of {subject.num_classes} classes passed without a word: "
        "begin forward_student with boxteacher.validation.check_labels(targets, num_classes)",
    )


def _without_boxes(*empty: int) -> Callable[[Subject], Batch]:
    def make(subject: Subject) -> Batch:
        counts = [0 if i in empty else 2 for i in range(2)]
        return known_boxes(subject.num_classes, subject.device, seed=6, counts=counts)

    return make


def _sizes(*sizes: tuple[int, int]) -> Callable[[Subject], Batch]:
    """Images of these heights and widths, one box each."""

    def make(subject: Subject) -> Batch:
        return known_boxes(subject.num_classes, subject.device, seed=6, sizes=sizes, counts=[1] * len(sizes))

    return make


def _without_area(subject: Subject) -> Batch:
    images, targets = known_boxes(subject.num_classes, subject.device, seed=6)
    targets[0]["boxes"][0] = torch.tensor([20.0, 30.0, 20.0, 30.0])
    targets[1]["boxes"][0, 2] = targets[1]["boxes"][0, 0]
    return images, targets


def _crowded(subject: Subject) -> Batch:
    """120 boxes, more than most networks of queries have queries."""
    images, _ = known_boxes(subject.num_classes, subject.device, seed=6, sizes=((61, 97),), counts=(1,))
    y, x = torch.meshgrid(torch.arange(10.0) * 6, torch.arange(12.0) * 8, indexing="ij")
    corners = torch.stack([x.flatten(), y.flatten()], 1)  # (120, 2)
    boxes = torch.cat([corners, corners + 6], 1).to(subject.device)
    return images, [{"boxes": boxes, "labels": torch.zeros(120, dtype=torch.int64, device=subject.device)}]


_CASES = {
    "a batch with an image without boxes": _Case(_without_boxes(0)),
    "a batch without any box": _Case(_without_boxes(0, 1)),
    "a batch of one image": _Case(_sizes((67, 93))),
    "boxes without area": _Case(_without_area),
    "images smaller than the coarsest stride": _Case(_sizes((9, 13), (7, 5)), may_refuse=True),
    "one image of 8 × 8 pixels": _Case(_sizes((8, 8)), may_refuse=True),
    "an image of 120 boxes": _Case(_crowded, may_refuse=True),
}
