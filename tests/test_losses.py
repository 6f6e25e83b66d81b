"""The four mask losses: naive versions, closed forms, symmetries, gradients, extremes."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from boxteacher.losses import (
    BoxRegions,
    affinity_relation,
    canvas,
    color_pairwise_loss,
    color_relation,
    dice_loss,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.losses.pairs import pair_term
from boxteacher.neighbours import neighbour_offsets
from boxteacher.targets import color_similarity


@dataclass(frozen=True)
class Scene:
    """Masks with all that the two pair losses compare them with."""

    logits: Tensor  # (M, h, w)
    extents: Tensor  # (M, 4)
    image_index: Tensor  # (M,)
    valid: Tensor  # (B, h, w)
    similarity: Tensor  # (B, 8, h, w)
    pseudo_masks: Tensor  # (M, h, w)

    def pair_sums(self, kernel_size: int = 3, dilation: int = 2) -> tuple[Tensor, Tensor]:
        return pair_sums(
            self.logits,
            BoxRegions(self.extents, self.image_index, self.valid),
            [
                color_relation(self.similarity, self.image_index, 0.5, kernel_size, dilation),
                affinity_relation(self.pseudo_masks, torch.arange(len(self.logits)), 0.5),
            ],
            kernel_size,
            dilation,
        )

    def flip(self, dimension: int) -> "Scene":
        """The mirror image; `dimension` is 1 for top and bottom, 2 for left and right."""
        size = self.logits.shape[dimension]
        first, end = dimension - 1, dimension + 1
        extents = self.extents.clone()
        extents[:, first], extents[:, end] = size - self.extents[:, end], size - self.extents[:, first]
        offsets = neighbour_offsets()
        mirrored = [
            offsets.index((-down, right) if dimension == 1 else (down, -right)) for down, right in offsets
        ]
        return replace(
            self,
            logits=self.logits.flip(dimension),
            extents=extents,
            valid=self.valid.flip(dimension),
            similarity=self.similarity.flip(dimension + 1)[:, mirrored],
            pseudo_masks=self.pseudo_masks.flip(dimension),
        )


def random_scene(
    masks: int,
    height: int,
    width: int,
    kernel_size: int = 3,
    dilation: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sides = torch.tensor([height, width])
    first = (random(masks, 2) * sides).long()  # (M, 2)
    end = first + (random(masks, 2) * (sides + 1 - first)).long()  # some boxes have no cell at all
    bottom = int(torch.randint(height, (), generator=generator))
    valid = torch.ones(2, height, width, dtype=torch.bool)
    valid[1, bottom:] = False
    images = [(random(3, height, width) * 0.03).float() for _ in range(2)]
    return Scene(
        logits=(6 * random(masks, height, width) - 3).to(dtype),
        extents=torch.cat([first, end], 1),
        image_index=torch.randint(2, (masks,), generator=generator),
        valid=valid,
        similarity=color_similarity(images, valid, 1, 1, kernel_size, dilation),
        pseudo_masks=random(masks, height, width) < 0.5,
    )


def neighbours(grid: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """All neighbours (M, 8, h, w) of each cell of (M, h, w), by `unfold`."""
    masks, height, width = grid.shape
    padding = dilation * (kernel_size // 2)
    columns = F.unfold(grid[:, None], kernel_size, dilation=dilation, padding=padding)
    columns = columns.view(masks, -1, height, width)
    middle = kernel_size**2 // 2
    return torch.cat([columns[:, :middle], columns[:, middle + 1 :]], 1)


def naive_pair_sums(scene: Scene, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Both relations over every cell of the grid, in all directions, with probabilities, not logits."""
    height, width = scene.logits.shape[1:]
    row, column = torch.arange(height)[:, None], torch.arange(width)
    top, left, bottom, right = scene.extents[:, :, None, None].unbind(1)
    in_box = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # (M, h, w)
    alike = scene.similarity[scene.image_index] >= 0.5  # (M, 8, h, w)
    masks = scene.pseudo_masks.double()
    smooth = (masks + F.avg_pool2d(masks[:, None], 3, stride=1, padding=1)[:, 0]) / 2  # (M, h, w)
    other = neighbours(smooth, kernel_size, dilation)  # (M, 8, h, w)
    affinity = smooth[:, None] * other + (1 - smooth[:, None]) * (1 - other)
    valid = neighbours(scene.valid[scene.image_index].double(), kernel_size, dilation) > 0
    weights = torch.stack([alike, valid & (affinity >= 0.5)]) & in_box[:, None]  # (2, M, 8, h, w)
    p = scene.logits.sigmoid()
    q = neighbours(p, kernel_size, dilation)
    term = -(p[:, None] * q + (1 - p)[:, None] * (1 - q)).clamp(min=1e-300).log()
    return (term * weights).sum((2, 3, 4)), weights.sum((2, 3, 4))


@settings(max_examples=60, deadline=None)
@given(
    masks=st.integers(1, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel_size=st.sampled_from([3, 5]),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@example(masks=2, height=1, width=1, kernel_size=5, dilation=3, seed=0)
@example(masks=2, height=2, width=7, kernel_size=3, dilation=2, seed=0)
@example(masks=3, height=12, width=12, kernel_size=9, dilation=1, seed=0)
@example(masks=40, height=20, width=30, kernel_size=3, dilation=2, seed=0)
def test_pair_sums_are_those_of_a_naive_version(masks, height, width, kernel_size, dilation, seed):
    scene = random_scene(masks, height, width, kernel_size, dilation, seed, torch.float64)
    scene.logits.requires_grad_()
    factors = torch.rand(2, masks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    sums, counts = scene.pair_sums(kernel_size, dilation)
    naive_sums, naive_counts = naive_pair_sums(scene, kernel_size, dilation)
    assert_close(sums, naive_sums)
    assert torch.equal(counts.long(), naive_counts)

    (gradient,) = torch.autograd.grad((sums * factors).sum(), scene.logits)
    (naive_gradient,) = torch.autograd.grad((naive_sums * factors).sum(), scene.logits)
    assert_close(gradient, naive_gradient)


def test_pair_sums_do_not_depend_on_how_boxes_are_packed(monkeypatch):
    """Many small canvases, or few large ones with boxes of any width: the same values."""
    scene = random_scene(30, 24, 40)
    expected = scene.pair_sums()
    for cells, ratio in ((1, 1.01), (2**30, 1e6)):
        monkeypatch.setattr(canvas, "_CELLS_AT_ONCE_ON_CPU", cells)
        monkeypatch.setattr(canvas, "_WIDTH_RATIO", ratio)
        sums, counts = scene.pair_sums()
        assert_close(sums, expected[0])
        assert torch.equal(counts, expected[1])


def test_the_work_grows_with_the_boxes_and_not_with_the_grid():
    """A box's sheet holds the box with its border and, at most, what its width class adds."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 180, (100, 2), generator=generator)
    extents = torch.cat([first, first + torch.randint(2, 100, (100, 2), generator=generator)], 1)
    border = 3
    with_border = (extents[:, 2:] - extents[:, :2] + 2 * border).prod(1).sum()
    cells = [
        sum(sheet.inside.numel() for sheet in canvas.box_canvases(extents, grid, border))
        for grid in ((300, 300), (3000, 5000))
    ]
    assert cells[0] == cells[1]
    assert with_border <= cells[0] <= canvas._WIDTH_RATIO * with_border


def test_masks_in_another_order_have_the_same_sums():
    scene = random_scene(9, 16, 24)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        scene,
        logits=scene.logits[order],
        extents=scene.extents[order],
        image_index=scene.image_index[order],
        pseudo_masks=scene.pseudo_masks[order],
    )
    for ours, theirs in zip(shuffled.pair_sums(), scene.pair_sums(), strict=True):
        assert_close(ours, theirs[:, order])


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (3, 2), (5, 1)])
def test_gradients_of_pair_sums_are_those_of_finite_differences(kernel_size, dilation):
    scene = random_scene(2, 5, 6, kernel_size, dilation, dtype=torch.float64)
    scene = replace(scene, extents=torch.tensor([[0, 1, 4, 6], [1, 0, 5, 3]]))

    def sums_of(logits: Tensor) -> Tensor:
        return replace(scene, logits=logits).pair_sums(kernel_size, dilation)[0]

    assert torch.autograd.gradcheck(sums_of, (scene.logits.requires_grad_(),))


def test_counts_have_no_gradient_and_none_is_kept_without_need():
    scene = random_scene(2, 5, 6)
    sums, counts = scene.pair_sums()
    assert not sums.requires_grad
    scene.logits.requires_grad_()
    sums, counts = scene.pair_sums()
    assert sums.requires_grad
    assert not counts.requires_grad


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
def test_pairs_count_alike_in_a_mirror(dimension):
    """Flipping the image, the boxes, the pseudo masks and the logits together changes no loss."""
    scene = random_scene(6, 16, 24)
    sums, counts = scene.pair_sums()
    mirrored_sums, mirrored_counts = scene.flip(dimension).pair_sums()
    assert (counts.sum(1) > 100).all()
    assert torch.equal(mirrored_counts, counts)
    assert_close(mirrored_sums, sums)


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
    similarity = torch.zeros(2, 8, 4, 4)
    offsets = neighbour_offsets(3, 1)
    similarity[1, offsets.index((0, 1))] = 0.3  # as much as the threshold asks for, in image 1 only
    image_index = torch.tensor([0, 1])
    regions = BoxRegions(
        extents=torch.tensor([[1, 1, 2, 2]]).expand(2, -1),
        image_index=image_index,
        valid=torch.ones(2, 4, 4, dtype=torch.bool),
    )
    relation = color_relation(similarity, image_index, 0.3, 3, 1)
    _, counts = pair_sums(torch.zeros(2, 4, 4), regions, [relation], 3, 1)
    assert counts.tolist() == [[0, 2]]  # the cell with its right neighbour, and with its left one
