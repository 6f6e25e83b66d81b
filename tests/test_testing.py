"""The conformance kit: a sound adapter passes, and wrong outputs, inputs and state are named in a line."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from boxteacher import ProtocolError
from boxteacher.protocol import Candidates, StudentOutput, Target
from boxteacher.testing import check_provider
from boxteacher.testing.outputs import check_student
from tests.example_support import TinySegmenter
from tests.testing_support import NUM_CLASSES, Broken, assert_fails, chosen, subject


def with_index(output: StudentOutput, index: Tensor) -> StudentOutput:
    return replace(output, masks=[replace(masks, target_index=index) for masks in output.masks])


def index_per_image(output: StudentOutput, targets: list[Target]) -> StudentOutput:
    place = torch.cat([torch.arange(len(target["boxes"])) for target in targets])
    return with_index(output, place[output.masks[0].target_index])


def last_image_first(output: StudentOutput, targets: list[Target]) -> StudentOutput:
    total = sum(len(target["boxes"]) for target in targets)
    return with_index(output, total - 1 - output.masks[0].target_index)


def change_boxes(output: StudentOutput, targets: list[Target]) -> StudentOutput:
    for target in targets:
        target["boxes"].div_(128)
    return output


def losses(change):
    return lambda output, _: replace(output, losses={k: change(v) for k, v in output.losses.items()})


STUDENT = {
    "a dict": (
        {"output": lambda o, _: vars(o)},
        "forward_student: it returned a dict: return a StudentOutput",
    ),
    "a loss per sample": (
        {"output": losses(lambda v: v.expand(3))},
        r"loss_class has shape \(3,\): return \(\)",
    ),
    "a loss of NaN": ({"output": losses(lambda v: v * torch.nan)}, "the loss loss_class holds NaN"),
    "a root of 0": (
        {"output": losses(lambda v: v + (v * 0).sqrt())},
        "the gradient of .* is NaN or infinite",
    ),
    "a detached loss": (
        {"output": losses(Tensor.detach)},
        "the loss loss_class has no gradient: do not detach",
    ),
    "detached masks": ({"masks": Tensor.detach}, "mask logits have no gradient"),
    "no masks": ({"output": lambda o, _: replace(o, masks=[])}, "masks is empty"),
    "a stride of 8": ({"masks": lambda m: m[:, ::2, ::2]}, r"shape .* is expected.* mask_stride 4"),
    "columns first": ({"masks": lambda m: m.transpose(1, 2)}, "rows before columns"),
    "targets counted per image": (
        {"output": index_per_image},
        r"target_index names \[0, 1\] of 3.*end to end",
    ),
    "the last image first": (
        {"output": last_image_first},
        "index says image 0 depend mainly on the pixels of image 1: target_index counts",
    ),
    "normalization in place": (
        {"images": lambda i: [x.mul_(0.5) for x in i]},
        "image 0 was changed in place",
    ),
    "targets changed in place": ({"output": change_boxes}, "target 0 was changed in place"),
    "Python's randomness": (
        {"output": losses(lambda v: v * (1 + random.random()))},
        "determinism: loss_class differs between two calls.*torch's own generator",
    ),
}


def decoded(change):
    """Another `decode_masks`, made of the sound one."""

    def changed(found: Candidates) -> Candidates:
        return replace(found, decode_masks=lambda *wanted: change(found, *wanted))

    return changed


TEACHER = {
    "a tuple": (lambda f: (f.boxes, f.scores), "forward_teacher: it returned a tuple: return Candidates"),
    "logits for scores": (lambda f: replace(f, scores=f.scores.logit()), "scores reaches from .*the sigmoid"),
    "labels from 1": (lambda f: replace(f, labels=f.labels + 1), "labels reaches from .*without background"),
    "labels as floats": (
        lambda f: replace(f, labels=f.labels.float()),
        "labels is torch.float32: return int64",
    ),
    "scores elsewhere": (
        lambda f: replace(f, scores=f.scores.to("meta")),
        "scores is on meta, the images on cpu",
    ),
    "boxes of NaN": (lambda f: replace(f, boxes=f.boxes * torch.nan), "boxes holds NaN"),
    "boxes of a resized image": (
        lambda f: replace(f, boxes=f.boxes * 2),
        r"not inside its image: .*map them back",
    ),
    "the other image's index": (
        lambda f: replace(f, boxes=f.boxes.clamp(max=60), image_index=1 - f.image_index),
        "change with the pixels of image 0: image_index must say",
    ),
    "sorted masks": (
        decoded(lambda f, i, *w: f.decode_masks(i.sort().values, *w)),
        "the order of the indices",
    ),
    "all masks": (
        decoded(lambda f, i, *w: f.decode_masks(torch.arange(len(f.scores)), *w)),
        "on decode_masks: masks of .* differ from those that decoding all gives: return the mask of each",
    ),
    "top-k over the batch": (
        lambda f: chosen(f, f.scores.topk(min(8, len(f.scores))).indices),
        "of image 1 change with the pixels of image 0: .*selected over the whole batch",
    ),
}


class OneImageOnly(TinySegmenter):
    """The masks of every candidate come from the first image's features."""

    def forward_teacher(self, images):
        features = self.features(images)
        found = super().forward_teacher(images)
        centers = (found.boxes[:, None, :2] + found.boxes[:, None, 2:]) / 2
        cells = (features.cells - centers).abs().sum(2).argmin(1)
        first = torch.zeros_like(found.image_index)
        return replace(found, decode_masks=lambda index, *_: self.masks(features, first[index], cells[index]))


class MovesStatistics(TinySegmenter):
    def forward_teacher(self, images):
        self.backbone.train()
        candidates = super().forward_teacher(images)
        self.backbone.eval()
        return candidates


class StaysInTraining(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        self.head.train()
        return candidates


class LateLayer(TinySegmenter):
    def features(self, images):
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(1))
        return super().features(images)


class UnusedLayer(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(8, 8, 1)


class LayerInAList(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(8, 8, 1)]

    def features(self, images):
        features = super().features(images)
        return replace(features, prototypes=features.prototypes + self.layers[0](features.prototypes))


STATE = {
    OneImageOnly: "masks of candidates of image 1 change with the pixels of image 0",
    MovesStatistics: r"forward_teacher made or changed backbone.stem.1.running_mean",
    StaysInTraining: "made or changed head.training.*leave train",
    LateLayer: "made or changed late: make parameters and buffers in __init__",
    UnusedLayer: r"no gradient reaches spare.weight, spare.bias \(2 of",
    LayerInAList: r"depend on tensors \(8, 8, 1, 1\), \(8,\) that are not in parameters.*nn.ModuleList",
}


@pytest.mark.parametrize("name", STUDENT)
def test_a_wrong_student_is_named_with_its_remedy(name):
    changes, words = STUDENT[name]
    assert_fails(Broken(**changes), words)


@pytest.mark.parametrize("name", TEACHER)
def test_a_wrong_teacher_is_named_with_its_remedy(name):
    change, words = TEACHER[name]
    assert_fails(Broken(candidates=change), words)


@pytest.mark.parametrize("broken", STATE, ids=lambda kind: kind.__name__)
def test_a_wrong_state_is_named_with_its_remedy(broken):
    assert_fails(broken(), STATE[broken])


def test_dropout_in_evaluation_is_named():
    broken = Broken(prototypes=lambda prototypes: nn.functional.dropout(prototypes, 0.2))
    assert_fails(broken, "determinism of forward_teacher: masks of candidates of two calls .*dropout")


class WithoutStudent(nn.Module):
    mask_stride, size_divisor = 4, 32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward_teacher(self, images: list[Tensor]) -> None: ...


class WithoutParameters(WithoutStudent):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward_student(self, images, targets): ...


@pytest.mark.parametrize(
    ("broken", "attributes", "words"),
    [
        (WithoutStudent, {}, r"lacks the method forward_student\(\)"),
        (WithoutParameters, {}, "it has no parameters"),
        (TinySegmenter, {"size_divisor": 30}, "size_divisor 30 is not a multiple of mask_stride 4"),
        (TinySegmenter, {"mask_stride": "4"}, "mask_stride is '4': make it a whole number of pixels"),
        (TinySegmenter, {"mask_stride": 0}, "mask_stride is 0: make it a whole number of pixels"),
    ],
)
def test_a_missing_part_of_the_protocol_is_named(broken, attributes, words):
    model = broken()
    for name, value in attributes.items():
        setattr(model, name, value)
    assert_fails(model, f"the parts of the protocol: .*{words}")


def test_the_number_of_classes_must_be_known():
    model = TinySegmenter()
    del model.num_classes
    with pytest.raises(ProtocolError, match="num_classes is None: give it to check_provider"):
        check_provider(model)


def test_a_model_of_fewer_classes_is_told_so():
    words = "forward_student: it refuses .*labels reach from 0 to 4.*the model's own num_classes"
    assert_fails(TinySegmenter(NUM_CLASSES), words, num_classes=5)


def test_a_sound_untrained_segmenter_passes_and_stays_as_it_is():
    model = TinySegmenter(NUM_CLASSES)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    check_provider(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


class Mixes(nn.BatchNorm2d):
    """An exaggerated batch norm: in training each image gets the other one's values."""

    def forward(self, x):
        return x.flip(0) if self.training else x


class BatchNormalized(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.norm = Mixes(8)

    def features(self, images):
        features = super().features(images)
        return replace(features, prototypes=100 * self.norm(features.prototypes))


def test_statistics_of_a_batch_may_mix_its_images():
    check_student(subject(BatchNormalized()))
