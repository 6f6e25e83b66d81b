"""The conformance kit: boxes, masks and labels that do not lie on known boxes are named with their remedy."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boxteacher.grid import padded_size
from boxteacher.protocol import StudentOutput, Target
from boxteacher.testing import InconclusiveError, check_provider
from boxteacher.testing.placement import check_places
from tests.testing_support import NUM_CLASSES, Broken, assert_fails, chosen, subject, trained_weights

Found = dict[str, Tensor]


def stretched(masks: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(masks, size, mode="bilinear")


def transposed(masks: Tensor) -> Tensor:
    return stretched(masks.transpose(-1, -2), list(masks.shape[-2:]))


def enlarged_twice(masks: Tensor) -> Tensor:
    height, width = masks.shape[-2:]
    return stretched(masks[:, None], [2 * height, 2 * width])[:, 0, :height, :width]


def each_other_s(output: StudentOutput, targets: list[Target]) -> StudentOutput:
    """Masks of an image's two objects learn each other's boxes."""
    counts = [len(target["boxes"]) for target in targets]
    order = torch.cat([sum(counts[:i]) + torch.arange(n).flip(0) for i, n in enumerate(counts)])
    return replace(output, masks=[replace(m, target_index=order[m.target_index]) for m in output.masks])


def rows_first(targets: list[Target]) -> list[Target]:
    return [{**target, "boxes": target["boxes"][:, [1, 0, 3, 2]]} for target in targets]


STUDENT = {
    "transposed": ({"masks": lambda m: transposed(m[:, None])[:, 0]}, "rows before columns"),
    "features of another stride": ({"masks": enlarged_twice}, "on the padded batch's grid at mask_stride"),
    "six cells to the right": (
        {"masks": lambda m: F.pad(m, (6, 0))[..., :-6]},
        r"are off by \(.*, \+.*\) pixels",
    ),
    "the other object's": ({"output": each_other_s}, "target_index names the target of each mask"),
    "probabilities": ({"masks": Tensor.sigmoid}, r"lie in \[0, 1\]: return logits, not probabilities"),
}


@pytest.mark.parametrize("name", STUDENT)
def test_masks_of_the_student_lie_on_known_boxes(name):
    changes, words = STUDENT[name]
    words = f"the student's masks overlap the known ones by an IoU of only.*{words}"
    assert_fails(Broken(**changes), f"where known boxes are found: .*{words}")


def test_boxes_that_are_read_rows_first_are_no_lack_of_steps_alone():
    """Nothing is learned from them; the verdict says what to look at."""
    model = Broken(targets=rows_first)
    model.load_state_dict(trained_weights())
    with pytest.raises(InconclusiveError, match="targets' boxes are read as x0, y0, x1, y1"):
        check_provider(model, steps=1)


def with_masks(change):
    return lambda f: replace(f, decode_masks=lambda *wanted: change(f.decode_masks(*wanted)))


CANDIDATES = {
    "labels permuted": (
        lambda f: replace(f, labels=(f.labels + 1) % NUM_CLASSES),
        "of the candidates' labels are right",
    ),
    "labels all 0": (lambda f: replace(f, labels=f.labels * 0), "of the candidates' labels are right"),
    "labels one too high": (
        lambda f: replace(f, labels=(f.labels + 1).clamp(max=NUM_CLASSES - 1)),
        "of the candidates' labels are right",
    ),
    "boxes y0, x0, y1, x1": (
        lambda f: replace(f, boxes=f.boxes[:, [1, 0, 3, 2]].clamp(max=61)),
        "candidates' boxes overlap the known ones by an IoU of .*, x and y are swapped: boxes are x0, y0",
    ),
    "boxes 6 pixels off": (
        lambda f: replace(f, boxes=(f.boxes - 6).clamp(min=0)),
        r"candidates' boxes .* off by \(-.*, -.*\) pixels \(y, x\)",
    ),
    "masks one cell off": (
        with_masks(lambda m: m.roll(1, 2)),
        r"boxes are right, but their masks .* off by \(.*, \+[34].*\) pixels",
    ),
    "masks inverted": (with_masks(torch.neg), "boxes are right, but their masks overlap .* by an IoU of 0.0"),
    "masks as probabilities": (with_masks(Tensor.sigmoid), "their masks overlap .*: decode logits"),
    "nothing": (
        lambda f: chosen(f, torch.arange(0)),
        "there are no candidates at all.*thresholds on scores low",
    ),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_lie_on_known_boxes(name):
    change, words = CANDIDATES[name]
    assert_fails(Broken(candidates=change), f"where known boxes are found: .*{words}")


def half_scale(masks: Tensor) -> Tensor:
    height, width = masks.shape[2:]
    return F.pad(masks[..., ::2, ::2], (0, width // 2, 0, height // 2))[..., :height, :width]


def masks(change):
    return lambda found, *_: {**found, "masks": change(found["masks"])}


def from_the_padded_batch(found: Found, image: Tensor, size: tuple[int, int]) -> Found:
    """Masks of the padded batch, resized to the image instead of being cut to it."""
    height, width = image.shape[1:]
    padded = F.pad(found["masks"], (0, size[1] - width, 0, size[0] - height))
    return {**found, "masks": stretched(padded, [height, width])}


DETECTIONS = {
    "masks upside down": (masks(lambda m: m.flip(2)), "cut the image out of the padded batch"),
    "masks of the next object": (masks(lambda m: m.roll(1, 0)), "each box's own mask"),
    "masks at half scale": (masks(half_scale), "by mask_stride"),
    "masks transposed": (masks(transposed), "detections' boxes are right, but their masks overlap"),
    "masks 6 pixels off": (masks(lambda m: m.roll(6, 3)), r"are off by \(.*, \+[567].*\) pixels"),
    "masks resized from the padded batch": (from_the_padded_batch, "without resizing"),
    "boxes of no size": (
        lambda found, *_: {**found, "boxes": found["boxes"] * 0},
        "the detections' boxes overlap the known ones by an IoU of 0.00",
    ),
    "nothing": (
        lambda found, *_: {key: value[:0] for key, value in found.items()},
        "there are no detections at all",
    ),
    "labels all 0": (
        lambda found, *_: {**found, "labels": found["labels"] * 0},
        "of the detections' labels are right",
    ),
}


@pytest.mark.parametrize("name", DETECTIONS)
def test_detections_lie_on_known_boxes(name):
    change, words = DETECTIONS[name]

    def changed(found, images):
        size = padded_size(images, 32)
        return [change(each, image, size) for each, image in zip(found, images, strict=True)]

    assert_fails(Broken(detections=changed), f"where known boxes are found: .*{words}")


MALFORMED = {
    "masks of logits": (masks(lambda m: m * 20 - 10), "masks of image . reaches from .*apply the sigmoid"),
    "masks without a channel": (masks(lambda m: m[:, 0]), "masks of image 0 has shape"),
    "no masks": (
        lambda found, *_: {"boxes": found["boxes"], "scores": found["scores"]},
        "lack labels, masks",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_detections_are_torchvision_s(name):
    change, words = MALFORMED[name]
    broken = Broken(detections=lambda found, _: [change(each) for each in found])
    assert_fails(broken, f"detections in evaluation mode: .*{words}")


def test_a_label_that_is_bent_to_fit_is_not_learned():
    def bent(targets):
        return [{**target, "labels": target["labels"].clamp(max=NUM_CLASSES - 2)} for target in targets]

    torch.manual_seed(0)
    assert_fails(Broken(targets=bent), "of the candidates' labels are right", steps=30)


def test_coordinates_in_parts_of_the_padded_batch_are_named():
    class Parts(Broken):
        """Boxes are taken back by the size of the padded batches that were trained on."""

        def forward_teacher(self, images):
            found = super().forward_teacher(images)
            return replace(found, boxes=found.boxes * (96 / padded_size(images, 32)[1]))

    words = "beside a larger one: .*in pixels, not in parts of the padded batch"
    assert_fails(Parts(), words)


def test_masks_that_are_cut_to_the_candidate_s_own_box_may_be_off_as_that_is():
    """One cell, 4 pixels; without the box's own offset, 2 pixels are allowed."""

    def moved(found):
        return replace(
            with_masks(lambda m: m.roll(1, 2))(found), boxes=found.boxes + torch.tensor([2, 0, 2, 0])
        )

    model = Broken(candidates=moved, detections=lambda found, _: found)
    model.load_state_dict(trained_weights())
    check_places(subject(model))
