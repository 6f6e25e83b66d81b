"""The kernel under the two pair losses: a naive version, gradients, packing, mirrors."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from boxteacher.grid import NEIGHBOR_DILATION, neighbor_offsets
from boxteacher.losses import (
    BoxRegions,
    color_relation,
    packing,
    pair_sums,
)
from boxteacher.losses.pairs import pair_term
from tests.loss_support import Scene, random_scene


def neighbors(grid: Tensor) -> Tensor:
    """All neighbors (M, 8, h, w) of each cell of (M, h, w), by `unfold`."""
    masks, height, width = grid.shape
    columns = F.unfold(grid[:, None], 3, dilation=NEIGHBOR_DILATION, padding=NEIGHBOR_DILATION)
    columns = columns.view(masks, -1, height, width)
    return torch.cat([columns[:, :4], columns[:, 5:]], 1)


def naive_pair_sums(scene: Scene) -> tuple[Tensor, Tensor]:
    """Sums over all cells of the grid and all eight neighbors, computed with probabilities, not logits."""
    height, width = scene.logits.shape[1:]
    row, column = torch.arange(height)[:, None], torch.arange(width)
    top, left, bottom, right = scene.extents[:, :, None, None].unbind(1)
    in_box = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # (M, h, w)
    alike = scene.similarity[scene.image_index] >= 0.5  # (M, 8, h, w)
    masks = scene.pseudo_masks.double()
    smooth = (masks + F.avg_pool2d(masks[:, None], 3, stride=1, padding=1)[:, 0]) / 2  # (M, h, w)
    other = neighbors(smooth)  # (M, 8, h, w)
    affinity = smooth[:, None] * other + (1 - smooth[:, None]) * (1 - other)
    valid = neighbors(scene.valid[scene.image_index].double()) > 0
    weights = torch.stack([alike, valid & (affinity >= 0.5)]) & in_box[:, None]  # (2, M, 8, h, w)
    p = scene.logits.sigmoid()
    q = neighbors(p)
    term = -(p[:, None] * q + (1 - p)[:, None] * (1 - q)).clamp(min=1e-300).log()
    return (term * weights).sum((2, 3, 4)), weights.sum((2, 3, 4))


@settings(max_examples=60, deadline=None)
@given(
    masks=st.integers(1, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@example(masks=2, height=1, width=1, seed=0)
@example(masks=2, height=2, width=7, seed=0)
@example(masks=40, height=20, width=30, seed=0)
def test_pair_sums_are_those_of_a_naive_version(masks, height, width, seed):
    scene = random_scene(masks, height, width, seed, torch.float64)
    scene.logits.requires_grad_()
    factors = torch.rand(2, masks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    sums, counts = scene.pair_sums()
    naive_sums, naive_counts = naive_pair_sums(scene)
    assert_close(sums, naive_sums)
    assert torch.equal(counts.long(), naive_counts)

    (gradient,) = torch.autograd.grad((sums * factors).sum(), scene.logits)
    (naive_gradient,) = torch.autograd.grad((naive_sums * factors).sum(), scene.logits)
    assert_close(gradient, naive_gradient)


def test_pair_sums_do_not_depend_on_how_boxes_are_packed(monkeypatch):
    """Many small packings, and few large ones with boxes of any width, give the same values."""
    scene = random_scene(30, 24, 40)
    expected = scene.pair_sums()
    for cells, ratio in ((1, 1.01), (2**30, 1e6)):
        monkeypatch.setattr(packing, "_MAX_CELLS_ON_CPU", cells)
        monkeypatch.setattr(packing, "_WIDTH_RATIO", ratio)
        sums, counts = scene.pair_sums()
        assert_close(sums, expected[0])
        assert torch.equal(counts, expected[1])


def test_the_work_grows_with_the_boxes_and_not_with_the_grid():
    """The packed area is that of the boxes with their borders, up to the ratio of widths in one packing."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 180, (100, 2), generator=generator)
    extents = torch.cat([first, first + torch.randint(2, 100, (100, 2), generator=generator)], 1)
    border = 3
    with_border = (extents[:, 2:] - extents[:, :2] + 2 * border).prod(1).sum()
    cells = [
        sum(packed.inside.numel() for packed in packing.pack_boxes(extents, grid, border))
        for grid in ((300, 300), (3000, 5000))
    ]
    assert cells[0] == cells[1]
    assert with_border <= cells[0] <= packing._WIDTH_RATIO * with_border


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


def test_gradients_of_pair_sums_are_those_of_finite_differences():
    scene = random_scene(2, 5, 6, dtype=torch.float64)
    scene = replace(scene, extents=torch.tensor([[0, 1, 4, 6], [1, 0, 5, 3]]))

    def sums_of(logits: Tensor) -> Tensor:
        return replace(scene, logits=logits).pair_sums()[0]

    assert torch.autograd.gradcheck(sums_of, (scene.logits.requires_grad_(),))


def test_counts_have_no_gradient_and_sums_only_if_logits_need_one():
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
def test_pair_sums_are_invariant_to_flips(dimension):
    """Image, boxes, pseudo masks and logits are flipped together."""
    scene = random_scene(6, 16, 24)
    sums, counts = scene.pair_sums()
    mirrored_sums, mirrored_counts = scene.flip(dimension).pair_sums()
    assert (counts.sum(1) > 100).all()
    assert torch.equal(mirrored_counts, counts)
    assert_close(mirrored_sums, sums)


def test_a_color_pair_needs_its_center_in_the_box_and_its_image_s_colors():
    similarity = torch.zeros(2, 8, 4, 7)
    right = neighbor_offsets().index((0, NEIGHBOR_DILATION))
    similarity[1, right] = 0.3  # the threshold, in image 1 only
    image_index = torch.tensor([0, 1])
    regions = BoxRegions(
        extents=torch.tensor([[1, 3, 2, 4]]).expand(2, -1),
        image_index=image_index,
        valid=torch.ones(2, 4, 7, dtype=torch.bool),
    )
    relation = color_relation(similarity, image_index, 0.3)
    _, counts = pair_sums(torch.zeros(2, 4, 7), regions, [relation])
    assert counts.tolist() == [[0, 2]]  # the cell with its right neighbor, and with its left one
