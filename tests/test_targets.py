"""Boxes, colors and annotated masks on the mask grid, against loops over pixels and known colors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from boxteacher.grid import (
    MaskGrid,
    grid_coordinates,
    mask_grid,
    neighbor_offsets,
    pad_images,
    padded_size,
    pair_slices,
    shifted,
)
from boxteacher.targets import (
    GridTargets,
    box_masks,
    cells_inside,
    color_similarity,
    grid_targets,
    rgb_to_lab,
)
from tests.support import seeded_images, target

CPU = torch.device("cpu")


def on_grid(images: list[torch.Tensor], targets: list, stride: int, divisor: int) -> GridTargets:
    return grid_targets(images, targets, mask_grid(images, stride, divisor))


coordinate = st.one_of(
    st.floats(0, 60, width=32), st.integers(0, 60).map(float), st.integers(0, 120).map(lambda n: n / 2)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=4),
    st.sampled_from([1, 2, 4, 8]),
)
def test_a_cell_is_in_a_box_if_the_box_touches_its_pixel(corners, stride):
    boxes = [(min(a, b), min(c, d), max(a, b), max(c, d)) for a, b, c, d in corners]
    rows, columns = grid_coordinates(48, 64, stride, CPU)
    masks = box_masks(torch.tensor(boxes).reshape(-1, 4), rows, columns)
    assert masks.shape == (len(boxes), 48 // stride, 64 // stride)
    for mask, (x0, y0, x1, y1) in zip(masks.tolist(), boxes, strict=True):
        for i, row in enumerate(mask):
            for j, inside in enumerate(row):
                y, x = stride * i + stride // 2, stride * j + stride // 2
                # The pixel is the square [x, x + 1) × [y, y + 1).
                assert inside == (x <= x1 and x + 1 > x0 and y <= y1 and y + 1 > y0)


@pytest.mark.parametrize(("stride", "divisor"), [(4, 32), (4, 16), (8, 32), (2, 2), (1, 1)])
def test_the_grid_covers_the_padded_batch_at_odd_sizes(stride, divisor):
    images = seeded_images((37, 53), (61, 20))
    grid = on_grid(images, [target((1, 1, 30, 30)), target()], stride, divisor)
    height, width = math.ceil(61 / divisor) * divisor, math.ceil(53 / divisor) * divisor
    assert padded_size(images, divisor) == (height, width)
    inside_images = cells_inside(images, mask_grid(images, stride, divisor))
    assert inside_images.shape == (2, height // stride, width // stride)
    assert grid.box_masks.shape == (1, height // stride, width // stride)
    for image, inside in zip(images, inside_images, strict=True):
        for i, row in enumerate(inside.tolist()):
            for j, cell in enumerate(row):
                y, x = stride * i + stride // 2, stride * j + stride // 2
                assert cell == (y < image.shape[1] and x < image.shape[2])


def test_padding_keeps_images_in_the_upper_left_corner_and_is_zero_elsewhere():
    images = seeded_images((5, 9), (7, 3))
    batch = pad_images(images, 4)
    assert batch.shape == (2, 3, 8, 12)
    for padded, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert padded.sum() == padded[:, :height, :width].sum()


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((1, 1, 0), (97.14, -21.55, 94.48)),
        ((0, 1, 1), (91.11, -48.09, -14.13)),
        ((1, 0, 1), (60.32, 98.23, -60.82)),
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((128 / 255,) * 3, (53.59, 0, 0)),
        ((4 / 255,) * 3, (1.096, 0, 0)),
    ],
)
def test_lab_of_well_known_colors(rgb, lab):
    result = rgb_to_lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
    # The published values have two decimals, and matrices for sRGB differ in the sixth.
    assert_close(result, torch.tensor(lab, dtype=torch.float32), rtol=0, atol=0.02)


def test_gray_has_no_hue_and_lightness_grows():
    gray = torch.linspace(0, 1, 256).view(1, 1, 1, -1).expand(-1, 3, -1, -1)
    lightness, a, b = rgb_to_lab(gray)[0, :, 0]
    assert (lightness.diff() > 0).all()
    assert max(a.abs().max(), b.abs().max()) < 0.01


def test_similarity_is_the_exponential_of_the_color_distance():
    image = torch.randint(0, 256, (3, 5, 5), generator=torch.Generator().manual_seed(0)) / 255
    similarity = color_similarity([image], torch.ones(1, 5, 5).bool(), MaskGrid(1, 5, 5))
    lab = rgb_to_lab(image[None])[0]
    for k, (down, right) in enumerate(neighbor_offsets()):
        for y in range(5):
            for x in range(5):
                v, u = y + down, x + right
                if 0 <= v < 5 and 0 <= u < 5:
                    expected = math.exp(-0.5 * float((lab[:, y, x] - lab[:, v, u]).norm()))
                else:
                    expected = 0.0
                assert float(similarity[0, k, y, x]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_similarity_is_1_inside_an_image_of_one_color():
    similarity = color_similarity(
        [torch.full((3, 32, 32), 0.4)], torch.ones(1, 8, 8).bool(), MaskGrid(4, 8, 8)
    )
    inside = torch.stack([shifted(torch.ones(8, 8), offset) for offset in neighbor_offsets()])
    assert torch.equal(similarity[0], inside)


@pytest.mark.parametrize("to_unit", [lambda byte: byte / 255, lambda byte: byte * (1 / 255)])
def test_the_mean_of_a_cell_is_rounded_down_without_rounding_errors(to_unit):
    """A mean of bytes that is the whole number n stays n and does not become n − 1."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 4, 4096), generator=generator)
    pixels[:, 0, 0::4] = 0
    sums = pixels.unfold(2, 4, 4).sum((1, 3))  # (3, 1024), one less than 16 bytes
    pixels[:, 0, 0::4] = -sums % 16  # now every sum is a multiple of 16
    means = (pixels.unfold(2, 4, 4).sum((1, 3)) // 16) / 255
    valid = torch.ones(1, 1, 1024).bool()
    similarity = color_similarity([to_unit(pixels)], valid, MaskGrid(4, 1, 1024))
    right = neighbor_offsets().index((0, 2))
    lab = rgb_to_lab(means[None, :, None])[0, :, 0]
    expected = torch.exp(-0.5 * (lab[:, 2:] - lab[:, :-2]).norm(dim=0))
    assert_close(similarity[0, right, 0, :-2], expected, rtol=1e-4, atol=1e-12)


def test_similarity_of_a_pair_is_symmetric():
    image = seeded_images((48, 64))[0] * 0.2
    similarity = color_similarity([image], torch.ones(1, 12, 16).bool(), MaskGrid(4, 12, 16))[0]
    for k, offset in enumerate(neighbor_offsets()):
        here, there = pair_slices(offset)
        assert_close(similarity[k][here], similarity[-1 - k][there])


def test_offsets_are_in_row_major_order_with_opposites_at_mirrored_positions():
    offsets = neighbor_offsets()
    assert offsets == sorted(offsets)
    assert len(set(offsets)) == 8
    assert (0, 0) not in offsets
    assert [(-down, -right) for down, right in offsets] == offsets[::-1]
    assert {value for offset in offsets for value in offset} == {-2, 0, 2}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(-8, 8), st.integers(-8, 8))
def test_shifting_and_slicing_agree_with_the_definition_of_a_neighbor(height, width, down, right):
    grid = torch.arange(1.0, height * width + 1).view(height, width)
    result = shifted(grid, (down, right))
    pairs = []
    for y in range(height):
        for x in range(width):
            inside = 0 <= y + down < height and 0 <= x + right < width
            assert result[y, x] == (grid[y + down, x + right] if inside else 0)
            if inside:
                pairs.append((float(grid[y, x]), float(grid[y + down, x + right])))
    here, there = pair_slices((down, right))
    assert list(zip(grid[here].flatten().tolist(), grid[there].flatten().tolist(), strict=True)) == pairs


def test_annotated_masks_are_sampled_at_the_pixels_of_the_grid():
    images = seeded_images((37, 53), (64, 40))
    annotated = [torch.rand(2, 37, 53) < 0.5, torch.rand(1, 64, 40) < 0.5]
    boxes = (0, 0, 30, 30)
    targets = [target(boxes, boxes, masks=annotated[0]), target(boxes, masks=annotated[1])]
    grid = on_grid(images, targets, 4, 32)
    assert grid.mask_confidence.tolist() == [1] * 3
    for t, full in enumerate([annotated[0][0], annotated[0][1], annotated[1][0]]):
        for i in range(16):
            for j in range(16):
                y, x = 4 * i + 2, 4 * j + 2
                expected = y < full.shape[0] and x < full.shape[1] and bool(full[y, x])
                assert bool(grid.masks[t, i, j]) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_annotated_masks_may_be_of_any_type(dtype):
    annotated = torch.rand(1, 32, 32) < 0.5
    grid = on_grid(seeded_images((32, 32)), [target((0, 0, 9, 9), masks=annotated.to(dtype))], 4, 32)
    assert torch.equal(grid.masks[0], annotated[0, 2::4, 2::4])


def test_soft_annotated_masks_are_used_as_they_are():
    soft = torch.rand(1, 32, 32)
    grid = on_grid(seeded_images((32, 32)), [target((0, 0, 9, 9), masks=soft)], 4, 32)
    assert torch.equal(grid.masks[0], soft[0, 2::4, 2::4])


def test_only_masks_with_has_mask_count():
    annotated = torch.ones(2, 32, 32).bool()
    targets = [
        target((0, 0, 9, 9), (5, 5, 20, 20), masks=annotated, has_mask=torch.tensor([False, True])),
        target((0, 0, 9, 9)),
    ]
    grid = on_grid(seeded_images((32, 32), (32, 32)), targets, 4, 32)
    assert grid.mask_confidence.tolist() == [0, 1, 0]
    assert grid.masks.flatten(1).any(1).tolist() == [False, True, False]
    assert grid.image_index.tolist() == [0, 0, 1]


def test_a_mask_s_confidence_is_the_one_given_and_0_without_a_mask():
    masks, confidence = torch.ones(2, 32, 32).bool(), torch.tensor([0.3, 0.6])
    both = target((0, 0, 9, 9), (5, 5, 20, 20), masks=masks, mask_confidence=confidence)
    one = {**both, "has_mask": torch.tensor([False, True])}
    grid = on_grid(seeded_images((32, 32), (32, 32)), [both, one], 4, 32)
    assert_close(grid.mask_confidence, torch.tensor([0.3, 0.6, 0.0, 0.6]))


@pytest.mark.parametrize("ignored", [0, 1, 5, 10, 31])
def test_ignored_bottom_rows_have_no_color_similarity(ignored):
    image = torch.full((3, 32, 32), 0.5)
    grid = on_grid([image], [target((0, 0, 9, 9), ignored_bottom_rows=ignored)], 4, 32)
    rows = torch.arange(2, 32, 4)
    assert torch.equal(grid.valid[0], (rows < 32 - ignored)[:, None].expand(8, 8))
    similarity = color_similarity([image], grid.valid, MaskGrid(4, 8, 8))[0]
    for k, (down, _) in enumerate(neighbor_offsets()):
        for i in range(8):
            if not 0 <= i + down < 8 or rows[i + down] >= 32 - ignored:
                assert (similarity[k, i] == 0).all()


def test_an_image_has_the_same_colors_and_cells_alone_as_beside_a_larger_one():
    small, large = seeded_images((37, 53), (90, 70))
    record = target((3, 4, 50, 30), ignored_bottom_rows=7)
    alone, together = (
        on_grid(images, targets, 4, 32)
        for images, targets in (([small], [record]), ([large, small], [target(), record]))
    )
    grid, larger = mask_grid([small], 4, 32), mask_grid([large, small], 4, 32)
    height, width = grid.shape
    assert torch.equal(alone.valid[0], together.valid[1, :height, :width])
    assert together.valid[1].sum() == alone.valid[0].sum()
    assert torch.equal(alone.box_masks[0], together.box_masks[0, :height, :width])
    similarity = color_similarity([small], alone.valid, grid)[0]
    beside = color_similarity([large, small], together.valid, larger)[1]
    inside = cells_inside([small], grid)[0]
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert torch.equal(similarity[:, :rows, :columns], beside[:, :rows, :columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_colors_as_they_are(dtype):
    torch.manual_seed(0)
    images = [(0.5 + 0.05 * torch.randn(3, 64, 64)).clamp(0, 1)]
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    plain = color_similarity(images, valid, MaskGrid(4, 16, 16))
    with torch.autocast("cpu", dtype):
        assert torch.equal(color_similarity(images, valid, MaskGrid(4, 16, 16)), plain)
