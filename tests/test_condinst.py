"""CondInst: its parts against loops and closed forms, and a tiny one under every supervision."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import box_iou

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised, PseudoMaskProvider
from boxteacher_adapters.condinst import CondInst, DynamicMaskHead, build_condinst
from boxteacher_adapters.fcos import (
    DensePredictions,
    DenseTargets,
    Locations,
    centerness_of,
    fcos_losses,
    giou_loss,
    match_locations,
    pyramid_locations,
    select_detections,
)
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.grouping import rank_in_group
from boxteacher_adapters.parts.resampling import upsample_aligned
from tests.support import filled, seeded_images, target

SIZES = (32, 64, 128, 256)
SUPERVISIONS = [BoxTeacher, BoxSupervised, MaskSupervised]


def tiny(seed: int = 0, max_samples: int = 64) -> CondInst:
    torch.manual_seed(seed)
    backbone = build_backbone("resnet18", "none")
    return CondInst(
        backbone,
        3,
        channels=64,  # two values per group norm's group even on a map of one cell
        num_convs=1,
        mask_channels=16,
        level_sizes=SIZES,
        max_samples=max_samples,
    )


def talkative(seed: int = 0) -> CondInst:
    """An untrained network that finds things nonetheless, of different classes, sizes and scores."""
    model = tiny(seed)
    head = model.box_head
    with torch.no_grad():
        head.class_logits.bias.fill_(-1.0)
        head.distances.bias.fill_(1.5)
        for conv in (head.class_logits, head.distances, head.centerness, head.controller):
            conv.weight.normal_(std=0.1)
    return model.eval()


IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


def with_masks(targets: list[dict], images: list[Tensor]) -> list[dict]:
    return [
        {**t, "masks": torch.stack([filled(b, *i.shape[1:]) for b in t["boxes"].int().tolist()])}
        for t, i in zip(targets, images, strict=True)
    ]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# Parts.


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


def test_locations_are_the_middles_of_the_cells():
    pyramid = [torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 2)]
    locations = pyramid_locations(pyramid, (8, 16))
    fine = [[8 * j + 4, 8 * i + 4] for i in range(3) for j in range(4)]
    coarse = [[8, 8], [24, 8], [8, 24], [24, 24]]
    assert locations.centers.tolist() == fine + coarse
    assert locations.level.tolist() == [0] * 12 + [1] * 4
    assert locations.stride.tolist() == [8] * 12 + [16] * 4
    assert locations.counts == (12, 4)


def small_pyramid() -> Locations:
    return pyramid_locations([torch.zeros(1, 1, 64 // s, 96 // s) for s in (8, 16, 32)], (8, 16, 32))


corner = st.tuples(st.integers(0, 80), st.integers(0, 50), st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(corner, max_size=4), min_size=1, max_size=3), st.sampled_from([(16, 32), (32, 64)]))
@example([[(0, 0, 32, 32)]], (32, 64))  # locations just as far from the centre as is too far
def test_locations_are_matched_as_by_a_loop(rows, sizes):
    boxes = [[(x, y, min(x + w, 96), min(y + h, 64)) for x, y, w, h in image] for image in rows]
    locations = small_pyramid()
    targets = [target(*image) for image in boxes]
    for t in targets:
        t["labels"] = torch.arange(len(t["boxes"])) % 3
    matched = match_locations(locations, targets, sizes, 3)
    first = 0
    for b, image in enumerate(boxes):
        for i, (x, y) in enumerate(locations.centers.tolist()):
            level, stride = int(locations.level[i]), float(locations.stride[i])
            lower, upper = [-1, *sizes][level], [*sizes, math.inf][level]
            fitting = []
            for n, (x0, y0, x1, y1) in enumerate(image):
                sides = (x - x0, y - y0, x1 - x, y1 - y)
                near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
                if min(sides) > 0 and near and lower <= max(sides) <= upper:
                    fitting.append(((x1 - x0) * (y1 - y0), n, sides))
            if not fitting:
                assert matched.target_index[b, i] == -1
                assert matched.labels[b, i] == 3
                continue
            _, n, sides = min(fitting)
            assert matched.target_index[b, i] == first + n
            assert matched.labels[b, i] == n % 3
            assert matched.distances[b, i].tolist() == pytest.approx([side / stride for side in sides])
        first += len(image)


def test_centerness_is_one_in_the_middle_and_known_elsewhere():
    distances = torch.tensor([[2.0, 3, 2, 3], [1, 1, 3, 1], [1, 2, 4, 8], [9, 1, 1, 9]])
    assert_close(centerness_of(distances), torch.tensor([1, (1 / 3) ** 0.5, 0.25, 1 / 9]))


def test_box_loss_of_equal_of_empty_and_of_crossing_boxes():
    wanted = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [3, 1, 3, 1]])
    found = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [1, 3, 1, 3]])
    crossing = 1 - (4 + 1) / (20 + 1) + (36 - 20) / 36  # 6 × 2 across 2 × 6
    assert_close(giou_loss(found, wanted), torch.tensor([0, 1 - 1 / 25, crossing]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_box_loss_is_the_generalised_iou_of_large_boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    found, wanted = (1000 * (torch.rand(5, 4, generator=generator) + 0.1) for _ in range(2))
    a, b = (torch.cat([-d[:, :2], d[:, 2:]], 1) for d in (found, wanted))
    iou = box_iou(a, b).diagonal()
    hull = (torch.maximum(a, b)[:, 2:] - torch.minimum(a, b)[:, :2]).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    union = union / (1 + iou)
    # The stride that is added to both areas is 1e-5 of them.
    assert_close(giou_loss(found, wanted), 1 - iou + 1 - union / hull, rtol=1e-4, atol=1e-4)


def test_box_loss_of_points_has_a_finite_gradient():
    found = torch.zeros(2, 4, requires_grad=True)
    giou_loss(found, torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]])).sum().backward()
    assert torch.isfinite(found.grad).all()


def perfect(matched: DenseTargets, classes: int) -> DensePredictions:
    logits = F.one_hot(matched.labels, classes + 1)[..., :classes].float() * 60 - 30
    positive = matched.target_index >= 0
    distances = torch.where(positive[..., None], matched.distances, 1.0)
    centerness = torch.where(positive, centerness_of(distances.flatten(0, 1)).view_as(positive.float()), 0.5)
    return DensePredictions(logits, distances, centerness.logit(), torch.zeros(*positive.shape, 1))


def test_perfect_predictions_have_no_loss_but_centerness_s_entropy():
    matched = match_locations(small_pyramid(), TARGETS, (16, 32), 3)
    predictions = perfect(matched, 3)
    losses = fcos_losses(predictions, matched)
    positive = matched.target_index >= 0
    assert positive.sum() > 5
    assert losses["loss_classification"] < 1e-6
    assert abs(losses["loss_box"]) < 1e-6
    p = predictions.centerness[positive].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).clamp(min=1e-12).log()).mean()
    assert_close(losses["loss_centerness"], entropy, rtol=1e-4, atol=1e-5)


def test_perfect_predictions_are_found_again():
    locations = small_pyramid()
    matched = match_locations(locations, TARGETS, (16, 32), 3)
    found = select_detections(perfect(matched, 3), locations, [(64, 96), (64, 96)])
    assert sorted(found.image_index.tolist()) == [0, 0, 1]
    assert_close(found.boxes[found.image_index == 1], TARGETS[1]["boxes"])
    first = found.boxes[found.image_index == 0]
    assert_close(first[first[:, 0].argsort()], TARGETS[0]["boxes"])
    assert torch.equal(
        matched.target_index[found.image_index, found.location] >= 0, torch.ones(3, dtype=torch.bool)
    )


def test_the_same_object_in_two_images_is_found_in_both_and_two_classes_do_not_hide_each_other():
    locations = small_pyramid()
    matched = match_locations(locations, [TARGETS[1], TARGETS[1]], (16, 32), 3)
    predictions = perfect(matched, 3)
    found = select_detections(predictions, locations, [(64, 96), (64, 96)])
    assert found.image_index.tolist() == [0, 1]
    predictions.class_logits[..., 2] = predictions.class_logits[..., 0]
    found = select_detections(predictions, locations, [(64, 96), (64, 96)])
    assert sorted(zip(found.image_index.tolist(), found.labels.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 2),
    ]


def test_detections_are_few_good_first_and_no_duplicates():
    torch.manual_seed(0)
    locations = small_pyramid()
    count = len(locations.centers)
    predictions = DensePredictions(
        torch.randn(2, count, 3), 3 * torch.rand(2, count, 4), torch.randn(2, count), torch.zeros(2, count, 1)
    )
    found = select_detections(predictions, locations, [(64, 96), (40, 50)])
    for image, (height, width) in enumerate([(64, 96), (40, 50)]):
        mine = found.image_index == image
        scores, boxes, labels = found.scores[mine], found.boxes[mine], found.labels[mine]
        assert 0 < len(scores) <= 100
        assert (scores.diff() <= 0).all()
        same_class = labels[:, None] == labels
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        whole = (boxes[:, 0::2] < width).all(1) & (boxes[:, 1::2] < height).all(1) & (boxes > 0).all(1)
        overlap = box_iou(boxes, boxes).fill_diagonal_(0) * same_class * (whole[:, None] & whole)
        assert overlap.max() <= 0.6 + 1e-6  # boxes that the image cut were compared whole
        assert boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width
        assert boxes[:, 1::2].max() <= height
        assert set(labels.tolist()) <= {0, 1, 2}
    assert (found.image_index.diff() >= 0).all()


def test_the_mask_head_is_a_convolution_per_instance():
    torch.manual_seed(0)
    head = DynamicMaskHead(5, sizes=(64, 128), stride=8, channels=4)
    features, params = torch.randn(2, 5, 6, 7), torch.randn(3, head.num_params)
    image, level = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    centers = torch.tensor([[20.0, 12.0], [4.0, 44.0], [52.0, 4.0]])
    logits = head(features, params, image, centers, level)
    assert logits.shape == (3, 1, 6, 7)
    assert head.num_params == 7 * 4 + 4 * 4 + 4 + 4 + 4 + 1
    ys, xs = torch.meshgrid(torch.arange(6) * 8 + 4, torch.arange(7) * 8 + 4, indexing="ij")
    for m in range(3):
        size = (64, 128)[level[m]]
        offset = torch.stack([centers[m, 0] - xs, centers[m, 1] - ys]) / size
        x = torch.cat([offset, features[image[m]]])[None]
        w1, w2, w3, b1, b2, b3 = params[m].split([28, 16, 4, 4, 4, 1])
        x = F.relu(F.conv2d(x, w1.view(4, 7, 1, 1), b1))
        x = F.relu(F.conv2d(x, w2.view(4, 4, 1, 1), b2))
        x = F.conv2d(x, w3.view(1, 4, 1, 1), b3)
        assert_close(logits[m], x[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=12, max_size=12), min_size=2, max_size=2),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_too_many_positives_are_cut_fairly(rows, max_samples, seed):
    """Each target of a crowded image keeps the same number of its best locations."""
    model = CondInst.__new__(CondInst)
    nn.Module.__init__(model)
    model.max_samples = max_samples
    # Image 1's targets come after the four of image 0.
    index = torch.tensor([rows[0], [n + 4 if n >= 0 else -1 for n in rows[1]]])
    generator = torch.Generator().manual_seed(seed)
    logits, center = torch.randn(2, 12, 3, generator=generator), torch.randn(2, 12, generator=generator)
    predictions = DensePredictions(logits, torch.ones(2, 12, 4), center, torch.zeros(2, 12, 1))
    image, location = model._samples(predictions, DenseTargets(index, index, torch.ones(2, 12, 4)))
    kept = set(zip(image.tolist(), location.tolist(), strict=True))
    assert len(kept) == len(image)
    score = logits.sigmoid().amax(2) * center.sigmoid()
    for b in range(2):
        positives = [i for i in range(12) if index[b, i] >= 0]
        targets = {int(index[b, i]) for i in positives}
        share = max(1, max_samples // len(targets)) if len(positives) > max_samples else 12
        expected = set()
        for n in targets:
            mine = sorted((i for i in positives if index[b, i] == n), key=lambda i: -score[b, i])
            expected |= {(b, i) for i in mine[:share]}
        assert {pair for pair in kept if pair[0] == b} == expected


# The whole network.


def test_it_follows_the_protocol():
    assert isinstance(tiny(), PseudoMaskProvider)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_trained_parameter_gets_a_gradient(supervision):
    model = supervision(tiny()).train()
    if supervision is BoxTeacher:
        model.teacher.load_state_dict(talkative().state_dict())
    total(model(IMAGES, with_masks(TARGETS, IMAGES))).backward()
    silent = [
        name
        for name, p in model.student.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any())
    ]
    # P6 and P7 are there for objects larger than these images; only their background is seen.
    assert silent == [name for name in silent if name == "box_head.scales"]
    if supervision is BoxTeacher:
        assert all(p.grad is None for p in model.teacher.parameters())
        assert (model.last_pseudo_masks.confidence == 1).all()


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("sizes", [[(64, 64)], [(33, 95), (96, 40)], [(65, 33), (64, 64), (50, 90)]])
def test_odd_and_mixed_sizes_train(supervision, sizes):
    images = seeded_images(*sizes)
    targets = with_masks([target((3, 3, 28, 30)) for _ in sizes], images)
    losses = supervision(tiny()).train()(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_box"] > 0


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_images_without_boxes_train(supervision, empty):
    targets = [target() if i in empty else t for i, t in enumerate(TARGETS)]
    model = supervision(tiny()).train()
    losses = model(IMAGES, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters() if p.grad is not None)
    masks = [loss for name, loss in losses.items() if name in ("loss_projection", "loss_pairwise")]
    if len(empty) == 2:
        assert all(loss == 0 for loss in masks)


def test_detections_are_torchvision_s():
    model = talkative()
    detections = model(IMAGES)
    assert len(detections) == 2
    for found, image in zip(detections, IMAGES, strict=True):
        height, width = image.shape[1:]
        count = len(found["scores"])
        assert set(found) == {"boxes", "labels", "scores", "masks"}
        assert 0 < count <= 100
        assert found["boxes"].shape == (count, 4)
        assert found["labels"].shape == (count,)
        assert found["labels"].dtype == torch.int64
        assert set(found["labels"].tolist()) <= {0, 1, 2}
        assert found["masks"].shape == (count, 1, height, width)
        assert found["masks"].min() >= 0
        assert found["masks"].max() <= 1
        assert (found["scores"].diff() <= 0).all()
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 0::2].max() <= width
        assert found["boxes"][:, 1::2].max() <= height
        assert (found["boxes"][:, :2] <= found["boxes"][:, 2:]).all()


def test_an_image_where_nothing_is_found_has_empty_detections():
    (found,) = tiny().eval()(IMAGES[:1])
    assert [tuple(found[key].shape) for key in ("boxes", "labels", "scores", "masks")] == [
        (0, 4),
        (0,),
        (0,),
        (0, 1, 64, 96),
    ]


def test_the_order_of_a_batch_does_not_matter():
    images = seeded_images((64, 96), (57, 71), (80, 64))
    model = talkative()
    for ours, theirs in zip(model(images)[::-1], model(images[::-1]), strict=True):
        for key in ours:  # far down the list, scores differ by less than rounding
            assert_close(theirs[key][:20], ours[key][:20], rtol=1e-3, atol=1e-4)


def test_candidates_are_the_detections_and_their_masks_decode_in_any_order():
    model = talkative()
    with torch.no_grad():
        candidates = model.forward_teacher(IMAGES)
        everything = candidates.decode_masks(torch.arange(len(candidates.scores)))
        some = torch.tensor([5, 0, 3])
        assert_close(candidates.decode_masks(some), everything[some])
        none = candidates.decode_masks(torch.zeros(0, dtype=torch.int64))
    assert everything.shape[1:] == none.shape[1:] == (16, 24)
    assert len(none) == 0
    detections = model(IMAGES)
    for i, found in enumerate(detections):
        mine = candidates.boxes[candidates.image_index == i]
        assert {tuple(box) for box in mine.tolist()} == {tuple(box) for box in found["boxes"].tolist()}


def test_a_plain_call_in_training_mode_says_how_to_train():
    with pytest.raises(InputError, match="wrap it"):
        tiny().train()(IMAGES)


def test_the_number_of_masks_is_bounded_per_image():
    model = tiny(max_samples=4).train()
    output = model.forward_student(IMAGES, TARGETS)
    counts = output.masks[0].target_index.bincount(minlength=3)
    assert counts.tolist() == [2, 2, 4]
    assert output.masks[0].logits.shape == (8, 16, 24)


def test_a_copy_is_independent_and_a_state_makes_the_same_network():
    model = talkative()
    twin = copy.deepcopy(model).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = model(IMAGES)
    with torch.no_grad():
        model.fpn.layer_blocks[0][0].weight.zero_()
    for network in (twin, other.eval()):
        for ours, theirs in zip(network(IMAGES), expected, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_seed_determines_network_and_training():
    def run() -> tuple[list[float], Tensor]:
        model = BoxTeacher(tiny(seed=5)).train()
        optimizer = torch.optim.SGD(model.student.parameters(), lr=0.01)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = total(model(IMAGES, TARGETS))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, torch.cat([p.detach().flatten() for p in model.teacher.parameters()])

    first, second = run(), run()
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_small_images_get_the_small_heads():
    small, large = (build_condinst(3, backbone="resnet18", weights="none", image_size=s) for s in (512, 513))
    assert (small.fpn.inner_blocks[0][0].out_channels, small.level_sizes) == (128, (32, 64, 128, 256))
    assert (large.fpn.inner_blocks[0][0].out_channels, large.level_sizes) == (256, (64, 128, 256, 512))
    for model in (small, large):
        assert len(model.box_head.class_logits.bias) == 3
        assert torch.allclose(model.box_head.class_logits.bias.sigmoid(), torch.tensor(0.01))


def mirrored(boxes: dict, width: int = 96) -> dict:
    x0, y0, x1, y1 = boxes["boxes"].unbind(1)
    return {**boxes, "boxes": torch.stack([width - x1, y0, width - x0, y1], 1)}


def test_a_disc_is_learnt_from_its_box():
    """A mask that is just the box would overlap the disc by π / 4."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    disc = (x - 36).square() + (y - 34).square() < 20**2
    colours = ((0.9, 0.2), (0.5, 0.4), (0.1, 0.6))
    image = torch.stack([torch.where(disc, bright, dark) for bright, dark in colours])
    box = target((16.0, 14.0, 57.0, 55.0))
    model = BoxTeacher(tiny(), warmup_steps=60, momentum=0.8).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=5e-4)
    for _ in range(70):
        optimizer.zero_grad()
        total(model([image, image.flip(2)], [box, mirrored(box)])).backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert box_iou(found["boxes"][:1], box["boxes"]) > 0.75
    mask = found["masks"][0, 0] > 0.5
    assert (mask & disc).sum() / (mask | disc).sum() > 0.82
