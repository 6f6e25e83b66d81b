"""What the tests of the conformance kit share: a segmenter with trained weights, and ways to break it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxteacher import Candidates, ProtocolError
from boxteacher.testing import check_provider, conformance
from boxteacher.testing.findings import Subject
from tests.example_support import TinySegmenter

NUM_CLASSES = 3


@cache
def trained_weights() -> dict[str, Tensor]:
    """Weights with which known boxes are found well, so that a broken adapter need not be trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = subject(TinySegmenter(NUM_CLASSES))
        for _ in range(3):
            trained = conformance._trained(trained, steps=200)
        return trained.model.state_dict()


def subject(model: nn.Module) -> Subject:
    return Subject(model, NUM_CLASSES, 1e-3)


class Broken(TinySegmenter):
    """The sound segmenter, changed by functions of what one of its methods takes or returns."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(NUM_CLASSES)
        self.changes = changes

    def change(self, what: str, value: Any, *more: Any) -> Any:
        return self.changes[what](value, *more) if what in self.changes else value

    def forward(self, images):
        return self.change("detections", super().forward(images), images)

    def forward_teacher(self, images):
        return self.change("candidates", super().forward_teacher(self.change("images", images)))

    def forward_student(self, images, targets):
        targets = self.change("targets", targets)
        return self.change("output", super().forward_student(images, targets), targets)

    def features(self, images):
        features = super().features(images)
        return replace(features, prototypes=self.change("prototypes", features.prototypes))

    def masks(self, *arguments):
        return self.change("masks", super().masks(*arguments))


def chosen(found: Candidates, keep: Tensor) -> Candidates:
    """The candidates `keep` (K,) int64, in that order."""

    def decode_masks(index, *wanted):
        return found.decode_masks(keep[index], *wanted)

    columns = {key: vars(found)[key][keep] for key in ("boxes", "scores", "labels", "image_index")}
    return Candidates(**columns, decode_masks=decode_masks)


def assert_fails(
    model: nn.Module,
    words: str,
    *,
    steps: int = 1,
    num_classes: int = NUM_CLASSES,
    check: Callable[[Subject], None] | None = None,
) -> None:
    """The model, with trained weights if it has them, fails in one line that names it and matches `words`.

    A check that is given is run alone, instead of the whole kit.
    """
    model.load_state_dict(trained_weights(), strict=False)
    kit = partial(check_provider, model, num_classes=num_classes, steps=steps)
    with pytest.raises(ProtocolError, match=words) as caught:
        kit() if check is None else check(subject(model))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{type(model).__name__} fails check_provider on ")
