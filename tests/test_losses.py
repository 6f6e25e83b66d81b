"""The four mask losses: naive versions, closed forms, symmetries, gradients, extremes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from boxteacher.losses import (
    affinity_pair_selection,
    color_pair_selection,
    color_pairwise_loss,
    dice_loss,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.losses.pairs import pair_term
from boxteacher.neighbours import Offset, neighbour_offsets
from boxteacher.targets import color_similarity


def random_weights(
    masks: int, height: int, width: int, kernel_size: int, dilation: int, seed: int = 0
) -> dict[Offset, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        offset: torch.rand(masks, height, width, generator=generator) < 0.5
        for offset in neighbour_offsets(kernel_size, dilation)
    }


def naive_pair_sums(
    logits: Tensor, weights: dict[Offset, Tensor], kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """All neighbours at once by `unfold`, probabilities instead of logits."""
    masks, height, width = logits.shape
    settings = {"dilation": dilation, "padding": dilation * (kernel_size // 2)}

    def neighbours(grid: Tensor) -> Tensor:
        columns = F.unfold(grid[:, None], kernel_size, **settings).view(masks, -1, height, width)
        middle = kernel_size**2 // 2
        return torch.cat([columns[:, :middle], columns[:, middle + 1 :]], 1)

    p = logits.sigmoid()
    q = neighbours(p)
    weight = torch.stack(list(weights.values()), 1) * neighbours(torch.ones_like(p))
    term = -(p[:, None] * q + (1 - p)[:, None] * (1 - q)).clamp(min=1e-300).log()
    return (term * weight).sum((1, 2, 3)), weight.sum((1, 2, 3))


@settings(max_examples=50, deadline=None)
@given(
    masks=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel_size=st.sampled_from([3, 5]),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@example(masks=2, height=1, width=1, kernel_size=5, dilation=3, seed=0)
@example(masks=2, height=2, width=7, kernel_size=3, dilation=2, seed=0)
def test_pair_sums_are_those_of_a_naive_version(masks, height, width, kernel_size, dilation, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(masks, height, width, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    both = [random_weights(masks, height, width, kernel_size, dilation, seed + s) for s in range(2)]
    factors = torch.rand(2, masks, dtype=torch.float64, generator=generator)

    sums, counts = pair_sums(logits, [w.__getitem__ for w in both], kernel_size, dilation)
    naive = [naive_pair_sums(logits, weights, kernel_size, dilation) for weights in both]
    naive_sums, naive_counts = (torch.stack(parts) for parts in zip(*naive, strict=True))
    assert_close(sums, naive_sums)
    assert torch.equal(counts, naive_counts)

    (gradient,) = torch.autograd.grad((sums * factors).sum(), logits)
    (naive_gradient,) = torch.autograd.grad((naive_sums * factors).sum(), logits)
    assert_close(gradient, naive_gradient)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (3, 2), (5, 1)])
def test_gradients_of_pair_sums_are_those_of_finite_differences(kernel_size, dilation):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [random_weights(2, 5, 6, kernel_size, dilation, seed) for seed in range(2)]

    def sums_of(x: Tensor) -> Tensor:
        return pair_sums(x, [w.__getitem__ for w in weights], kernel_size, dilation)[0]

    assert torch.autograd.gradcheck(sums_of, (logits,))


def test_counts_have_no_gradient_and_none_is_kept_without_need():
    weights = random_weights(2, 5, 6, 3, 2)
    sums, counts = pair_sums(torch.randn(2, 5, 6).requires_grad_(), [weights.__getitem__], 3, 2)
    assert sums.requires_grad
    assert not counts.requires_grad
    sums, counts = pair_sums(torch.randn(2, 5, 6), [weights.__getitem__], 3, 2)
    assert not sums.requires_grad


@settings(max_examples=200, deadline=None)
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_pair_term_is_the_logarithm_of_agreement(x, y):
    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    expected = -math.log(sigmoid(x) * sigmoid(y) + sigmoid(-x) * sigmoid(-y))
    first, second = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    value = pair_term(first, second)
    # torch's softplus is the identity above 20, which leaves out e⁻²⁰ = 2e-9.
    assert float(value) == pytest.approx(expected, rel=1e-9, abs=5e-9)
    assert torch.equal(value, pair_term(second, first))
    assert_close(value, pair_term(-first, -second), rtol=1e-9, atol=5e-9)


def test_pair_term_is_never_negative():
    torch.manual_seed(0)
    for scale in (1, 10, 30):
        x, y = scale * torch.randn(2, 200_000)
        assert (pair_term(x, y) >= 0).all()


@pytest.mark.parametrize("dimension", [1, 2])
def test_colour_pairs_count_alike_in_a_mirror(dimension):
    """Flipping the image, the boxes and the logits together changes no loss."""
    torch.manual_seed(0)
    image = (torch.rand(3, 8, 12) * 0.02).repeat_interleave(8, 1).repeat_interleave(8, 2)  # (3, 64, 96)
    boxes, logits = torch.rand(3, 16, 24) < 0.7, torch.randn(3, 16, 24)

    def loss(picture: Tensor, inside: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        similarity = color_similarity([picture], torch.ones(1, 16, 24).bool(), 4, 32)
        selection = color_pair_selection(inside, similarity, torch.zeros(3, dtype=torch.int64), 0.3, 3, 2)
        sums, counts = pair_sums(masks, [selection], 3, 2)
        return sums[0], counts[0]

    sums, counts = loss(image, boxes, logits)
    mirrored = loss(image.flip(dimension), boxes.flip(dimension), logits.flip(dimension))
    assert counts.sum() > 100
    assert torch.equal(mirrored[1], counts)
    assert_close(mirrored[0], sums)


@pytest.mark.parametrize("dimension", [1, 2])
def test_affinity_pairs_count_alike_in_a_mirror(dimension):
    torch.manual_seed(0)
    boxes, masks = torch.rand(3, 16, 24) < 0.7, torch.rand(3, 16, 24) < 0.5
    logits = torch.randn(3, 16, 24)

    def loss(flip: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        valid = torch.ones(3, 16, 24).bool()
        selection = affinity_pair_selection(flip(boxes), flip(masks & boxes), valid, 0.5)
        return pair_sums(flip(logits), [selection], 3, 2)

    sums, counts = loss(lambda grid: grid)
    flipped_sums, flipped_counts = loss(lambda grid: grid.flip(dimension))
    assert torch.equal(flipped_counts, counts)
    assert_close(flipped_sums, sums)


def all_losses(logits: Tensor, confidence: float = 0.7) -> dict[str, Tensor]:
    masks, height, width = logits.shape
    generator = torch.Generator().manual_seed(5)
    boxes = torch.rand(masks, height, width, generator=generator) < 0.8
    pseudo = torch.rand(masks, height, width, generator=generator) < 0.5
    similarity = torch.rand(1, 8, height, width, generator=generator)
    selections = [
        color_pair_selection(boxes, similarity, torch.zeros(masks, dtype=torch.int64), 0.3, 3, 2),
        affinity_pair_selection(boxes, pseudo, torch.ones_like(boxes), 0.5),
    ]
    sums, counts = pair_sums(logits, selections, 3, 2)
    trust = torch.full((masks,), confidence)
    return {
        "projection": projection_loss(logits, boxes).sum(),
        "color": color_pairwise_loss(sums[0], counts[0]),
        "pixel": noise_aware_pixel_loss(logits, pseudo, trust),
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


def test_masks_without_confidence_teach_nothing():
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 10, requires_grad=True)
    losses = all_losses(logits, confidence=0.0)
    assert losses["pixel"] == 0
    assert losses["affinity"] == 0
    (gradient,) = torch.autograd.grad(losses["pixel"] + losses["affinity"], logits)
    assert (gradient == 0).all()


def test_masks_without_confidence_do_not_water_down_the_others():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 8, 10), torch.rand(3, 8, 10) < 0.5
    alone = noise_aware_pixel_loss(logits[:1], masks[:1], torch.tensor([0.6]))
    among = noise_aware_pixel_loss(logits, masks, torch.tensor([0.6, 0.0, 0.0]))
    assert_close(among, alone)
    sums, counts = torch.tensor([6.0, 5.0, 4.0]), torch.tensor([3.0, 5.0, 0.0])
    affinity = noise_reduced_affinity_loss(sums, counts, torch.tensor([0.6, 0.5, 0.0]))
    assert float(affinity) == pytest.approx((2 * 0.6 + 1 * 0.5) / 2)


def test_colour_pairwise_loss_is_a_mean_over_pairs_not_over_masks():
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


def test_projection_vanishes_for_whatever_casts_the_shadow_of_the_box():
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


def test_projection_teaches_only_the_greatest_logit_of_each_row_and_column():
    torch.manual_seed(0)
    logits = torch.randn(1, 10, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(projection_loss(logits, box_of_ones()).sum(), logits)
    greatest = (logits == logits.amax(1, keepdim=True)) | (logits == logits.amax(2, keepdim=True))
    assert torch.equal(gradient != 0, greatest)


def test_projection_does_not_change_in_a_mirror_or_on_its_side():
    torch.manual_seed(0)
    logits, box = torch.randn(1, 10, 12), box_of_ones()
    loss = projection_loss(logits, box)
    assert_close(projection_loss(logits.flip(1), box.flip(1)), loss)
    assert_close(projection_loss(logits.flip(2), box.flip(2)), loss)
    assert_close(projection_loss(logits.mT, box.mT), loss)


def test_a_larger_canvas_changes_no_loss():
    """Cells outside the box whose logits are far below zero are as good as absent."""
    torch.manual_seed(0)
    logits, box = torch.randn(1, 10, 12), box_of_ones()
    wide = F.pad(logits, (0, 8, 0, 4), value=-60.0)
    wide_box = F.pad(box, (0, 8, 0, 4))
    assert_close(projection_loss(wide, wide_box), projection_loss(logits, box))
    pseudo = box & (logits > 0)
    trust = torch.ones(1)
    wide_pixel = noise_aware_pixel_loss(wide, F.pad(pseudo, (0, 8, 0, 4)), trust)
    assert_close(wide_pixel, noise_aware_pixel_loss(logits, pseudo, trust))


def test_a_colour_pair_needs_its_centre_in_the_box_and_its_image_s_colours():
    boxes = torch.zeros(2, 4, 4).bool()
    boxes[:, 1, 1] = True
    similarity = torch.zeros(2, 8, 4, 4)
    offsets = neighbour_offsets(3, 1)
    similarity[1, offsets.index((0, 1))] = 0.3  # as much as the threshold asks for, in image 1 only
    selection = color_pair_selection(boxes, similarity, torch.tensor([0, 1]), 0.3, 3, 1)
    _, counts = pair_sums(torch.zeros(2, 4, 4), [selection], 3, 1)
    assert counts.tolist() == [[0, 1]]
