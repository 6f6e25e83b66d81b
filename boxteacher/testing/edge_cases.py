"""What data sets hold now and then: a step on it has finite losses and gradients, or says what is wrong."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from boxteacher.errors import InputError, ProtocolError
from boxteacher.teacher import BoxTeacher
from boxteacher.testing.findings import Subject, finding, require, require_finite_step
from boxteacher.testing.outputs import require_detections
from boxteacher.testing.scenes import Batch, known_boxes

_MAY_REFUSE = " (which boxteacher.adapter.InputError may refuse)"


def check_edge_cases(subject: Subject) -> None:
    """Runs a BoxTeacher step and the evaluation call on every unusual batch."""
    for name, (images, targets) in _batches(subject).items():
        model = BoxTeacher(copy.deepcopy(subject.model))
        with finding(subject.model, name), _refusal(_MAY_REFUSE in name):
            require_finite_step(model.student, model.train()(images, targets))
        with finding(subject.model, name), _refusal(_MAY_REFUSE in name), torch.no_grad():
            require_detections(subject, model.eval()(images), images)
    if subject.device.type == "cpu":  # elsewhere, looking at labels would synchronize
        images, targets = known_boxes(subject, seed=6)
        targets[1]["labels"] += subject.num_classes
        refused = True
        with finding(subject.model, "labels out of range, which boxteacher.adapter.check_labels refuses"):
            with _refusal(allowed=True):
                subject.copy(training=True).provider.forward_student(images, targets)
                refused = False
            label = int(targets[1]["labels"].max())
            require(refused, f"{label} of {subject.num_classes} classes passes without a word: call it first")


@contextmanager
def _refusal(allowed: bool) -> Iterator[None]:
    """Lets an InputError pass where one is allowed."""
    try:
        yield
    except InputError as error:
        if not allowed or isinstance(error, ProtocolError):
            raise


def _batches(subject: Subject) -> dict[str, Batch]:
    batch = partial(known_boxes, subject, seed=6)
    small = batch()
    small[1][0]["boxes"][0] = torch.tensor([20.0, 30.0, 20.2, 30.1])
    small[1][1]["boxes"][0, 2] = small[1][1]["boxes"][0, 0] + 0.1
    images, targets = batch()
    exact = [image.double() for image in images]
    lists: Any = [{key: torch.as_tensor(each).tolist() for key, each in t.items()} for t in targets]
    crowded = batch(sizes=((61, 97),), counts=(1,))
    corners = torch.cartesian_prod(torch.arange(12.0) * 8, torch.arange(10.0) * 6)  # (120, 2) x, y
    boxes = torch.cat([corners, corners + 6], 1).to(subject.device)
    crowded[1][0] = {"boxes": boxes, "labels": torch.zeros_like(boxes[:, 0], dtype=torch.int64)}
    return {
        "a batch with an image without boxes": batch(counts=(0, 2)),
        "a batch without any box": batch(counts=(0, 0)),
        "a batch of one image": batch(sizes=((67, 93),), counts=(1,)),
        "boxes of a fraction of a pixel": small,
        "images in float64 and lists as targets, which come cast": (exact, lists),
        f"images of 13 × 9 pixels{_MAY_REFUSE}": batch(sizes=((9, 13), (7, 5)), counts=(1, 1)),
        f"one image of 8 × 8 pixels{_MAY_REFUSE}": batch(sizes=((8, 8),), counts=(1,)),
        f"an image of 120 boxes{_MAY_REFUSE}": crowded,  # most networks of queries have fewer queries
    }
