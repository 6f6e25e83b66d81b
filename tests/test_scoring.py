"""Quality and confidence of pseudo masks, against loops and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from boxteacher.losses.pairwise import smooth_masks
from boxteacher.scoring import mask_confidence, mask_quality, ranking_score


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12), st.sampled_from([0.3, 0.5, 0.75]))
def test_quality_is_the_mean_of_the_probabilities_above_the_threshold(values, threshold):
    own = [value for value in values if value > torch.tensor(threshold).item()]
    expected = sum(own) / len(own) if own else 0.0
    masks = torch.tensor(values).view(1, 3, 4)
    assert float(mask_quality(masks, threshold)) == pytest.approx(expected, rel=1e-5)


def test_a_mask_without_pixels_has_quality_0():
    masks = torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.5)])
    assert mask_quality(masks).tolist() == [0, 0]
    assert mask_quality(torch.zeros(0, 3, 4)).shape == (0,)


def test_padding_does_not_change_quality():
    masks = torch.rand(5, 6, 7)
    assert_close(mask_quality(torch.nn.functional.pad(masks, (0, 9, 0, 2))), mask_quality(masks))


def test_confidence_by_both_formulas():
    score, quality = torch.tensor([0.25, 1.0, 0.0, 0.81]), torch.tensor([0.64, 0.49, 0.9, 0.0])
    assert_close(mask_confidence(score, quality, "paper"), torch.tensor([0.4, 0.7, 0, 0]))
    assert_close(mask_confidence(score, quality, "released"), torch.tensor([0.32**0.5, 0.7, 0, 0]))
    assert_close(mask_confidence(score, quality), mask_confidence(score, quality, "released"))
    assert_close(ranking_score(score, quality), torch.tensor([0.4, 0.7, 0, 0]))


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.sampled_from(["paper", "released"]))
def test_confidence_is_between_0_and_1_and_grows_with_score_and_quality(score, quality, formula):
    s, q = torch.tensor([score]), torch.tensor([quality])
    value = mask_confidence(s, q, formula)
    assert 0 <= value <= 1
    assert mask_confidence((s + 1) / 2, q, formula) >= value
    assert mask_confidence(s, (q + 1) / 2, formula) >= value


def test_smoothing_averages_each_cell_with_its_window():
    torch.manual_seed(0)
    masks = torch.rand(2, 5, 4) < 0.5
    smooth = smooth_masks(masks)
    for m in range(2):
        for y in range(5):
            for x in range(4):
                window = masks[m, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                expected = (float(masks[m, y, x]) + float(window.sum()) / 9) / 2
                assert float(smooth[m, y, x]) == pytest.approx(expected, abs=1e-6)


def test_smoothing_commutes_with_flips():
    masks = torch.rand(2, 5, 4) < 0.5
    for dimension in (1, 2):
        assert_close(smooth_masks(masks.flip(dimension)), smooth_masks(masks).flip(dimension))
