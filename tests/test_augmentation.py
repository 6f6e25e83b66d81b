"""The student's view: another colour and sharpness, the same geometry, type and range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxteacher.augmentation import StrongAugmentation


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 24), width=st.integers(1, 24), seed=st.integers(0, 1000))
def test_every_image_keeps_its_size_and_range(height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    image = torch.rand(3, height, width)
    (view,) = StrongAugmentation()([image])
    assert view.shape == image.shape
    assert view.min() >= 0
    assert view.max() <= 1 + 1e-6


def test_images_are_changed_each_in_its_own_way_and_where_they_are() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    image[0, 8:24, 8:24] = 1
    views = StrongAugmentation()([image] * 8)
    assert len({round(float(view.sum()), 3) for view in views}) > 4
    for view in views:
        inner, outer = view[:, 12:20, 12:20].mean((1, 2)), view[:, :4, :4].mean((1, 2))
        assert (inner - outer).abs().max() > 0.1  # the square is where it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_pixels(dtype: torch.dtype) -> None:
    images = [torch.rand(3, 16, 16) for _ in range(8)]
    torch.manual_seed(0)
    plain = StrongAugmentation()(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        cast = StrongAugmentation()(images)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
