"""The kit under `torch.compile`: who claims it must hold it."""

from dataclasses import replace

import pytest
import torch

from boxteacher import ProtocolError
from boxteacher.testing import check_provider
from boxteacher.testing.findings import Subject
from boxteacher.testing.precision import check_compiled
from tests.example_support import TinySegmenter
from tests.support import ScriptedSegmenter


class TwiceWhenCompiled(ScriptedSegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        factor = 2 if torch.compiler.is_compiling() else 1
        return replace(output, losses={name: loss * factor for name, loss in output.losses.items()})


class NeverCompiled(ScriptedSegmenter):
    @torch._dynamo.disable
    def maps(self, images):
        return super().maps(images)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (TwiceWhenCompiled, "forward_student: loss_class is .*do not claim compiles=True"),
        (NeverCompiled, "forward_student: cells.weight, .* are in no compiled graph: .*do not claim"),
    ],
)
def test_what_does_not_compile_must_not_claim_it(broken, words):
    """Tracing takes long, so the segmenter is the smallest there is."""
    with pytest.raises(ProtocolError, match=words):
        check_compiled(Subject(broken(), 1, 1e-3))


def test_what_claims_to_compile_is_compiled():
    check_provider(TinySegmenter(), compiles=True)
