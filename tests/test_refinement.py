"""Color refinement: masks on crops round their boxes, fitted to the colors of the image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import masks_to_boxes

from boxteacher import InputError
from boxteacher.crops import CROP_CONTEXT, CROP_SIZE, cells_in_image, crop_masks, paste_crops
from boxteacher.refinement import refine_detections, refine_masks


def disc(size: int, center: tuple[float, float], radius: float) -> Tensor:
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2


def scene(size: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """A red disc on green ground (3, H, W), its mask (1, H, W) and its box (1, 4)."""
    mask = disc(size, (44, 52), 24)
    image = torch.where(mask, torch.tensor([0.8, 0.2, 0.2])[:, None, None], 0.4)
    image = image + 0.02 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    box = masks_to_boxes(mask[None])
    box[:, 2:] += 1
    return image, mask[None], box


def coarse(mask: Tensor) -> Tensor:
    """A mask (N, H, W) that a network might predict: blurred, and off by a few pixels."""
    moved = torch.roll(mask.float(), (3, -2), (1, 2))
    return torch.nn.functional.avg_pool2d(moved[:, None], 9, 1, 4)[:, 0] * 0.8 + 0.1


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_coarse_mask_takes_the_shape_of_a_region_of_one_color():
    image, mask, box = scene()
    predicted = coarse(mask)
    refined = refine_masks(image, box, predicted)
    assert iou(predicted > 0.5, mask) < 0.88
    assert iou(refined > 0.5, mask) > 0.97


def test_a_true_mask_stays():
    image, mask, box = scene()
    assert iou(refine_masks(image, box, mask.float() * 0.9 + 0.05) > 0.5, mask) > 0.97


@pytest.mark.parametrize("side", [9, 64, 400])
def test_a_rectangle_keeps_its_rim(side):
    """A box that its object fills ends between two cells of its crop."""
    mask = torch.zeros(1, side + 20, side + 30, dtype=torch.bool)
    mask[:, 8 : 8 + side, 11 : 11 + side] = True
    image = torch.where(mask, torch.tensor([0.8, 0.2, 0.2])[:, None, None], 0.4)
    box = torch.tensor([[11.0, 8, 11 + side, 8 + side]])
    assert torch.equal(refine_masks(image, box, mask.float()) > 0.5, mask)


def test_a_box_that_covers_the_image_leaves_the_mask_to_the_network():
    """There is no color outside the box to compare with."""
    mask = disc(96, (48, 48), 30)[None]
    image = torch.full((3, 96, 96), 0.5)
    box = torch.tensor([[0.0, 0, 96, 96]])
    assert iou(refine_masks(image, box, mask.float() * 0.5 + 0.25) > 0.5, mask) > 0.95


def test_where_colors_say_nothing_the_mask_stays():
    _, mask, box = scene()
    image = torch.full((3, 96, 96), 0.5)
    assert iou(refine_masks(image, box, mask.float() * 0.8 + 0.1) > 0.5, mask) > 0.95


def test_a_refined_mask_ends_at_its_box():
    image, mask, box = scene()
    smaller = box + torch.tensor([6.0, 0, -6, 0])
    refined = refine_masks(image, smaller, mask.float())
    x0, x1 = int(smaller[0, 0]), int(smaller[0, 2])
    assert refined[..., :x0].max() == 0
    assert refined[..., x1:].max() == 0
    assert refined[..., x0:x1].max() > 0.5


def test_a_mirrored_image_gives_the_mirrored_mask():
    image, mask, box = scene()
    predicted = coarse(mask)
    mirrored_box = torch.stack([96 - box[:, 2], box[:, 1], 96 - box[:, 0], box[:, 3]], 1)
    mirrored = refine_masks(image.flip(-1), mirrored_box, predicted.flip(-1)).flip(-1)
    # The bins of mirrored diagonals are the same; sums run in another order.
    assert_close(mirrored, refine_masks(image, box, predicted), rtol=0, atol=1e-4)


def test_each_mask_is_refined_by_itself():
    image, mask, box = scene()
    other = torch.tensor([[5.0, 5.0, 30.0, 40.0]])
    masks = torch.cat([coarse(mask), torch.rand(1, 96, 96)])
    together = refine_masks(image, torch.cat([box, other]), masks)
    assert_close(together[:1], refine_masks(image, box, masks[:1]), rtol=0, atol=1e-5)
    assert_close(together[1:], refine_masks(image, other, masks[1:]), rtol=0, atol=1e-5)


def test_an_object_at_the_border_does_not_see_beyond_the_image():
    mask = disc(96, (4, 50), 24)[None]
    image = torch.where(mask, torch.tensor([0.05, 0.05, 0.05])[:, None, None], 0.6)  # dark, as zero padding
    box = masks_to_boxes(mask)
    box[:, 2:] += 1
    refined = refine_masks(image, box, coarse(mask))
    assert iou(refined > 0.5, mask) > 0.95


def test_detections_of_a_smaller_image_are_refined_at_the_full_size():
    image, mask, box = scene()
    small = torch.nn.functional.avg_pool2d(coarse(mask)[:, None], 2)  # (1, 1, 48, 48)
    found = {"boxes": box / 2, "labels": torch.tensor([3]), "scores": torch.tensor([0.5]), "masks": small}
    (refined,) = refine_detections([image], [found])
    assert_close(refined["boxes"], box)
    assert refined["masks"].shape == (1, 1, 96, 96)
    assert iou(refined["masks"][0] > 0.5, mask) > 0.97
    assert refined["labels"] is found["labels"]


def test_images_without_detections_pass_through():
    empty = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 24, 24)}
    (refined,) = refine_detections([torch.rand(3, 48, 48)], [empty])
    assert refined["masks"].shape == (0, 1, 48, 48)


def test_many_detections_are_refined_in_chunks():
    image, mask, box = scene()
    found = {"boxes": box.repeat(5, 1), "masks": coarse(mask)[None].repeat(5, 1, 1, 1)}
    (refined,) = refine_detections([image], [found], chunk=2)
    assert_close(refined["masks"][4], refine_masks(image, box, coarse(mask)), rtol=0, atol=1e-5)


def test_bad_detections_are_named():
    with pytest.raises(InputError, match="2 images and 1 detections"):
        refine_detections([torch.rand(3, 8, 8)] * 2, [{}])
    with pytest.raises(InputError, match="no masks"):
        refine_detections([torch.rand(3, 8, 8)], [{"boxes": torch.zeros(0, 4)}])


@pytest.mark.parametrize(
    "given",
    [
        lambda image: image,
        lambda image: image.permute(1, 2, 0).numpy(),
        lambda image: Image.fromarray(image.permute(1, 2, 0).numpy()),
    ],
    ids=["bytes", "array", "PIL"],
)
def test_an_image_of_any_kind_gives_the_same_masks(given: Callable[[Tensor], Any]):
    image, mask, box = scene()
    pixels = (image * 255).round().byte()  # (3, H, W)
    expected = refine_masks(pixels / 255, box, coarse(mask))
    assert torch.equal(refine_masks(given(pixels), box, coarse(mask)), expected)
    found = {"boxes": box, "masks": coarse(mask)[None]}
    (refined,) = refine_detections([given(pixels)], [found])
    assert torch.equal(refined["masks"][0], expected)


def test_an_image_that_is_scaled_to_255_is_refused():
    image, mask, box = scene()
    with pytest.raises(InputError, match=r"image 0 has values .* give RGB in \[0, 1\]"):
        refine_masks(image * 255, box, coarse(mask))
    found = {"boxes": box, "masks": coarse(mask)[None]}
    with pytest.raises(InputError, match=r"image 1 has values"):
        refine_detections([image, image * 255], [found, found])


def test_gradients_flow_through_the_mask():
    image, mask, box = scene()
    predicted = coarse(mask).requires_grad_()
    refine_masks(image, box, predicted).sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.abs().sum() > 0


def test_what_is_cropped_is_pasted_back():
    """A plane is exact under linear interpolation, so crop and paste give it back inside the box."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    plane = (0.01 * x + 0.02 * y)[None]
    box = torch.tensor([[21.0, 13.0, 37.0, 29.0]])
    pasted = paste_crops(crop_masks(plane, box), box, torch.arange(40), torch.arange(60))
    inside = torch.zeros(40, 60, dtype=torch.bool)
    inside[13:29, 21:37] = True
    assert_close(pasted[0][inside], plane[0][inside], rtol=0, atol=1e-5)
    assert pasted[0][~inside].abs().max() == 0


def test_a_mask_grid_is_cropped_where_its_cells_stand():
    """Cell i of a grid of stride 4 stands for pixel 4 i + 2, whose middle is at 4 i + 2.5."""
    row = torch.arange(16) * 4 + 2.5
    plane = row[None, None, :].expand(1, 16, 16) / 64  # x of each cell, over 64
    box = torch.tensor([[20.0, 20.0, 36.0, 36.0]])
    crop = crop_masks(plane, box, stride=4)[0]
    place = 28 + ((torch.arange(CROP_SIZE) + 0.5) / CROP_SIZE - 0.5) * 16 * CROP_CONTEXT
    assert_close(crop[20], place / 64, rtol=0, atol=1e-5)


def test_cells_beyond_the_image_are_known():
    box = torch.tensor([[0.0, 10.0, 20.0, 30.0]])
    inside = cells_in_image(box, torch.tensor([[40.0, 40.0]]))
    # The crop reaches from −5 to 25 in x, and a sixth of it lies left of the image.
    assert float(inside.float().mean()) == pytest.approx(5 / 6, abs=1 / CROP_SIZE)
