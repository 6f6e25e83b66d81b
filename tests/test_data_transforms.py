"""Resizing and flipping move images, boxes and masks together."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2

from boxteacher.data import evaluation_transform, training_transform
from boxteacher.data.transforms import ResizeLongestSide, ResizeShortestSide


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[Tensor, dict[str, Any]]:
    """A black image with a white rectangle, which is also its box and its mask."""
    x0, y0, x1, y1 = box
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, y0:y1, x0:x1] = True
    boxes = torch.tensor([box], dtype=torch.float32)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([3]),
        "masks": tv_tensors.Mask(mask),
    }
    return tv_tensors.Image(mask.float().expand(3, -1, -1)), target


def bounds(mask: Tensor) -> Tensor:
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), side=st.integers(30, 150))
def test_boxes_and_masks_follow_the_pixels(data: st.DataObject, seed: int, side: int) -> None:
    height, width = data.draw(st.integers(20, 100)), data.draw(st.integers(20, 100))
    # Wide enough that the rectangle stays wider than a pixel at the smallest scale.
    x0, y0 = data.draw(st.integers(0, width - 10)), data.draw(st.integers(0, height - 10))
    x1, y1 = data.draw(st.integers(x0 + 10, width)), data.draw(st.integers(y0 + 10, height))
    torch.manual_seed(seed)
    image, target = training_transform(side)(*scene(height, width, (x0, y0, x1, y1)))
    box = target["boxes"][0].as_subclass(Tensor)
    assert 0.8 * side - 1 <= max(image.shape[-2:]) <= side
    assert target["masks"].shape[-2:] == image.shape[-2:]
    assert_close(bounds(image[0] > 0.5), box, atol=1.5, rtol=0)
    assert_close(bounds(target["masks"][0]), box, atol=1.0, rtol=0)
    assert box.min() >= 0
    assert box[2] <= image.shape[-1]
    assert box[3] <= image.shape[-2]
    assert image.min() >= 0
    assert image.max() <= 1


def test_flipping_twice_is_the_identity() -> None:
    flip = v2.RandomHorizontalFlip(1.0)
    image, target = scene(30, 41, (3, 5, 17, 20))
    once = flip(image, target)
    twice = flip(*once)
    assert_close(once[1]["boxes"].as_subclass(Tensor), torch.tensor([[24.0, 5, 38, 20]]))
    assert torch.equal(twice[0], image)
    for key, entry in target.items():
        assert torch.equal(twice[1][key], entry)


def test_evaluation_size_is_fixed_and_exact() -> None:
    image, target = evaluation_transform(80)(*scene(20, 40, (10, 4, 30, 16)))
    assert image.shape == (3, 40, 80)
    assert_close(target["boxes"].as_subclass(Tensor), torch.tensor([[20.0, 8, 60, 32]]))
    assert_close(bounds(target["masks"][0]), torch.tensor([20.0, 8, 60, 32]))
    assert target["masks"].dtype == torch.bool
    assert target["labels"].tolist() == [3]


def test_training_sizes_and_flips_depend_on_torch_s_seed_alone() -> None:
    def sampled(seed: int) -> list[tuple[tuple[int, ...], bool]]:
        torch.manual_seed(seed)
        samples = (training_transform(100)(*scene(20, 20, (0, 0, 8, 20))) for _ in range(60))
        return [(tuple(image.shape), bool(target["boxes"][0, 0] > 0)) for image, target in samples]

    first = sampled(1)
    assert first == sampled(1)
    sides = {shape[-1] for shape, _ in first}
    assert min(sides) >= 80
    assert max(sides) <= 100
    assert len(sides) > 10
    assert 10 < sum(flipped for _, flipped in first) < 50


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 100),
    width=st.integers(20, 100),
    shortest=st.integers(5, 150),
    longest=st.integers(8, 150),
)
def test_the_shortest_side_is_torchvision_s_up_to_rounding(height, width, shortest, longest) -> None:
    image, target = scene(height, width, (0, 0, width, height))
    ours, moved = ResizeShortestSide([shortest], longest)(image, target)
    theirs = v2.RandomShortestSize([shortest], max_size=longest)(image)
    assert ours.shape[0] == 3
    # torchvision rounds down, and so fails for thinner images than these.
    for mine, other in zip(ours.shape[1:], theirs.shape[1:], strict=True):
        assert other <= mine <= other + 1
    assert max(ours.shape[1:]) <= longest
    assert_close(moved["boxes"].as_subclass(Tensor), torch.tensor([[0.0, 0, ours.shape[2], ours.shape[1]]]))
    assert moved["masks"].shape == (1, *ours.shape[1:])


def test_shortest_sides_are_sampled_uniformly_and_the_longest_side_is_limited() -> None:
    torch.manual_seed(0)
    transform = training_transform(60, (20, 30, 50))
    landscape = [transform(*scene(40, 80, (0, 0, 9, 9)))[0].shape[1:] for _ in range(300)]
    counts = {size: landscape.count(size) for size in set(landscape)}
    # 50 would make the longest side 100, more than 60, and so the image is that of 30.
    assert set(counts) == {(20, 40), (30, 60)}
    assert 65 <= counts[20, 40] <= 135  # 100 ± 4 standard deviations
    assert training_transform(60, (20,))(*scene(80, 40, (0, 0, 9, 9)))[0].shape == (3, 40, 20)


def test_evaluation_at_a_shortest_side_is_fixed() -> None:
    transform = evaluation_transform(1333, 800)
    sizes = {(480, 640): (800, 1067), (640, 480): (1067, 800), (427, 640): (800, 1199)}
    sizes |= {(240, 640): (500, 1333), (800, 800): (800, 800)}  # COCO's rule: at most 1333
    for (height, width), size in sizes.items():
        assert transform(*scene(height, width, (0, 0, 9, 9)))[0].shape == (3, *size)


@pytest.mark.parametrize(
    ("image_size", "shortest_side", "minimum"),
    [(41, (), 32), (1, (), 1), (100, (48, 40), 40), (32, (64,), 32), (48, (48,), 48)],
)
def test_the_minimum_longest_side_of_a_square_image(image_size, shortest_side, minimum) -> None:
    transform = training_transform(image_size, shortest_side)
    torch.manual_seed(0)
    sampled = {transform(*scene(70, 70, (0, 0, 9, 9)))[0].shape[2] for _ in range(150)}
    assert min(sampled) == minimum


def test_a_thin_image_without_instances_is_resized() -> None:
    image = tv_tensors.Image(torch.rand(3, 1, 300))
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(1, 300)),
        "masks": tv_tensors.Mask(torch.zeros(0, 1, 300, dtype=torch.bool)),
    }
    image, target = training_transform(50)(image, target)
    assert image.shape[1] == 1
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *image.shape[-2:])


@pytest.mark.parametrize(("low", "high"), [(0, 10), (20, 10)])
def test_an_invalid_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"low={low}, high={high}"):
        ResizeLongestSide(low, high)


@pytest.mark.parametrize(("sizes", "longest"), [((), 10), ((640, 0), 1333), ((640,), 0)])
def test_invalid_sizes_are_refused(sizes: tuple[int, ...], longest: int) -> None:
    with pytest.raises(ValueError, match=f"longest={longest}"):
        ResizeShortestSide(sizes, longest)
