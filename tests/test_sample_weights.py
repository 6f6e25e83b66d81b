"""Weights of samples and decoder layers, and regions where no mask is learned."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher, InputError, MaskSupervised
from boxteacher.protocol import StudentOutput
from tests.support import ScriptedSegmenter, filled, script, seeded_images, target
from tests.teaching_support import numbers

IMAGES = seeded_images((32, 48), (32, 48))
TARGETS = [
    target((4, 4, 30, 30), masks=filled((4, 4, 30, 30), 32, 48)[None]),
    target((8, 2, 40, 28), masks=filled((8, 2, 40, 28), 32, 48)[None]),
]
PLAN = script((0, (4, 4, 30, 30), 0.9), (1, (8, 2, 40, 28), 0.9))
BOXES_ALONE = [{key: each[key] for key in ("boxes", "labels")} for each in TARGETS]


class Weighted(ScriptedSegmenter):
    """Keeps its mask logits, and weighs its layers."""

    weights: tuple[Tensor | float, ...] = ()
    logits: Tensor

    def forward_student(self, images, targets) -> StudentOutput:
        output = super().forward_student(images, targets)
        self.logits = output.masks[0].logits
        self.logits.retain_grad()
        if not self.weights:
            return output
        masks = [replace(m, weight=w) for m, w in zip(output.masks, self.weights, strict=True)]
        return replace(output, masks=masks)


def wrapped(kind: type, *weights: Tensor | float):
    torch.manual_seed(0)
    student = Weighted(PLAN, layers=max(len(weights), 1))
    student.weights = weights
    more = {} if kind is MaskSupervised else {"warmup_steps": 0}
    if kind is BoxTeacher:
        more |= {"augmentation": torch.nn.Identity(), "teacher": EMATeacher(student)}
    return kind(student, **more).train()


def losses_of(kind: type, *weights: Tensor | float) -> dict[str, float]:
    return numbers(wrapped(kind, *weights)(IMAGES, TARGETS if kind is MaskSupervised else BOXES_ALONE))


WRAPPERS = [BoxSupervised, MaskSupervised, BoxTeacher]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_mask_losses_are_proportional_to_a_layer_s_weight_and_others_do_not_change(kind):
    plain, weighted = losses_of(kind), losses_of(kind, 2.5)
    for name, loss in plain.items():
        factor = 1.0 if name == "loss_class" else 2.5
        assert weighted[name] == pytest.approx(factor * loss, rel=1e-5)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_layers_are_averaged_with_their_weights(kind):
    """Linear in each layer's weight: what two layers weigh adds up."""
    both, first, second = (losses_of(kind, *w) for w in ((2.0, 3.0), (2.0, 1e-9), (1e-9, 3.0)))
    for name in both.keys() - {"loss_class"}:
        assert both[name] == pytest.approx(first[name] + second[name], rel=1e-5)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_each_sample_has_its_own_weight(kind):
    """The gradient of a sample's logits is proportional to its weight alone."""
    gradients = []
    for weight in (torch.ones(2), torch.tensor([1.0, 3.0])):
        model = wrapped(kind, weight)
        losses = model(IMAGES, TARGETS if kind is MaskSupervised else BOXES_ALONE)
        sum(loss for name, loss in losses.items() if name != "loss_class").backward()
        gradients.append(model.student.logits.grad)
    assert gradients[0].abs().amax((1, 2)).min() > 0
    assert_close(gradients[1], gradients[0] * torch.tensor([1.0, 3.0])[:, None, None], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_no_mask_is_learned_in_an_ignore_box(kind):
    model = wrapped(kind)
    targets = [dict(each) for each in (TARGETS if kind is MaskSupervised else BOXES_ALONE)]
    targets[0]["ignore_boxes"] = torch.tensor([[16.0, 0.0, 48.0, 32.0]])
    losses = model(IMAGES, targets)
    sum(loss for name, loss in losses.items() if name != "loss_class").backward()
    gradient = model.student.logits.grad  # (2, 8, 12)
    assert (gradient[0, :, 4:] == 0).all()
    assert gradient[0, :, :4].abs().max() > 0
    assert gradient[1, :, 4:].abs().max() > 0


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (torch.zeros(4), r"target 0: ignore_boxes has shape \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.bool), "ignore_boxes are torch.bool: give float32"),
    ],
)
def test_ignore_boxes_that_are_none_are_refused(regions, words):
    with pytest.raises(InputError, match=words):
        wrapped(BoxSupervised)(IMAGES, [{**BOXES_ALONE[0], "ignore_boxes": regions}, BOXES_ALONE[1]])
