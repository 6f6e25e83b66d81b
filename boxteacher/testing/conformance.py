"""`check_provider`: every check of the kit, the cheap ones first."""

import copy

import torch
from torch import nn

from boxteacher.adaptation import as_provider
from boxteacher.errors import ProtocolError
from boxteacher.supervision import BoxSupervised
from boxteacher.testing.copies import check_copies
from boxteacher.testing.edge_cases import check_edge_cases
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.placement import check_landing, check_padding
from boxteacher.testing.precision import check_compiled, check_half_precision
from boxteacher.testing.student import check_student
from boxteacher.testing.teacher import check_candidates, check_detections
from boxteacher.testing.training import learn


def check_provider(
    model: nn.Module, *, num_classes: int | None = None, compiles: bool = False, tolerance: float = 1e-3
) -> None:
    """Checks that a model does all that the core relies on, and says what to change where it does not.

    The model itself stays as it is: copies of it are run, and one is trained for up to 200 steps on small
    images with known boxes, to see that boxes, labels and masks land where they should. Seconds for a small
    network; build a large one with its smallest settings.

    Example:
        >>> def test_my_segmenter_can_be_taught():  # doctest: +SKIP
        ...     check_provider(MySegmenter(num_classes=3))

    Args:
        model: what `BoxTeacher` is given; trained or not, on the device to be checked.
        num_classes: C; labels are 0 … C−1. The provider's attribute of that name if not given.
        compiles: also check `forward_student` and the evaluation call under `torch.compile`.
        tolerance: relative difference allowed between two runs that ought to agree.

    Raises:
        ProtocolError: a check failed; one line names the check, what was found and what to change.
    """
    with torch.random.fork_rng(), finding(model, "the parts of the protocol"):
        torch.manual_seed(0)
        provider = _provider(model)
        classes = _number_of_classes(provider, num_classes)
    subject = Subject(provider, classes, tolerance)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check_student(subject)
        check_candidates(subject)
        check_detections(subject)
        # An untrained network may find nothing, so whatever needs candidates looks at a trained copy.
        learnt = Subject(learn(subject), classes, tolerance)
        check_candidates(learnt)
        check_detections(learnt)
        check_landing(learnt)
        check_padding(learnt)
        check_copies(learnt, subject.model)
        check_edge_cases(learnt)
        check_half_precision(learnt)
        if compiles:
            check_compiled(learnt)


def _number_of_classes(provider: nn.Module, given: int | None) -> int:
    value = getattr(provider, "num_classes", None) if given is None else given
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProtocolError(
            f"num_classes is {value!r}: give check_provider the number of classes, or the model an attribute"
        )
    return value


def _provider(model: nn.Module) -> nn.Module:
    """A copy of the model, or of its type's adapter round it."""
    provider = as_provider(copy.deepcopy(model))
    for name in ("mask_stride", "size_divisor"):
        value = getattr(provider, name, 1)  # what is missing altogether, `BoxSupervised` says
        require(
            isinstance(value, int) and value > 0, f"{name} is {value!r}: make it a whole number of pixels"
        )
    require(
        any(True for _ in provider.parameters()), "it has no parameters: register its layers as attributes"
    )
    return BoxSupervised(provider).student
