"""SOLOv2: the original code's numbers, its parts against loops, and a tiny one under every supervision."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised, PseudoMaskProvider
from boxteacher.grid import grid_coordinates
from boxteacher.targets import box_masks
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.coordinates import append_coordinates, centers_to_grid
from boxteacher_adapters.solov2 import SIZE_RANGES, SOLOv2, build_solov2
from boxteacher_adapters.solov2_masks import draw_masks, matrix_nms
from boxteacher_adapters.solov2_targets import category_loss, grid_cells, match_cells, select_samples
from tests.disc_support import assert_learns_a_disc
from tests.support import filled, seeded_images, target

SUPERVISIONS = [BoxTeacher, BoxSupervised, MaskSupervised]
GRIDS = (8, 7, 5, 4, 3)
RANGES = ((1, 12), (6, 24), (12, 48), (24, 96), (48, math.inf))
IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


def tiny(seed: int = 0, max_samples: int = 64) -> SOLOv2:
    torch.manual_seed(seed)
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
        max_samples=max_samples,
    )


def talkative(seed: int = 0) -> SOLOv2:
    """An untrained network that finds things nonetheless, of different classes, sizes and scores."""
    model = tiny(seed)
    with torch.no_grad():
        model.head.category.bias.fill_(-1.0)
        model.head.category.weight.normal_(std=0.1)
        model.head.kernel.weight.normal_(std=0.1)
    return model.eval()


def with_masks(targets: list[dict], images: list[Tensor]) -> list[dict]:
    return [
        {**t, "masks": torch.stack([filled(b, *i.shape[1:]) for b in t["boxes"].int().tolist()])}
        for t, i in zip(targets, images, strict=True)
    ]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# Parts.


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


def test_masks_are_drawn_from_their_own_image():
    generator = torch.Generator().manual_seed(0)
    features, kernels = torch.randn(3, 5, 4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    image = torch.tensor([2, 0, 2, 2])
    drawn = draw_masks(features, image, kernels)
    for m in range(4):
        assert_close(drawn[m], (kernels[m][:, None, None] * features[image[m]]).sum(0))
    assert draw_masks(features, image[:0], kernels[:0]).shape == (0, 4, 6)


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
                    most = max((iou(o, better) for o in rivals), default=0.0)
                    factors.append(math.exp(-2 * iou(better, n) ** 2) / math.exp(-2 * most**2))
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
            for grid, (least, most) in zip(GRIDS, RANGES, strict=True):
                if least <= math.sqrt(w * h) <= most:
                    # The middle of pixels x … x + w − 1.
                    columns = region(x + (w - 1) / 2, 0.1 * w, grid, 96)
                    hits[-1] |= {
                        first + r * grid + c
                        for r in region(y + (h - 1) / 2, 0.1 * h, grid, 64)
                        for c in columns
                    }
                first += grid * grid
            labels[b, list(hits[-1])] = n % 3
    assert [set(row.nonzero()[:, 0].tolist()) for row in matches.hit] == hits
    assert torch.equal(matches.cell_labels, labels)
    assert matches.image_index.tolist() == [b for b, image in enumerate(rows) for _ in image]


def region(center: float, reach: float, grid: int, length: int) -> list[int]:
    def cell(pixel: float) -> int:
        return int(torch.tensor(pixel).mul(torch.tensor(grid) / length).floor())

    first, last = max(cell(center - reach), cell(center) - 1), min(cell(center + reach), cell(center) + 1)
    return [i for i in range(grid) if first <= i <= last]


@pytest.mark.parametrize("max_samples", [1, 4, 6, 1000])
def test_too_many_samples_are_cut_fairly(max_samples):
    """Each target of a crowded image keeps the same number of its surest cells."""
    targets = [target((4, 4, 60, 60), (30, 10, 92, 50)), target(), target((0, 0, 20, 18))]
    targets[0]["labels"] = torch.tensor([2, 1])
    matches = match_cells(grid_cells(GRIDS, RANGES, torch.device("cpu")), targets, (64, 96), 3)
    cells = matches.hit.shape[1]
    probability = torch.rand(3, cells, 3, generator=torch.Generator().manual_seed(0))
    chosen = set(
        zip(*(part.tolist() for part in select_samples(matches, probability, max_samples)), strict=True)
    )
    for n, (image, label, sharing) in enumerate([(0, 2, 2), (0, 1, 2), (2, 0, 1)]):
        hit = sorted(matches.hit[n].nonzero()[:, 0].tolist(), key=lambda s: -probability[image, s, label])
        positives = int(matches.hit[matches.image_index == image].sum())
        share = max(1, max_samples // sharing) if positives > max_samples else cells
        assert {s for t, s in chosen if t == n} == set(hit[:share])


def test_the_category_loss_counts_positive_cells():
    logits = torch.tensor([[[0.0, -20.0], [-20.0, -20.0], [-20.0, 20.0]]])
    loss = category_loss(logits, torch.tensor([[0, 2, 1]]))
    assert_close(
        loss, torch.tensor(0.25 * 0.25 * math.log(2) / 3), rtol=1e-4, atol=0
    )  # two positives, and one


# The whole network.


def test_it_follows_the_protocol():
    assert isinstance(tiny(), PseudoMaskProvider)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_trained_parameter_gets_a_gradient(supervision):
    model = supervision(tiny()).train()
    if supervision is BoxTeacher:
        model.teacher.load_state_dict(talkative().state_dict())
    total(model(IMAGES, with_masks(TARGETS, IMAGES))).backward()
    for name, p in model.student.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name
    if supervision is BoxTeacher:
        assert all(p.grad is None for p in model.teacher.parameters())
        assert (model.last_pseudo_masks.confidence == 1).all()


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("sizes", [[(64, 64)], [(33, 95), (96, 40)], [(20, 18), (9, 31)]])
def test_odd_mixed_and_tiny_sizes_train_and_detect(supervision, sizes):
    images = seeded_images(*sizes)
    targets = with_masks([target((1, 2, 17, 8)) for _ in sizes], images)
    model = supervision(tiny()).train()
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_category"] > 0
    for found, image in zip(model.eval()(images), images, strict=True):
        assert found["masks"].shape[2:] == image.shape[1:]
        assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_images_without_boxes_train(supervision, empty):
    targets = [target() if i in empty else t for i, t in enumerate(TARGETS)]
    model = supervision(tiny()).train()
    losses = model(IMAGES, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters() if p.grad is not None)
    if len(empty) == 2:
        assert all(loss == 0 for name, loss in losses.items() if name != "loss_category")


def test_a_box_of_no_area_teaches_background():
    model = BoxSupervised(tiny()).train()
    flat = [target((4, 4, 40, 50), (50, 20, 50, 60)), target((30, 30, 30, 30))]
    output = model.student.forward_student(IMAGES, flat)
    assert set(output.masks[0].target_index.tolist()) == {0}
    assert all(torch.isfinite(loss) for loss in model(IMAGES, flat).values())


def test_a_label_out_of_range_is_named():
    wrong = [{**TARGETS[0], "labels": torch.tensor([0, 3])}, TARGETS[1]]
    with pytest.raises(InputError, match="target 0: labels reach from 0 to 3"):
        tiny().train().forward_student(IMAGES, wrong)


def test_detections_are_torchvision_s():
    for found, image in zip(talkative()(IMAGES), IMAGES, strict=True):
        height, width = image.shape[1:]
        count = len(found["scores"])
        assert set(found) == {"boxes", "labels", "scores", "masks"}
        assert 0 < count <= 100
        assert found["labels"].dtype == torch.int64
        assert set(found["labels"].tolist()) <= {0, 1, 2}
        assert found["masks"].shape == (count, 1, height, width)
        assert found["masks"].min() >= 0
        assert found["masks"].max() <= 1
        assert (found["scores"].diff() <= 0).all()
        rows, columns = torch.arange(height), torch.arange(width)
        for box, mask in zip(found["boxes"], found["masks"][:, 0] > 0.5, strict=True):
            x0, y0, x1, y1 = box.tolist()
            assert mask.any(0).nonzero()[[0, -1], 0].tolist() == [x0, x1 - 1]
            assert mask.any(1).nonzero()[[0, -1], 0].tolist() == [y0, y1 - 1]
            assert not (mask & ~box_masks(box[None] - torch.tensor([0, 0, 1, 1]), rows, columns)[0]).any()


def test_an_image_where_nothing_is_found_has_empty_detections():
    (found,) = tiny().eval()(IMAGES[:1])
    assert [tuple(found[key].shape) for key in ("boxes", "labels", "scores", "masks")] == [
        (0, 4),
        (0,),
        (0,),
        (0, 1, 64, 96),
    ]


def test_an_untrained_teacher_proposes_candidates_with_boxes_round_their_masks():
    model = tiny().eval()
    with torch.no_grad():
        candidates = model.forward_teacher(IMAGES)
        everything = candidates.own_masks(torch.arange(len(candidates.scores)))
        some = torch.tensor([5, 0, 3])
        assert_close(candidates.own_masks(some), everything[some])
        none = candidates.own_masks(torch.zeros(0, dtype=torch.int64))
    counts = candidates.image_index.bincount()
    assert (counts > 0).all()
    assert (counts <= 100).all()
    assert everything.shape[1:] == none.shape[1:] == (16, 24)
    assert len(none) == 0
    assert ((candidates.scores > 0) & (candidates.scores <= 1)).all()
    limit = torch.tensor([[96, 64], [71, 57]])[candidates.image_index]
    assert (candidates.boxes[:, :2] >= 0).all()
    assert (candidates.boxes[:, 2:] <= limit).all()
    assert (candidates.boxes[:, 2:] > candidates.boxes[:, :2]).all()


def test_the_order_of_a_batch_does_not_matter():
    images = seeded_images((64, 96), (57, 71), (80, 64))
    model = talkative()
    for ours, theirs in zip(model(images)[::-1], model(images[::-1]), strict=True):
        assert_close(theirs["scores"][:20], ours["scores"][:20], rtol=1e-3, atol=1e-4)
        assert_close(theirs["masks"][:5], ours["masks"][:5], rtol=1e-3, atol=1e-3)


def test_a_plain_call_in_training_mode_says_how_to_train():
    with pytest.raises(InputError, match="wrap it"):
        tiny().train()(IMAGES)


def test_a_copy_is_independent_and_a_state_makes_the_same_network():
    model = talkative()
    twin = copy.deepcopy(model).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    before = model(IMAGES)
    with torch.no_grad():
        model.fpn.layer_blocks[0][0].weight.zero_()
    for network in (twin, other.eval()):
        for ours, theirs in zip(network(IMAGES), before, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_small_images_get_the_small_network():
    small, large = (build_solov2(3, backbone="resnet18", weights="none", image_size=s) for s in (256, 513))
    assert small.fpn.inner_blocks[0][0].out_channels == 128
    assert small.size_ranges[0] == (1 * 256 / 1333, 96 * 256 / 1333)
    assert (large.fpn.inner_blocks[0][0].out_channels, large.size_ranges) == (256, SIZE_RANGES)
    for model in (small, large):
        assert torch.allclose(model.head.category.bias.sigmoid(), torch.full((3,), 0.01))


def test_a_disc_is_learnt_from_its_box():
    assert_learns_a_disc(tiny(), steps=70, warmup_steps=60, lr=1e-3)
