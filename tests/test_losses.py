"""The mask losses: closed forms, symmetries, gradients, extremes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from boxteacher.grid import MaskGrid
from boxteacher.losses import (
    color_pairwise_loss,
    dice_loss,
    ellipse_loss,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    projection_loss,
)
from tests.loss_support import random_scene


def all_losses(logits: Tensor, confidence: float = 0.7) -> dict[str, Tensor]:
    masks, height, width = logits.shape
    scene = replace(random_scene(masks, height, width, seed=5), logits=logits)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    top, left, bottom, right = scene.extents[:, :, None, None].unbind(1)
    boxes = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    sums, counts = scene.pair_sums()
    trust = torch.full((masks,), confidence)
    return {
        "projection": projection_loss(logits, boxes).sum(),
        "color": color_pairwise_loss(sums[0], counts[0]),
        "pixel": noise_aware_pixel_loss(logits, scene.pseudo_masks, trust),
        "affinity": noise_reduced_affinity_loss(sums[1], counts[1], trust),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_full_precision_losses(dtype):
    torch.manual_seed(0)
    low = (4 * torch.randn(3, 8, 10)).to(dtype).requires_grad_()
    full = low.detach().float().requires_grad_()
    ours, theirs = all_losses(low), all_losses(full)
    for name, loss in ours.items():
        assert loss.dtype == torch.float32
        assert_close(loss, theirs[name])
    (gradient,) = torch.autograd.grad(sum(ours.values()), low)
    (expected,) = torch.autograd.grad(sum(theirs.values()), full)
    assert gradient.dtype == dtype
    # A sum of four gradients, each rounded to the low precision on its way.
    assert_close(
        gradient.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-3 * expected.abs().max()
    )


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_stay_finite(scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(3, 8, 10).sign()).requires_grad_()
    losses = all_losses(logits)
    assert all(torch.isfinite(loss) for loss in losses.values())
    (gradient,) = torch.autograd.grad(sum(losses.values()), logits)
    assert torch.isfinite(gradient).all()


def test_no_masks_at_all_give_zero_and_a_gradient():
    logits = torch.zeros(0, 8, 10, requires_grad=True)
    losses = all_losses(logits)
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    (gradient,) = torch.autograd.grad(sum(losses.values()), logits)
    assert gradient.shape == logits.shape


def test_masks_without_confidence_have_no_loss_and_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 10, requires_grad=True)
    losses = all_losses(logits, confidence=0.0)
    assert losses["pixel"] == 0
    assert losses["affinity"] == 0
    (gradient,) = torch.autograd.grad(losses["pixel"] + losses["affinity"], logits)
    assert (gradient == 0).all()


def test_masks_without_confidence_do_not_count_in_the_mean():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 8, 10), torch.rand(3, 8, 10) < 0.5
    alone = noise_aware_pixel_loss(logits[:1], masks[:1], torch.tensor([0.6]))
    among = noise_aware_pixel_loss(logits, masks, torch.tensor([0.6, 0.0, 0.0]))
    assert_close(among, alone)
    sums, counts = torch.tensor([6.0, 5.0, 4.0]), torch.tensor([3.0, 5.0, 0.0])
    affinity = noise_reduced_affinity_loss(sums, counts, torch.tensor([0.6, 0.5, 0.0]))
    assert float(affinity) == pytest.approx((2 * 0.6 + 1 * 0.5) / 2)


def test_color_pairwise_loss_is_a_mean_over_pairs_not_over_masks():
    assert float(color_pairwise_loss(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 4.0]))) == 1.0
    assert color_pairwise_loss(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("pixels", [1, 7, 80])
def test_dice_of_equal_masks_is_nearly_zero(pixels):
    mask = torch.zeros(1, 8, 10, dtype=torch.float64)
    mask.view(-1)[:pixels] = 1
    assert float(dice_loss(mask, mask)) == pytest.approx(1e-5 / (2 * pixels + 1e-5), rel=1e-9)


def test_dice_of_disjoint_and_of_empty_masks_is_one():
    left = torch.zeros(1, 8, 10)
    left[..., :5] = 1
    assert dice_loss(left, 1 - left) == 1
    assert dice_loss(torch.zeros(1, 8), torch.zeros(1, 8)) == 1


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 1), st.integers(1, 20))
def test_dice_of_constants_is_that_of_their_values(p, q, count):
    first = torch.full((1, count), p, dtype=torch.float64)
    second = torch.full((1, count), q, dtype=torch.float64)
    expected = 1 - 2 * count * p * q / (count * p * p + count * q * q + 1e-5)
    assert float(dice_loss(first, second)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert_close(dice_loss(first, second), dice_loss(second, first))


def test_dice_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    probabilities = torch.rand(3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = (torch.rand(3, 4, 5) < 0.5).double()
    assert torch.autograd.gradcheck(lambda p: dice_loss(p, masks), (probabilities,))


def box_of_ones(height: int = 10, width: int = 12) -> Tensor:
    box = torch.zeros(1, height, width, dtype=torch.bool)
    box[:, 2:8, 3:9] = True
    return box


def test_projection_loss_is_zero_for_any_mask_with_the_projections_of_the_box():
    box = box_of_ones()
    diagonal = torch.zeros_like(box)
    diagonal[0, torch.arange(2, 8), torch.arange(3, 9)] = True
    for mask in (box, diagonal, diagonal.flip(1).roll(0, 1) & box | diagonal):
        logits = torch.where(mask, 40.0, -40.0)
        assert float(projection_loss(logits, box)) < 1e-5


def test_projection_of_nothing_is_two_and_of_everything_is_known():
    box = box_of_ones()
    assert float(projection_loss(torch.full((1, 10, 12), -40.0), box)) == pytest.approx(2, abs=1e-6)
    everything = float(projection_loss(torch.full((1, 10, 12), 40.0), box))
    assert everything == pytest.approx((1 - 2 * 6 / (10 + 6)) + (1 - 2 * 6 / (12 + 6)), abs=1e-5)


def test_projection_loss_has_a_gradient_only_at_the_maximum_of_each_row_and_column():
    torch.manual_seed(0)
    logits = torch.randn(1, 10, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(projection_loss(logits, box_of_ones()).sum(), logits)
    is_maximum = (logits == logits.amax(1, keepdim=True)) | (logits == logits.amax(2, keepdim=True))
    assert torch.equal(gradient != 0, is_maximum)


def test_projection_loss_is_invariant_to_flips_and_transposition():
    torch.manual_seed(0)
    logits, box = torch.randn(1, 10, 12), box_of_ones()
    loss = projection_loss(logits, box)
    assert_close(projection_loss(logits.flip(1), box.flip(1)), loss)
    assert_close(projection_loss(logits.flip(2), box.flip(2)), loss)
    assert_close(projection_loss(logits.mT, box.mT), loss)


def test_padding_changes_no_loss():
    """Cells outside the box with very negative logits do not count."""
    torch.manual_seed(0)
    logits, box = torch.randn(1, 10, 12), box_of_ones()
    wide = F.pad(logits, (0, 8, 0, 4), value=-60.0)
    wide_box = F.pad(box, (0, 8, 0, 4))
    assert_close(projection_loss(wide, wide_box), projection_loss(logits, box))
    pseudo = box & (logits > 0)
    trust = torch.ones(1)
    wide_pixel = noise_aware_pixel_loss(wide, F.pad(pseudo, (0, 8, 0, 4)), trust)
    assert_close(wide_pixel, noise_aware_pixel_loss(logits, pseudo, trust))


def test_the_ellipse_loss_of_a_filled_ellipse_is_none_and_that_of_an_outline_is_not():
    grid = MaskGrid(1, 60, 60)
    y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    radius = ((x - 30) / 20) ** 2 + ((y - 25) / 15) ** 2  # of the ellipse in the box, 1 at its rim
    filled = torch.where(radius <= 1, 20.0, -20.0)
    outline = torch.where((radius <= 1) & (radius > 0.8), 20.0, -20.0)
    box = torch.tensor([[10.0, 10, 50, 40]])
    loss = ellipse_loss(torch.stack([filled, outline]), box.expand(2, 4), grid)
    assert loss[0] < 1e-4
    # Of Dice 1 − 2 |A ∩ E| / (|A| + |E|), with a fifth of the ellipse in the outline.
    assert float(loss[1]) == pytest.approx(1 - 2 * 0.2 / 1.2, abs=0.02)


def test_the_ellipse_loss_of_a_box_that_touches_no_cell_is_finite():
    loss = ellipse_loss(torch.randn(1, 8, 8), torch.tensor([[1.0, 1, 1.5, 1.5]]), MaskGrid(4, 8, 8))
    assert loss.isfinite().all()
