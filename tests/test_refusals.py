"""Invalid models and batches: errors of one line that name what is wrong."""

import math

import pytest
import torch
from torch import nn

from boxteacher import BoxTeacher, InputError, PseudoMaskProvider
from tests.support import (
    ScriptedSegmenter,
    target,
)
from tests.teaching_support import (
    IMAGE,
    PLAN,
    teacher_of,
)


@pytest.mark.parametrize("name", ["forward_teacher", "forward_student", "mask_stride", "size_divisor"])
def test_the_error_for_an_incomplete_model_names_the_missing_part_and_the_guide(name):
    parts = {
        "mask_stride": 4,
        "size_divisor": 32,
        "forward_teacher": lambda self, images: None,
        "forward_student": lambda self, images, targets: None,
    }
    del parts[name]
    incomplete = type("Incomplete", (nn.Module,), parts)
    with pytest.raises(TypeError, match=rf"Incomplete.*{name}.*docs/write_an_adapter\.md"):
        BoxTeacher(incomplete())


def test_the_scripted_segmenter_follows_the_protocol():
    assert isinstance(ScriptedSegmenter(), PseudoMaskProvider)
    assert not isinstance(nn.Linear(2, 2), PseudoMaskProvider)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([IMAGE], None, "training needs targets"),
        ([IMAGE], [], "1 images .* 0 targets"),
        ([], [], "empty list: give at least one image"),
        ([IMAGE[:, :0]], [target()], r"image 0 .*\(3, 0, 48\).*at least one pixel"),
        ([IMAGE * 255], [target()], r"image 0 has values from .*RGB in \[0, 1\]"),
        ([IMAGE * math.nan], [target()], "image 0 has values from nan to nan"),
        ([IMAGE[:1]], [target()], r"image 0 .*\(1, 32, 48\).*RGB"),
        ([IMAGE, IMAGE[0]], [target(), target()], r"image 1 .*\(32, 48\)"),
        ([IMAGE], [{"labels": torch.zeros(1)}], "target 0 .*'boxes'"),
        ([IMAGE], [{"boxes": torch.zeros(1, 4)}], "target 0 .*'labels'"),
        ([IMAGE], [{"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}], r"boxes .*\(2, 5\)"),
        ([IMAGE], [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(3)}], r"labels .*\(3,\)"),
        ([IMAGE], [target((0, 0, 9, 9), masks=torch.zeros(1, 48, 32))], r"masks .*\(1, 48, 32\)"),
        ([IMAGE], [target((0, 0, 9, 9), masks=torch.zeros(2, 32, 48))], r"masks .*\(2, 32, 48\)"),
        (
            [IMAGE],
            [target((0, 0, 9, 9), masks=torch.zeros(1, 32, 48), has_mask=torch.ones(2).bool())],
            r"has_mask .*\(2,\)",
        ),
    ],
)
def test_an_invalid_batch_is_refused_in_one_line(images, targets, message):
    with pytest.raises(InputError, match=message) as caught:
        teacher_of(PLAN)(images, targets)
    assert "\n" not in str(caught.value)


def test_boxes_of_one_dimension_are_refused():
    with pytest.raises(InputError, match="target 0: boxes"):
        teacher_of(PLAN)([IMAGE], [{"boxes": torch.zeros(4), "labels": torch.zeros(4)}])
