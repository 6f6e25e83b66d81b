"""The conformance kit: a sound adapter passes, and each kind of defect is named with its remedy."""

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boxteacher import ProtocolError, StudentOutput
from boxteacher.testing import check_provider
from tests.example_support import TinySegmenter
from tests.testing_support import assert_fails


def with_masks(output: StudentOutput, **changes: Any) -> StudentOutput:
    return replace(output, masks=[replace(masks, **changes) for masks in output.masks])


class WithoutStudent(nn.Module):
    mask_stride, size_divisor = 4, 32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward_teacher(self, images: list[Tensor]) -> None: ...


class UnevenDivisor(TinySegmenter):
    size_divisor = 30


class PlainDict(TinySegmenter):
    def forward_student(self, images, targets):
        return vars(super().forward_student(images, targets))


class LossPerSample(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        return replace(output, losses={"loss_box": output.losses["loss_box"].expand(3)})


class DetachedLoss(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        return replace(output, losses={name: loss.detach() for name, loss in output.losses.items()})


class DetachedMasks(TinySegmenter):
    def masks(self, *arguments):
        return super().masks(*arguments).detach()


class CoarseGrid(TinySegmenter):
    def masks(self, *arguments):
        return super().masks(*arguments)[:, ::2, ::2]


class ColumnsFirst(TinySegmenter):
    def masks(self, *arguments):
        return super().masks(*arguments).transpose(1, 2)


class SwappedContent(TinySegmenter):
    """Rows and columns are mixed up, then stretched to the right shape."""

    def masks(self, *arguments):
        logits = super().masks(*arguments)
        turned = logits.transpose(1, 2)[:, None]
        return nn.functional.interpolate(turned, logits.shape[1:], mode="bilinear")[:, 0]


class EnlargedTwice(TinySegmenter):
    def masks(self, *arguments):
        logits = super().masks(*arguments)
        enlarged = nn.functional.interpolate(logits[:, None], scale_factor=2.0, mode="bilinear")[:, 0]
        return enlarged[:, : logits.shape[1], : logits.shape[2]]


class IndexPerImage(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        counts = [len(target["boxes"]) for target in targets]
        first = torch.tensor([sum(counts[:i]) for i, count in enumerate(counts) for _ in range(count)])
        index = output.masks[0].target_index
        return with_masks(output, target_index=index - first[index])


class LastImageFirst(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        total = sum(len(target["boxes"]) for target in targets)
        return with_masks(output, target_index=total - 1 - output.masks[0].target_index)


class OthersBoxes(TinySegmenter):
    """Masks of an image's two objects learn each other's boxes."""

    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        order = [n for i, t in enumerate(targets) for n in reversed(range(len(t["boxes"])))]
        first = [sum(len(t["boxes"]) for t in targets[:i]) for i, t in enumerate(targets) for _ in t["boxes"]]
        order = torch.tensor([f + n for f, n in zip(first, order, strict=True)])
        return with_masks(output, target_index=order[output.masks[0].target_index])


class UnmappedResize(TinySegmenter):
    """Boxes are those of an image twice as large."""

    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        return replace(candidates, boxes=candidates.boxes * 2)


class RowsBeforeColumns(TinySegmenter):
    """Boxes are y0, x0, y1, x1, clipped."""

    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        return replace(candidates, boxes=candidates.boxes[:, [1, 0, 3, 2]].clamp(max=61))


class LogitScores(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        return replace(candidates, scores=candidates.scores.logit())


class LabelsFromOne(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        return replace(candidates, labels=candidates.labels + 1)


class FloatLabels(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        return replace(candidates, labels=candidates.labels.float())


class WrongImageIndex(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        boxes = candidates.boxes.clamp(max=60)  # inside either image
        return replace(candidates, boxes=boxes, image_index=len(images) - 1 - candidates.image_index)


class SortedDecoding(TinySegmenter):
    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        decode_masks = candidates.decode_masks
        return replace(
            candidates, decode_masks=lambda index, *wanted: decode_masks(index.sort().values, *wanted)
        )


class InvertedMasks(TinySegmenter):
    def forward_teacher(self, images):
        found = super().forward_teacher(images)
        return replace(found, decode_masks=lambda *wanted: -found.decode_masks(*wanted))


class OneImageOnly(TinySegmenter):
    """The masks of every candidate are drawn from the first image's features."""

    def forward_teacher(self, images):
        features = self.features(images)
        found = super().forward_teacher(images)
        cells = (
            (features[0] - (found.boxes[:, None, :2] + found.boxes[:, None, 2:]) / 2).abs().sum(2).argmin(1)
        )
        first = torch.zeros_like(found.image_index)
        return replace(found, decode_masks=lambda index, *_: self.masks(features, first[index], cells[index]))


class UpdatesItself(TinySegmenter):
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


class OwnGradients(TinySegmenter):
    def forward_teacher(self, images):
        with torch.enable_grad():
            return super().forward_teacher(images)


class UnusedLayer(TinySegmenter):
    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(8, 8, 1)


class NormalisesInPlace(TinySegmenter):
    def features(self, images):
        return super().features([image.mul_(0.5) for image in images])


class ChangesTargets(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        for target in targets:
            target["boxes"].div_(128)
        return output


class OwnRandomness(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        return replace(output, losses={k: v * (1 + random.random()) for k, v in output.losses.items()})


class NoPerfectLoss(TinySegmenter):
    """The mean over no positive sample is NaN."""

    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        mean = output.masks[0].logits.mean((1, 2)).mean() * 0
        return replace(output, losses={**output.losses, "loss_mean": mean})


class DividesByArea(TinySegmenter):
    def forward_student(self, images, targets):
        output = super().forward_student(images, targets)
        boxes = torch.cat([target["boxes"] for target in targets])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return replace(
            output, losses={**output.losses, "loss_area": (output.losses["loss_box"] / area).sum()}
        )


class RefusesEmpty(TinySegmenter):
    def forward_student(self, images, targets):
        for target in targets:
            target["boxes"].amax(0)
        return super().forward_student(images, targets)


class AnyLabel(TinySegmenter):
    def forward_student(self, images, targets):
        labels = [t["labels"].clamp(max=self.num_classes - 1) for t in targets]
        return super().forward_student(
            images, [{**t, "labels": label} for t, label in zip(targets, labels, strict=True)]
        )


class HiddenWeight(TinySegmenter):
    """A tensor that counts but is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.gain = torch.ones(1)

    def features(self, images):
        cells, classes, boxes, coefficients, prototypes = super().features(images)
        return cells, classes, boxes, coefficients, prototypes * self.gain


class SharedCopies(TinySegmenter):
    def __deepcopy__(self, memo):
        twin = TinySegmenter.__new__(type(self))
        nn.Module.__init__(twin)
        twin.__dict__.update(self.__dict__)
        twin._modules = {name: copy.copy(module) for name, module in self._modules.items()}
        return twin


class MaskLogitsDetected(TinySegmenter):
    def forward(self, images):
        return [{**found, "masks": found["masks"] * 20 - 10} for found in super().forward(images)]


class MasksWithoutChannel(TinySegmenter):
    def forward(self, images):
        return [{**found, "masks": found["masks"][:, 0]} for found in super().forward(images)]


class PartsOfTheCanvas(TinySegmenter):
    """Boxes are counted in parts of the canvas, and taken back by the size of this network's usual canvas."""

    def forward_teacher(self, images):
        candidates = super().forward_teacher(images)
        longest = max(max(image.shape[1:]) for image in images)
        return replace(candidates, boxes=candidates.boxes * (96 / (-(-longest // 32) * 32)))


class HalfCoordinates(TinySegmenter):
    """Positions multiplied in half precision are off by whole cells."""

    def masks(self, features, image, cell):
        logits = super().masks(features, image, cell)
        if not torch.is_autocast_enabled("cpu"):
            return logits
        return logits.roll(8, 2)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WithoutStudent, r"parts of the protocol.*lacks the method forward_student\(\)"),
        (UnevenDivisor, "size_divisor 30 is not a multiple of mask_stride 4"),
        (PlainDict, r"forward_student: .*returned a dict: return boxteacher.StudentOutput"),
        (LossPerSample, r"the loss loss_box has shape \(3,\): return \(\)"),
        (DetachedLoss, "the loss loss_class has no gradient: do not detach"),
        (DetachedMasks, "mask logits have no gradient"),
        (CoarseGrid, r"mask logits have shape .* is due.* mask_stride 4"),
        (ColumnsFirst, "rows before columns"),
        (SwappedContent, "where a known box lands: .*rows and columns are swapped"),
        (EnlargedTwice, "where a known box lands: .*enlarged twice too much; check mask_stride"),
        (IndexPerImage, r"target_index names \[0, 1\].*end to end"),
        (LastImageFirst, r"image 0 are drawn from the pixels of image 1.*target_index counts"),
        (OthersBoxes, "where a known box lands: .*target_index names the target of each mask"),
        (UnmappedResize, "boxes over the image's size reaches from .*map them back"),
        (RowsBeforeColumns, r"candidates' boxes overlap.*x0, y0, x1, y1.*order of coordinates"),
        (LogitScores, "scores reaches from .*apply the sigmoid"),
        (LabelsFromOne, r"labels reaches from .*without background"),
        (FloatLabels, r"labels is torch.float32: return int64"),
        (WrongImageIndex, "change with the pixels of image 0: image_index must say"),
        (SortedDecoding, "decode_masks: .*in the order of the indices"),
        (InvertedMasks, "boxes are right, but masks from decode_masks overlap them"),
        (OneImageOnly, "masks of image 1's candidates change with the pixels of image 0"),
        (UpdatesItself, "forward_teacher changed backbone.stem.1.num_batches_tracked"),
        (StaysInTraining, "between training and evaluation mode: leave"),
        (OwnGradients, "carry a gradient though it is called under torch.no_grad"),
        (UnusedLayer, r"no gradient reaches spare.weight, spare.bias \(2 of"),
        (NormalisesInPlace, "image 0 was changed in place"),
        (ChangesTargets, "target 0: boxes were changed in place"),
        (OwnRandomness, "determinism: loss_class is .*torch's own generator"),
        (NoPerfectLoss, "a batch without any box: loss_mean is nan: divide by"),
        (DividesByArea, "boxes without area: loss_area is inf"),
        (RefusesEmpty, "an image without boxes: it raised IndexError .*make this case work"),
        (AnyLabel, "label 5 of 3 classes passed without a word.*check_labels"),
        (HiddenWeight, "state_dict: .*register_buffer"),
        (SharedCopies, "deepcopy: .*is the original's own tensor"),
        (MaskLogitsDetected, "masks of image . reaches from .*apply the sigmoid"),
        (MasksWithoutChannel, r"masks of image 0 has shape"),
        (PartsOfTheCanvas, "beside a larger one: .*in pixels, not in parts of the canvas"),
        (HalfCoordinates, "half precision: .*full_precision"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_defect_is_named_with_its_remedy(broken, words, monkeypatch):
    assert_fails(broken(), words, monkeypatch)


def test_a_sound_untrained_segmenter_passes_and_stays_as_it_is():
    model = TinySegmenter(3)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    check_provider(model, num_classes=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_number_of_classes_must_be_known():
    model = TinySegmenter()
    del model.num_classes
    with pytest.raises(ProtocolError, match="num_classes is None: give check_provider the number"):
        check_provider(model)
