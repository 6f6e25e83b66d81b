"""What segmenters share: enlarging maps, ranks in groups, fair shares, boxes round masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from boxteacher.grid import upsample_aligned
from boxteacher_adapters.parts.grouping import rank_in_group, share_evenly
from boxteacher_adapters.parts.maps import mask_boxes, mask_boxes_in_images
from tests.support import filled


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_enlarging_puts_each_cell_where_it_stands(factor):
    maps = torch.randn(2, 3, 5, 4)
    enlarged = upsample_aligned(maps, factor)
    assert enlarged.shape == (2, 3, 5 * factor, 4 * factor)
    half = factor // 2
    assert_close(enlarged[..., half::factor, half::factor], maps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_is_linear_in_between_and_constant_beyond(factor):
    slope = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 3, 6)
    enlarged = upsample_aligned(slope, factor)
    expected = ((torch.arange(6 * factor) - factor // 2) / factor).clamp(0, 5)
    assert_close(enlarged, expected.expand(1, 1, 3 * factor, -1), rtol=1e-5, atol=1e-5)
    constant = torch.full((1, 1, 3, 4), 0.7)
    assert_close(upsample_aligned(constant, factor), torch.full((1, 1, 3 * factor, 4 * factor), 0.7))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.5, 0.5, 0.9])), max_size=20))
def test_rank_in_group_counts_the_better_ones_of_the_group(rows):
    group = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    score = torch.tensor([row[1] for row in rows])
    for i, (g, s) in enumerate(rows):
        better = [j for j, (h, t) in enumerate(rows) if h == g and (t > s or (t == s and j < i))]
        assert rank_in_group(group, score)[i] == len(better)
    assert len(rank_in_group(group, score)) == len(rows)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from([0.1, 0.5, 0.5, 0.9])), max_size=20
    ),
    st.integers(1, 12),
)
def test_an_image_s_targets_share_evenly_and_the_best_stay(rows, max_samples):
    image = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    target = torch.tensor([10 * row[0] + row[1] for row in rows], dtype=torch.int64)
    score = torch.tensor([row[2] for row in rows])
    kept = share_evenly(image, target, score, 4, max_samples)
    expected = []
    for b in range(4):
        mine = [i for i, row in enumerate(rows) if row[0] == b]
        targets = {rows[i][1] for i in mine}
        share = max(1, max_samples // max(1, len(targets)))
        for n in targets:
            of_target = sorted((i for i in mine if rows[i][1] == n), key=lambda i: -rows[i][2])
            expected += of_target[:share]
    assert kept.tolist() == sorted(expected)


def test_masks_have_boxes_round_them():
    masks = torch.stack([filled((3, 2, 9, 7), 12, 10), torch.zeros(12, 10, dtype=torch.bool)])
    assert mask_boxes(masks).tolist() == [[3, 2, 9, 7], [0, 0, 0, 0]]


def test_boxes_round_masks_end_with_the_image():
    masks = torch.stack(
        [filled((3, 2, 9, 7), 12, 10), filled((3, 2, 9, 7), 12, 10), filled((8, 9, 10, 12), 12, 10)]
    )
    sizes = torch.tensor([[48, 40], [26, 31], [33, 31]])  # of cells of 4 pixels
    assert mask_boxes_in_images(masks, sizes, 4).tolist() == [[12, 8, 36, 28], [12, 8, 31, 26], [0, 0, 0, 0]]
