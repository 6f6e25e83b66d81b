"""The conformance kit's verdicts: sound networks are not faulted, planted faults are, learning is neither."""

import logging
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from boxteacher import InputError, ProtocolError
from boxteacher.protocol import StudentOutput
from boxteacher.testing import InconclusiveError, check_provider, conformance
from boxteacher.testing.outputs import check_student
from boxteacher.testing.placement import check_places
from tests.example_support import TinyBackbone, TinySegmenter
from tests.kit_networks import CroppedPrototypes
from tests.testing_support import NUM_CLASSES, chosen, subject


class Planted(CroppedPrototypes):
    """Masks cropped to the box that is predicted, and a fault."""

    def __init__(self, **changes) -> None:
        torch.manual_seed(0)
        super().__init__(TinyBackbone(), channels=32, prototypes=8)
        self.changes = changes

    def change(self, what, value, *more):
        return self.changes[what](value, *more) if what in self.changes else value

    def forward_student(self, images, targets):
        output = super().forward_student(self.change("images", images), targets)
        return self.change("student", output, targets)

    def forward_teacher(self, images):
        return self.change("teacher", super().forward_teacher(images))


def each(change):
    return lambda output, _: replace(output, masks=[change(masks) for masks in output.masks])


def index_per_image(output: StudentOutput, targets) -> StudentOutput:
    place = torch.cat([torch.arange(len(target["boxes"])) for target in targets])
    return each(lambda m: replace(m, target_index=place[m.target_index]))(output, targets)


def order_of_the_last_image(output: StudentOutput, targets) -> StudentOutput:
    total = sum(len(target["boxes"]) for target in targets)
    return each(lambda m: replace(m, target_index=total - 1 - m.target_index))(output, targets)


FAULTS = {
    "indices per image": ({"student": index_per_image}, "target_index names .* of 3 targets"),
    "masks in another image's order": (
        {"student": order_of_the_last_image},
        "depend mainly on the pixels of image 1: target_index counts",
    ),
    "stride 8": (
        {"student": each(lambda m: replace(m, logits=m.logits[:, ::2, ::2]))},
        "mask logits have shape .* at mask_stride 4",
    ),
    "detached masks": (
        {"student": each(lambda m: replace(m, logits=m.logits.detach()))},
        "mask logits have no gradient",
    ),
    "labels from 1": (
        {"teacher": lambda found: replace(found, labels=found.labels + 1)},
        "labels reaches from .*without background",
    ),
    "normalization in place": (
        {"images": lambda images: [image.sub_(0.5) for image in images]},
        "image 0 was changed in place: normalize a copy",
    ),
    "top-k over the batch": (
        {"teacher": lambda found: chosen(found, found.scores.topk(min(6, len(found.scores))).indices)},
        "of image 1 change with the pixels of image 0: .*selected over the whole batch",
    ),
    "a weight of 0": ({"student": each(lambda m: replace(m, weight=0.0))}, "weight is 0.0: give one number"),
}

PLACES = {
    "shifted boxes": (
        {"teacher": lambda found: replace(found, boxes=(found.boxes - 8).clamp(min=0))},
        r"candidates' boxes .* off by \(-[67].*, -[678].*\) pixels \(y, x\), all moved alike: ",
    ),
    "boxes of an image of half the size": (
        {"teacher": lambda found: replace(found, boxes=found.boxes / 2)},
        "candidates' boxes overlap the known ones by an IoU of 0.1.*undo any resizing",
    ),
    "boxes of an image of 0.8 the size": (
        {"teacher": lambda found: replace(found, boxes=found.boxes * 0.8)},
        r"candidates' boxes .*, all scaled by \(0.[78]\d, 0.[78]\d\): .*undo any resizing",
    ),
    "probabilities for logits": (
        {"student": each(lambda m: replace(m, logits=m.logits.sigmoid()))},
        r"all mask logits lie in \[0, 1\]: return logits, not probabilities",
    ),
    "masks for the other target": (
        {"student": each(lambda m: replace(m, target_index=m.target_index ^ 1))},
        "they fit another target",
    ),
}


class LayerInAList(Planted):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(8, 8, 1)]
        plain = self.prototypes.forward
        self.prototypes.forward = lambda x: self.layers[0](plain(x))


@pytest.fixture(scope="module")
def learned() -> dict[str, Tensor]:
    """Weights with which a head that crops to its own box finds known boxes."""
    with torch.random.fork_rng():
        return conformance._trained(subject(Planted()), steps=300).model.state_dict()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_whatever_the_network(name, learned):
    changes, words = FAULTS[name]
    model = Planted(**changes)
    model.load_state_dict(learned)
    with pytest.raises(ProtocolError, match=words):
        check_provider(model, steps=1)


@pytest.mark.parametrize("name", PLACES)
def test_a_misplacement_is_told_from_a_lack_of_learning(name, learned):
    changes, words = PLACES[name]
    model = Planted(**changes)
    model.load_state_dict(learned)
    with pytest.raises(ProtocolError, match=words):
        check_places(subject(model))


def test_a_layer_in_a_plain_list_is_named():
    with pytest.raises(ProtocolError, match=r"not in parameters.*nn.ModuleList"):
        check_provider(LayerInAList(), steps=1)


def test_what_has_not_been_learned_is_no_fault_and_says_what_to_give():
    with pytest.raises(
        InconclusiveError, match=r"has not learned enough in 3 steps .*give steps=6"
    ) as caught:
        check_provider(Planted(), steps=3)
    assert not isinstance(caught.value, ProtocolError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_that_are_half_learned_are_no_fault(seed, learned):
    """Boxes with an error of their own, and masks cropped to them."""

    class Inexact(Planted):
        def predict(self, images):
            class_logits, boxes, *more = super().predict(images)
            noise = torch.randn(boxes.shape, generator=torch.Generator().manual_seed(seed))
            sides = boxes[..., 2:] - boxes[..., :2]  # (B, L, 2)
            return class_logits, boxes + noise * 0.15 * sides.repeat(1, 1, 2), *more

    model = Inexact()
    model.load_state_dict(learned)
    with suppress(InconclusiveError):
        check_places(subject(model))


def test_the_number_of_steps_must_be_one():
    with pytest.raises(InputError, match="steps is 0: give a whole number, at least 1"):
        check_provider(Planted(), steps=0)


def test_progress_is_logged_and_nothing_is_printed(caplog, capsys, learned):
    model = Planted()
    model.load_state_dict(learned)
    with caplog.at_level(logging.INFO, "boxteacher.testing"):
        check_provider(model, steps=20)
    assert any("after 20 steps" in record.getMessage() for record in caplog.records)
    assert capsys.readouterr() == ("", "")


def test_the_generators_of_random_numbers_neither_change_nor_matter():
    def verdict(before: int) -> tuple[str, bool]:
        model = Noisy()
        torch.manual_seed(before)
        random.seed(before)
        states = torch.get_rng_state(), random.getstate()
        with pytest.raises(InconclusiveError) as caught:
            check_provider(model, steps=2)
        same = torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        return str(caught.value), same

    class Noisy(Planted):
        """Draws random numbers, and so learns something else from another seed."""

        def forward_student(self, images, targets):
            output = super().forward_student(images, targets)
            noise = 1 + torch.rand(())
            return replace(output, losses={name: loss * noise for name, loss in output.losses.items()})

    first, second = verdict(1), verdict(2)
    assert first == second
    assert first[1]


class MixesImages(nn.Module):
    """Adds a part of the batch's mean, as statistics of a batch do that are no `nn.BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3 * x.mean(0, keepdim=True) if self.training else x


def test_a_layer_of_one_s_own_may_mix_a_batch_s_images_in_training():
    model = TinySegmenter(NUM_CLASSES)
    model.prototypes.append(MixesImages())
    check_student(subject(model))
