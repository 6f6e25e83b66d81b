"""What the tests of the conformance kit share: a segmenter that has learnt known boxes, and broken ones."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxteacher import ProtocolError
from boxteacher.testing import check_provider, training
from boxteacher.testing.findings import Subject
from tests.example_support import TinySegmenter

NUM_CLASSES = 3


@cache
def learnt_weights() -> dict[str, Tensor]:
    """Weights with which known boxes land, so that a broken adapter need not be trained for long."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return training.learn(Subject(TinySegmenter(NUM_CLASSES), NUM_CLASSES, 1e-3)).state_dict()


def assert_fails(model: nn.Module, words: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The model, with learnt weights if it has them, fails in one line that names it and matches `words`."""
    monkeypatch.setattr(training, "_STEPS", 60)
    model.load_state_dict(learnt_weights(), strict=False)
    with pytest.raises(ProtocolError, match=words) as caught:
        check_provider(model, **{"num_classes": NUM_CLASSES, **options})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(type(model).__name__)
