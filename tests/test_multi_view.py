"""The teacher that knows the box: views are mapped back, averaged and scored."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import Candidates, InputError, StudentOutput
from boxteacher.grid import MaskGrid, mask_grid, pad_images
from boxteacher.multi_view import MultiViewTeacher
from tests.support import target


class BrightnessSegmenter(nn.Module):
    """Its mask is where the image is bright, so that every view of it has the same masks."""

    mask_stride = 4
    size_divisor = 16

    def __init__(self, decodes_boxes: bool = True, candidates: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.decodes_boxes = decodes_boxes
        self.sizes: list[tuple[int, int]] = []

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        self.sizes += [(image.shape[-2], image.shape[-1]) for image in images]
        pooled = torch.nn.functional.avg_pool2d(pad_images(images, 16), 4).mean(1)  # (B, h, w)
        logits = (pooled - 0.5) * 20

        def decode_masks(candidates: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
            return logits[candidates]

        def decode_boxes(boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
            return logits[image_index]

        boxes = torch.tensor([[0.0, 0.0, image.shape[-1], image.shape[-2]] for image in images])
        index = torch.arange(len(images))
        decoder = decode_boxes if self.decodes_boxes else None
        return Candidates(boxes, torch.ones(len(images)), index, index, decode_masks, decoder)

    def forward_student(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> StudentOutput:
        raise NotImplementedError

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        raise NotImplementedError


def bright_square(height: int, width: int, x: int, y: int, side: int) -> Tensor:
    image = torch.full((3, height, width), 0.1)
    image[:, y : y + side, x : x + side] = 0.9
    return image


IMAGES = [bright_square(64, 96, 16, 24, 24), bright_square(80, 64, 28, 12, 32)]
TARGETS = [target((16, 24, 40, 48)), target((28, 12, 60, 44))]


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5)])
@pytest.mark.parametrize("refine", [False, True])
def test_masks_of_all_views_lie_where_the_objects_are(scales, refine):
    grid = MaskGrid(1, 80, 96)
    teacher = MultiViewTeacher(BrightnessSegmenter(), scales=scales, refine=refine)
    pseudo = teacher(IMAGES, TARGETS, grid)
    for mask, (image, x, y, side) in zip(pseudo.masks, ((0, 16, 24, 24), (1, 28, 12, 32)), strict=True):
        expected = torch.zeros(80, 96, dtype=torch.bool)
        expected[y : y + side, x : x + side] = True
        overlap = (mask & expected).sum() / (mask | expected).sum()
        assert overlap > (0.95 if refine else 0.85), image  # cells of 4 pixels blur an edge
    assert pseudo.confidence.min() > 0.7


def test_the_grid_of_the_result_may_be_the_students():
    grid = mask_grid(IMAGES, 4, 32)
    pseudo = MultiViewTeacher(BrightnessSegmenter())(IMAGES, TARGETS, grid)
    assert pseudo.masks.shape == (2, *grid.shape)
    assert int(pseudo.masks[0].sum()) == 36  # 24 × 24 pixels


def test_a_mirrored_batch_has_mirrored_masks():
    """Mirrored views must be mapped back by each image's own width, not by the padded one."""
    teacher = MultiViewTeacher(BrightnessSegmenter(), scales=(1.0,), refine=False)
    mirrored = [target((56, 24, 80, 48)), target((4, 12, 36, 44))]
    masks = teacher(IMAGES, TARGETS, MaskGrid(1, 80, 96)).masks
    others = teacher([image.flip(-1) for image in IMAGES], mirrored, MaskGrid(1, 80, 96)).masks
    for mask, other, image in zip(masks, others, IMAGES, strict=True):
        assert_close(mask[:, : image.shape[-1]], other[:, : image.shape[-1]].flip(-1))


def test_views_have_the_sizes_that_were_asked_for():
    segmenter = BrightnessSegmenter()
    teacher = MultiViewTeacher(segmenter, image_size=(32, 48), scales=(1.0, 1.5), mirror=False)
    teacher(IMAGES, TARGETS, MaskGrid(1, 80, 96))
    assert teacher.model.sizes == [(32, 48), (40, 32), (48, 72), (60, 48)]


def test_networks_that_decode_no_boxes_give_their_best_overlapping_candidate():
    teacher = MultiViewTeacher(BrightnessSegmenter(decodes_boxes=False), scales=(1.0,))
    pseudo = teacher(IMAGES, TARGETS, MaskGrid(1, 80, 96))
    assert pseudo.masks[0, 24:48, 16:40].float().mean() > 0.95


def test_a_view_without_a_candidate_does_not_count():
    class FindsNothingMirrored(BrightnessSegmenter):
        def forward_teacher(self, images: list[Tensor]) -> Candidates:
            found = super().forward_teacher(images)
            self.calls = getattr(self, "calls", 0) + 1
            none = slice(0, 0) if self.calls % 2 == 0 else slice(None)
            return replace(
                found,
                boxes=found.boxes[none],
                scores=found.scores[none],
                labels=found.labels[none],
                image_index=found.image_index[none],
            )

    teacher = MultiViewTeacher(FindsNothingMirrored(decodes_boxes=False), scales=(1.0,))
    pseudo = teacher(IMAGES, TARGETS, MaskGrid(1, 80, 96))
    assert pseudo.masks[0, 24:48, 16:40].float().mean() > 0.95


def test_pictures_of_bytes_are_taken_as_by_other_teachers():
    pictures = [(image * 255).round().byte() for image in IMAGES]
    teacher = MultiViewTeacher(BrightnessSegmenter())
    assert teacher(pictures, TARGETS, MaskGrid(1, 80, 96)).masks[0, 24:48, 16:40].float().mean() > 0.95


def test_confidence_falls_with_a_mask_that_does_not_reach_the_sides_of_its_box():
    teacher = MultiViewTeacher(BrightnessSegmenter(), refine=False)
    wide = [target((16, 24, 64, 48)), TARGETS[1]]
    pseudo = teacher(IMAGES, wide, MaskGrid(1, 80, 96))
    assert pseudo.confidence[0] < 0.6 < pseudo.confidence[1]


def test_an_empty_mask_has_no_confidence():
    dark = [torch.full((3, 64, 96), 0.1), IMAGES[1]]
    pseudo = MultiViewTeacher(BrightnessSegmenter())(dark, TARGETS, MaskGrid(1, 80, 96))
    assert pseudo.confidence[0] == 0
    assert not pseudo.masks[0].any()


def test_batches_without_boxes_have_no_masks():
    pseudo = MultiViewTeacher(BrightnessSegmenter())(IMAGES, [target(), target()], MaskGrid(4, 20, 24))
    assert pseudo.masks.shape == (0, 20, 24)


def test_a_scale_out_of_range_is_named():
    with pytest.raises(InputError, match="scales"):
        MultiViewTeacher(BrightnessSegmenter(), scales=(0.0,))
