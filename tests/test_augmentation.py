"""The strong augmentation: other colors and sharpness, the same geometry, dtype and range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxteacher.augmentation import StrongAugmentation
from tests.support import seeded_images


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 24), width=st.integers(1, 24), seed=st.integers(0, 1000))
def test_every_image_keeps_its_size_and_range(height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    image = torch.rand(3, height, width)
    (view,) = StrongAugmentation()([image])
    assert view.shape == image.shape
    assert view.min() >= 0
    assert view.max() <= 1 + 1e-6


def test_each_image_is_augmented_differently_and_without_moving_objects() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    image[0, 8:24, 8:24] = 1
    views = StrongAugmentation()([image] * 8)
    assert len({round(float(view.sum()), 3) for view in views}) > 4
    for view in views:
        inner, outer = view[:, 12:20, 12:20].mean((1, 2)), view[:, :4, :4].mean((1, 2))
        assert (inner - outer).abs().max() > 0.1  # the square is where it was


def test_without_blur_a_pixel_depends_on_its_own_color_alone() -> None:
    """Color jitter commutes with a permutation of the pixels, which keeps the image's means."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))

    def permuted(view: torch.Tensor) -> torch.Tensor:
        return view.flatten(1)[:, order].unflatten(1, (16, 16))

    for blur in (0.0, 1.0):
        augment = StrongAugmentation(blur=blur)
        torch.manual_seed(0)
        views = augment([image] * 20)
        torch.manual_seed(0)
        others = augment([permuted(image)] * 20)
        # Contrast uses the image's mean, whose sum is then rounded in another order.
        same = [torch.allclose(permuted(a), b, atol=1e-5) for a, b in zip(views, others, strict=True)]
        assert all(same) if blur == 0 else sum(same) < 5  # a blur of 0.1 to 0.25 pixels changes nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_pixels(dtype: torch.dtype) -> None:
    images = [torch.rand(3, 16, 16) for _ in range(8)]
    torch.manual_seed(0)
    plain = StrongAugmentation()(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        cast = StrongAugmentation()(images)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_augmentation_keeps_sizes_and_range_and_does_not_change_its_input():
    torch.manual_seed(0)
    images = seeded_images((33, 47), (20, 21), (48, 64))
    before = [image.clone() for image in images]
    for _ in range(10):
        for view, image in zip(StrongAugmentation()(images), images, strict=True):
            assert view.shape == image.shape
            assert view.min() >= 0
            assert view.max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True))


def test_augmentation_is_sampled_for_each_image_and_repeats_under_a_seed():
    image = seeded_images((24, 24))[0]
    augment = StrongAugmentation()

    def views() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return augment([image] * 12)

    first, second = views(), views()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(view.flatten().tolist()) for view in first}) > 6


def test_augmentation_changes_no_geometry():
    """An edge between a bright and a dark half stays in its column."""
    torch.manual_seed(0)
    image = torch.full((3, 24, 24), 0.2)
    image[..., :12] = 0.8
    views = torch.stack(StrongAugmentation()([image] * 40)).mean(1)  # (40, 24, 24)
    steps = (views[..., :-1] - views[..., 1:]).abs().mean(1)  # (40, 23)
    visible = steps.amax(1) > 1e-3
    assert visible.sum() > 30
    assert (steps[visible].argmax(1) == 11).all()


def test_the_blur_reaches_the_next_pixel_and_no_further():
    """A single bright pixel becomes at most 3 × 3, as in the released code."""
    image = torch.zeros(3, 9, 9)
    image[:, 4, 4] = 1
    augment = StrongAugmentation(blur=1.0)
    augment.color = torch.nn.Identity()
    torch.manual_seed(0)
    seen = torch.stack(augment([image] * 20)).amax((0, 1)) > 0  # (9, 9)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(seen, expected)
