"""SOLOv2: its parts against loops, its detections and candidates, and what it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from boxteacher.grid import grid_coordinates
from boxteacher.targets import box_masks
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.solov2 import SIZE_RANGES, SOLOv2, append_coordinates, build_solov2
from boxteacher_adapters.solov2_masks import centers_to_grid, matrix_nms, predict_masks
from boxteacher_adapters.solov2_targets import category_loss, grid_cells, match_cells, sample_positives
from tests.disc_support import assert_learns_a_disc
from tests.support import seeded_images, target

GRIDS = (8, 7, 5, 4, 3)
RANGES = ((1, 12), (6, 24), (12, 48), (24, 96), (48, math.inf))
IMAGES = seeded_images((64, 96), (57, 71))


def tiny() -> SOLOv2:
    torch.manual_seed(0)
    return SOLOv2(
        build_backbone("resnet18", "none", strides=(4, 8, 16, 32)),
        3,
        channels=64,  # two values per group norm's group even on a map of one cell
        head_channels=64,
        num_convs=1,
        mask_channels=64,
        num_kernels=32,
        grids=GRIDS,
        size_ranges=RANGES,
    )


@pytest.fixture(scope="module")
def talkative() -> SOLOv2:
    """An untrained network that finds things nonetheless, of different classes, sizes and scores."""
    model = tiny()
    with torch.no_grad():
        model.head.category.bias.fill_(-1.0)
        model.head.category.weight.normal_(std=0.1)
        model.head.kernel.weight.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def test_coordinates_go_from_corner_to_corner():
    maps = append_coordinates(torch.zeros(2, 3, 4, 5))
    assert maps.shape == (2, 5, 4, 5)
    assert maps[1, 3].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 4
    assert_close(maps[0, 4, :, 2], torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert torch.isfinite(append_coordinates(torch.zeros(1, 1, 1, 1))).all()


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_values_move_to_the_pixels_of_the_mask_grid(stride):
    """They are those that the map has there when it is enlarged to pixels."""
    maps = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(maps[:, None], scale_factor=stride, mode="bilinear")[:, 0]
    rows, columns = grid_coordinates(5 * stride, 7 * stride, stride, torch.device("cpu"))
    assert_close(centers_to_grid(maps, stride), pixels[:, rows][..., columns])


def test_masks_are_predicted_from_their_own_image():
    generator = torch.Generator().manual_seed(0)
    features, kernels = torch.randn(3, 5, 4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    image = torch.tensor([2, 0, 2, 2])
    logits = predict_masks(features, image, kernels)
    for m in range(4):
        assert_close(logits[m], (kernels[m][:, None, None] * features[image[m]]).sum(0))
    assert predict_masks(features, image[:0], kernels[:0]).shape == (0, 4, 6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_matrix_nms_is_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 7, 4, 5, generator=generator) > 0.4
    masks[0, 3] = False
    scores = torch.randint(1, 5, (2, 7), generator=generator) / 5  # with ties
    labels = torch.randint(0, 2, (2, 7), generator=generator)
    decay = matrix_nms(masks, scores, labels)
    for b in range(2):
        order = sorted(range(7), key=lambda n: (-scores[b, n], n))

        def iou(m: int, n: int, b: int = b) -> float:
            union = (masks[b, m] | masks[b, n]).sum().item()
            return (masks[b, m] & masks[b, n]).sum().item() / max(union, 1)

        for k, n in enumerate(order):
            factors = [1.0]
            for j, better in enumerate(order[:k]):
                if labels[b, better] == labels[b, n]:
                    rivals = [o for o in order[:j] if labels[b, o] == labels[b, better]]
                    largest = max((iou(o, better) for o in rivals), default=0.0)
                    factors.append(math.exp(-2 * iou(better, n) ** 2) / math.exp(-2 * largest**2))
            assert_close(decay[b, n].item(), min(factors), rtol=1e-5, atol=0)


corner = st.tuples(st.integers(-10, 90), st.integers(-10, 60), st.integers(0, 100), st.integers(0, 70))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(corner, max_size=4), min_size=1, max_size=3))
def test_cells_are_matched_as_by_a_loop(rows):
    targets = [target(*((x, y, x + w, y + h) for x, y, w, h in image)) for image in rows]
    for t in targets:
        t["labels"] = torch.arange(len(t["boxes"])) % 3
    matches = match_cells(grid_cells(GRIDS, RANGES, torch.device("cpu")), targets, (64, 96), 3)
    hits, labels = [], torch.full((len(rows), sum(g * g for g in GRIDS)), 3)
    for b, image in enumerate(rows):
        for n, (x, y, w, h) in enumerate(image):
            hits.append(set())
            first = 0
            for grid, (minimum, maximum) in zip(GRIDS, RANGES, strict=True):
                if minimum <= math.sqrt(w * h) <= maximum:
                    # The middle of pixels x … x + w − 1.
                    columns = region(x + (w - 1) / 2, 0.1 * w, grid, 96)
                    hits[-1] |= {
                        first + r * grid + c
                        for r in region(y + (h - 1) / 2, 0.1 * h, grid, 64)
                        for c in columns
                    }
                first += grid * grid
            labels[b, list(hits[-1])] = n % 3
    assert [set(row.nonzero()[:, 0].tolist()) for row in matches.positive] == hits
    assert torch.equal(matches.cell_labels, labels)
    assert matches.image_index.tolist() == [b for b, image in enumerate(rows) for _ in image]


def region(center: float, reach: float, grid: int, length: int) -> list[int]:
    def cell(pixel: float) -> int:
        return int(torch.tensor(pixel).mul(torch.tensor(grid) / length).floor())

    first, last = max(cell(center - reach), cell(center) - 1), min(cell(center + reach), cell(center) + 1)
    return [i for i in range(grid) if first <= i <= last]


@pytest.mark.parametrize("max_samples", [1, 4, 6, 1000])
def test_too_many_samples_are_cut_fairly(max_samples):
    """Each target keeps its most confident cells, up to the same number for all targets of its image."""
    targets = [target((4, 4, 60, 60), (30, 10, 92, 50)), target(), target((0, 0, 20, 18))]
    targets[0]["labels"] = torch.tensor([2, 1])
    matches = match_cells(grid_cells(GRIDS, RANGES, torch.device("cpu")), targets, (64, 96), 3)
    logits = torch.randn(3, matches.positive.shape[1], 3, generator=torch.Generator().manual_seed(0))
    chosen = set(
        zip(*(part.tolist() for part in sample_positives(matches, logits, max_samples)), strict=True)
    )
    for n, (image, label, sharing) in enumerate([(0, 2, 2), (0, 1, 2), (2, 0, 1)]):
        best = sorted(matches.positive[n].nonzero()[:, 0].tolist(), key=lambda s: -logits[image, s, label])
        assert {s for t, s in chosen if t == n} == set(best[: max(1, max_samples // sharing)])


def test_the_category_loss_counts_positive_cells():
    logits = torch.tensor([[[0.0, -20.0], [-20.0, -20.0], [-20.0, 20.0]]])
    loss = category_loss(logits, torch.tensor([[0, 2, 1]]))
    assert_close(
        loss, torch.tensor(0.25 * 0.25 * math.log(2) / 3), rtol=1e-4, atol=0
    )  # two positives, and one


def test_a_box_of_no_area_teaches_background():
    flat = [target((4, 4, 40, 50), (50, 20, 50, 60)), target((30, 30, 30, 30))]
    matches = match_cells(grid_cells(GRIDS, RANGES, torch.device("cpu")), flat, (64, 96), 3)
    assert matches.positive.any(1).tolist() == [True, False, False]


def test_detections_have_tight_boxes_and_come_best_first(talkative):
    for found, image in zip(talkative(IMAGES), IMAGES, strict=True):
        assert 0 < len(found["scores"]) <= 100
        assert (found["scores"].diff() <= 0).all()
        rows, columns = torch.arange(image.shape[1]), torch.arange(image.shape[2])
        for box, mask in zip(found["boxes"], found["masks"][:, 0] > 0.5, strict=True):
            x0, y0, x1, y1 = box.tolist()
            assert mask.any(0).nonzero()[[0, -1], 0].tolist() == [x0, x1 - 1]
            assert mask.any(1).nonzero()[[0, -1], 0].tolist() == [y0, y1 - 1]
            assert not (mask & ~box_masks(box[None] - torch.tensor([0, 0, 1, 1]), rows, columns)[0]).any()


@torch.no_grad()
def test_an_untrained_teacher_proposes_candidates_with_boxes_round_their_masks():
    candidates = tiny().eval().forward_teacher(IMAGES)
    counts = candidates.image_index.bincount()
    assert (counts > 0).all()
    assert (counts <= 100).all()
    assert ((candidates.scores > 0) & (candidates.scores <= 1)).all()
    limit = torch.tensor([[96, 64], [71, 57]])[candidates.image_index]
    assert (candidates.boxes[:, :2] >= 0).all()
    assert (candidates.boxes[:, 2:] <= limit).all()
    assert (candidates.boxes[:, 2:] > candidates.boxes[:, :2]).all()


def test_small_images_get_the_small_network():
    with torch.device("meta"):
        small, large = (
            build_solov2(3, backbone="resnet18", weights="none", image_size=size) for size in (256, 513)
        )
    assert small.fpn.inner_blocks[0][0].out_channels == 128
    assert small.size_ranges[0] == (1 * 256 / 1333, 96 * 256 / 1333)
    assert (large.fpn.inner_blocks[0][0].out_channels, large.size_ranges) == (256, SIZE_RANGES)


def test_every_class_has_a_probability_of_a_hundredth_at_first():
    assert_close(tiny().head.category.bias.sigmoid(), torch.full((3,), 0.01))


@pytest.mark.slow
def test_a_disc_is_learned_from_its_box():
    assert_learns_a_disc(tiny(), steps=70, warmup_steps=60, lr=1e-3)
