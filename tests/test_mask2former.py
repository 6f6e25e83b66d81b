"""Mask2Former: its attention, its matching, its place under every supervision, and the weights of another."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from boxteacher import BoxSupervised, BoxTeacher, MaskSupervised, PseudoMaskProvider
from boxteacher.errors import InputError
from boxteacher.targets import grid_targets
from boxteacher_adapters import mask2former_matching as matching
from boxteacher_adapters.mask2former import STRIDES, Mask2Former, build_mask2former
from boxteacher_adapters.mask2former_decoder import MaskedAttentionDecoder, mask_logits
from boxteacher_adapters.mask2former_weights import load_transformers_weights
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.deformable_attention import DeformableAttention
from boxteacher_adapters.parts.pixel_decoder import PixelDecoder, sine_position_embedding
from tests.support import filled, seeded_images, target

SUPERVISIONS = [BoxTeacher, BoxSupervised, MaskSupervised]
IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


def tiny(seed: int = 0, *, queries: int = 6, decoder_layers: int = 3) -> Mask2Former:
    torch.manual_seed(seed)
    backbone = build_backbone("resnet18", "none", strides=STRIDES)
    return Mask2Former(
        backbone, 3, channels=64, num_queries=queries, encoder_layers=1, decoder_layers=decoder_layers
    )


def with_masks(targets: list[dict], images: list[Tensor]) -> list[dict]:
    drawn = []
    for each, image in zip(targets, images, strict=True):
        masks = [filled(box, *image.shape[1:]) for box in each["boxes"].int().tolist()]
        drawn.append({**each, "masks": torch.stack(masks)})
    return drawn


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# Parts.


def test_deformable_attention_is_a_weighted_sum_of_bilinear_samples():
    torch.manual_seed(0)
    attention = DeformableAttention(16, num_levels=2, num_heads=4, num_points=3)
    for layer in (attention.offsets, attention.weights):
        torch.nn.init.normal_(layer.weight, std=0.3)
    sizes = [(3, 4), (6, 8)]
    tokens, queries = torch.randn(2, 12 + 48, 16), torch.randn(2, 5, 16)
    places = torch.rand(5, 2)
    found = attention(queries, places, tokens, sizes)
    offsets = attention.offsets(queries).view(2, 5, 4, 2, 3, 2)
    weights = attention.weights(queries).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 2, 3)
    values = attention.values(tokens).view(2, 60, 4, 4)
    expected = torch.zeros(2, 5, 4, 4)
    for level, (first, (height, width)) in enumerate(zip((0, 12), sizes, strict=True)):
        for b, n, m, k in itertools.product(range(2), range(5), range(4), range(3)):
            dx, dy = offsets[b, n, m, level, k].tolist()
            x, y = places[n, 0].item() * width + dx - 0.5, places[n, 1].item() * height + dy - 0.5
            for i, j in itertools.product(
                (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
            ):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, n, m, level, k]
                    expected[b, n, m] += share * values[b, first + i * width + j, m]
    assert_close(found, attention.output(expected.flatten(2)), rtol=1e-4, atol=1e-5)


def test_heads_look_in_directions_of_their_own_at_first():
    rays = DeformableAttention(64, 3).offsets.bias.view(8, 3, 4, 2)
    assert_close(rays[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), atol=1e-5, rtol=0)
    assert_close(rays[1, 2, 1], torch.tensor([2.0, 2.0]), atol=1e-5, rtol=0)
    assert_close(rays[6, 1, 0], torch.tensor([0.0, -1.0]), atol=1e-5, rtol=0)


def test_positions_are_the_sines_of_row_and_column():
    table = sine_position_embedding(3, 5, 8, torch.device("cpu")).view(3, 5, 8)
    row, column = 2 * math.pi * 2 / 3, 2 * math.pi * 4 / 5
    expected = [f(angle / d) for angle in (row, column) for d in (1, 100) for f in (math.sin, math.cos)]
    assert_close(table[1, 3], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_pixel_decoder_keeps_the_strides():
    decoder = PixelDecoder((8, 16, 24, 40), 64, num_layers=1)
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((8, 16, 24, 40), STRIDES, strict=True)]
    levels, features = decoder(maps)
    assert [tuple(x.shape) for x in levels] == [(2, 64, 2, 3), (2, 64, 4, 6), (2, 64, 8, 12)]
    assert features.shape == (2, 64, 16, 24)


def test_a_query_sees_nothing_outside_its_last_mask():
    torch.manual_seed(0)
    decoder = MaskedAttentionDecoder(64, 3, num_queries=4, num_layers=1).eval()
    levels = [torch.randn(1, 64, 2 * k, 3 * k) for k in (1, 2, 4)]
    features = torch.randn(1, 64, 8, 12)
    first = mask_logits(decoder(levels, features)[0].mask_embeddings, features)
    inside = F.interpolate(first, (2, 3), mode="bilinear") >= 0  # (1, 4, 2, 3)
    cells = itertools.product(range(2), range(3))
    row, column = next((i, j) for i, j in cells if not inside[0, :, i, j].all())
    blind = ~inside[0, :, row, column] & inside[0].flatten(1).any(1)  # (4,)
    assert blind.any()
    # Self-attention would carry news from one query to another; here each hears itself alone.
    torch.nn.init.zeros_(decoder.layers[0].self_attention.out_proj.weight)
    before = decoder(levels, features)[1].mask_embeddings[0]
    levels[0][0, :, row, column] += 3
    changed = (decoder(levels, features)[1].mask_embeddings[0] - before).abs().amax(1) > 1e-4
    assert_close(changed, ~blind)


# Matching.


def two_images(masks: bool = False) -> tuple[matching.MatchingTargets, list[Tensor]]:
    images = seeded_images((64, 64), (64, 64))
    targets = [target((4, 4, 32, 60), (40, 8, 60, 28)), target((16, 16, 60, 40))]
    for each in targets:
        each["labels"] = torch.arange(len(each["boxes"]))
    if masks:
        targets = with_masks(targets, images)
    grid = grid_targets(images, targets, 4, 32)
    return matching.matching_targets(grid, [2, 1], 4, masks), [grid.box_masks[:2], grid.box_masks[2:]]


@pytest.mark.parametrize("masks", [False, True])
def test_the_query_that_draws_a_target_gets_it(masks):
    wanted, drawn = two_images(masks)
    logits = torch.full((2, 5, 16, 16), -6.0)
    for image, (query, n) in [(0, (3, 0)), (0, (1, 1)), (1, (4, 0))]:
        logits[image, query][drawn[image][n]] = 6.0
    cost = matching.matching_cost(torch.zeros(2, 5, 4), logits, wanted)
    assert matching.assign(cost[None], wanted.counts).tolist() == [[3, 1, 4]]


def test_of_two_like_masks_the_right_class_decides():
    wanted, drawn = two_images()
    logits = torch.full((2, 5, 16, 16), -6.0)
    logits[0, 1:3, drawn[0][0]] = 6.0
    classes = torch.zeros(2, 5, 4)
    classes[0, 2, 0] = 1.0
    cost = matching.matching_cost(classes, logits, wanted)
    assert matching.assign(cost[None], wanted.counts)[0, 0] == 2


def test_costs_are_those_of_the_formulas():
    wanted, _ = two_images(masks=True)
    torch.manual_seed(0)
    classes, logits = torch.randn(2, 5, 4), torch.randn(2, 5, 16, 16) * 3
    cost = matching.matching_cost(classes, logits, wanted)
    p, t = logits[0, 3].sigmoid(), wanted.masks[0, 1]
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    pixel = F.binary_cross_entropy_with_logits(logits[0, 3], t)
    probability = classes[0, 3].softmax(0)[1]
    assert_close(cost[0, 3, 1], -2 * probability + 5 * pixel + 5 * dice)

    blank = matching.matching_cost(
        classes, torch.full_like(logits, -6.0).index_fill(3, torch.arange(8), 6.0), two_images()[0]
    )
    # The left half of the canvas, against a box from 40 to 60 and from 8 to 28 of 64 pixels.
    l1 = (40 + 8 + 28 + 36) / 64
    p = torch.tensor(6.0).sigmoid()
    # Of the grid's pixels 2, 6, 10, …, five lie in the box on each axis.
    columns = 1 - (2 * 5 * (1 - p) + 1) / (8 * p + 8 * (1 - p) + 5 + 1)
    rows = 1 - (2 * 5 * p + 1) / (16 * p + 5 + 1)
    assert_close(blank[0, 3, 1], -2 * probability + 5 * l1 + 5 * (columns + rows))


def test_targets_without_a_drawn_mask_are_matched_by_their_box():
    images, boxes = seeded_images((64, 64)), target((4, 4, 32, 60), (40, 8, 60, 28))
    (drawn,) = with_masks([boxes], images)
    drawn["has_mask"] = torch.tensor([True, False])
    costs = []
    torch.manual_seed(0)
    classes, logits = torch.randn(1, 5, 4), torch.randn(1, 5, 16, 16)
    for each, masks in ((drawn, True), (boxes, False), ({**drawn, "has_mask": torch.ones(2).bool()}, True)):
        grid = grid_targets(images, [each], 4, 32)
        wanted = matching.matching_targets(grid, [2], 4, masks)
        costs.append(matching.matching_cost(classes, logits, wanted)[0])
    mixed, box, mask = costs
    assert_close(mixed[:, 1], box[:, 1])
    assert_close(mixed[:, 0], mask[:, 0])
    assert not torch.allclose(box, mask)


def test_the_assignment_costs_least():
    torch.manual_seed(0)
    costs = torch.randn(2, 3, 5, 3)
    counts = (3, 0, 2)
    found = matching.assign(costs, counts)
    assert found.shape == (2, 5)
    for r in range(2):
        for b, mine in ((0, found[r, :3]), (2, found[r, 3:])):
            n = len(mine)
            best = min(
                sum(costs[r, b, q, i].item() for i, q in enumerate(choice))
                for choice in itertools.permutations(range(5), n)
            )
            assert len(set(mine.tolist())) == n
            assert costs[r, b, mine, torch.arange(n)].sum().item() == pytest.approx(best, rel=1e-5)


def test_a_diverged_network_is_left_for_its_loss_to_tell():
    assert matching.assign(torch.full((1, 1, 4, 2), math.nan), (2,)).shape == (1, 2)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(matching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install boxteacher\[mask2former\]"):
        matching.assign(torch.zeros(1, 1, 4, 2), (2,))


def test_an_extent_is_the_mask_s_box():
    mask = filled((3, 2, 9, 7), 12, 10)
    masks = torch.stack([mask, torch.zeros_like(mask)])
    assert matching.mask_extent(masks.any(2), masks.any(1)).tolist() == [[3, 2, 9, 7], [0, 0, 0, 0]]


# The whole network.


def test_it_follows_the_protocol():
    assert isinstance(tiny(), PseudoMaskProvider)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_trained_parameter_gets_a_gradient(supervision):
    model = supervision(tiny()).train()
    total(model(IMAGES, with_masks(TARGETS, IMAGES))).backward()
    silent = [
        name
        for name, p in model.student.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any())
    ]
    # At first, where deformable attention looks does not depend on who asks.
    assert silent == ["pixel_decoder.level_embedding"]
    if supervision is BoxTeacher:
        assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("sizes", [[(20, 9), (5, 31)], [(33, 95), (96, 40)]])
def test_odd_mixed_and_small_sizes_train(supervision, sizes):
    images = seeded_images(*sizes)
    targets = with_masks([target((1, 1, 8, 8), (3, 3, 3, 3)) for _ in sizes], images)
    losses = supervision(tiny()).train()(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_boxes_train(supervision, empty):
    targets = [target() if i in empty else t for i, t in enumerate(TARGETS)]
    model = supervision(tiny()).train()
    losses = model(IMAGES, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters() if p.grad is not None)


def test_more_boxes_than_queries_are_refused_by_name():
    with pytest.raises(InputError, match="target 0 has 2 boxes, but Mask2Former has 1 queries"):
        tiny(queries=1).train().forward_student(IMAGES, TARGETS)


def test_labels_out_of_range_are_refused():
    with pytest.raises(InputError, match="labels reach from 0 to 3"):
        tiny().train().forward_student(IMAGES, [{**TARGETS[0], "labels": torch.tensor([0, 3])}, TARGETS[1]])


def test_each_round_has_one_mask_per_target_that_its_query_drew():
    model = tiny().train()
    output = model.forward_student(IMAGES, TARGETS)
    assert len(output.masks) == 4
    with torch.no_grad():
        rounds, features = model._predict(IMAGES)
    image = [0, 0, 1]
    for each, predictions in zip(output.masks, rounds, strict=True):
        assert each.target_index.tolist() == [0, 1, 2]
        assert each.logits.shape == (3, 16, 24)
        every = mask_logits(predictions.mask_embeddings, features)
        for t in range(3):
            apart = (every[image[t]] - each.logits[t]).abs().amax((1, 2))
            assert apart.min() < 1e-3 < apart.sort()[0][1]
        assert not (each.logits[0] == each.logits[1]).all()


def test_the_class_loss_is_the_weighted_mean_of_its_rounds(monkeypatch):
    model = tiny().train()
    queries = torch.tensor([[4, 0, 2], [1, 2, 3], [0, 1, 5], [3, 4, 4]])
    monkeypatch.setattr("boxteacher_adapters.mask2former.assign", lambda costs, counts: queries)
    targets = [{**TARGETS[0], "labels": torch.tensor([2, 1])}, TARGETS[1]]
    loss = model.forward_student(IMAGES, targets).losses["loss_classification"]
    rounds, _ = model._predict(IMAGES)
    expected = []
    for predictions, mine in zip(rounds, queries.tolist(), strict=True):
        wanted = torch.full((2, 6), 3)
        wanted[0, mine[0]], wanted[0, mine[1]], wanted[1, mine[2]] = 2, 1, 0
        weight = torch.tensor([1, 1, 1, 0.1])[wanted]
        nll = -predictions.class_logits.log_softmax(2).gather(2, wanted[:, :, None])[:, :, 0]
        expected.append((nll * weight).sum() / weight.sum())
    assert_close(loss, 2 * torch.stack(expected).mean(), rtol=1e-3, atol=1e-4)


def test_detections_are_torchvision_s():
    for found, image in zip(tiny().eval()(IMAGES), IMAGES, strict=True):
        height, width = image.shape[1:]
        count = len(found["scores"])
        assert set(found) == {"boxes", "labels", "scores", "masks"}
        assert 0 < count <= 18
        assert found["labels"].dtype == torch.int64
        assert set(found["labels"].tolist()) <= {0, 1, 2}
        assert found["masks"].shape == (count, 1, height, width)
        assert (found["scores"].diff() <= 0).all()
        for box, mask in zip(found["boxes"].int().tolist(), found["masks"][:, 0] > 0.5, strict=True):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_scores_are_class_times_mean_mask_probability():
    model = tiny().eval()
    (found,) = model(IMAGES[:1])
    classes, _ = model._final(IMAGES[:1])
    own = found["masks"][:, 0]
    quality = torch.stack([m[m > 0.5].mean() for m in own])
    probability = classes[0].softmax(1)[:, :3].flatten()
    for score, label in zip((found["scores"] / quality).tolist(), found["labels"].tolist(), strict=True):
        assert (probability[label::3] - score).abs().min() < 1e-4


def test_candidates_are_the_queries_with_boxes_round_their_masks():
    model = tiny().eval()
    with torch.no_grad():
        candidates = model.forward_teacher(IMAGES)
        some = torch.tensor([7, 0, 3])
        logits = candidates.decode_masks(torch.arange(12))
        assert_close(candidates.decode_masks(some), logits[some])
    assert candidates.image_index.tolist() == [0] * 6 + [1] * 6
    assert logits.shape == (12, 16, 24)
    checked = 0
    for image, logit, box in zip(candidates.image_index.tolist(), logits, candidates.boxes, strict=True):
        height, width = IMAGES[image].shape[1:]
        mask = (logit > 0).repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
        if mask.any():
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            checked += 1
    assert checked > 4


def test_a_plain_call_in_training_mode_says_how_to_train():
    with pytest.raises(InputError, match="wrap it"):
        tiny().train()(IMAGES)


def test_a_copy_is_independent_and_a_state_makes_the_same_network():
    model = tiny().eval()
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(seed=1).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = model(IMAGES)
    torch.nn.init.zeros_(model.decoder.query_features)
    for network in (twin, other):
        for ours, theirs in zip(network(IMAGES), expected, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_small_images_get_the_small_network():
    small, large = (
        build_mask2former(3, backbone="resnet18", weights="none", image_size=s) for s in (512, 513)
    )
    sizes = [
        (*m.decoder.query_features.shape, len(m.pixel_decoder.layers), len(m.decoder.layers))
        for m in (small, large)
    ]
    assert sizes == [(30, 128, 3, 3), (100, 256, 6, 9)]


def test_a_disc_is_learnt_from_its_box():
    """A mask that is just the box would overlap the disc by π / 4."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    disc = (x - 36).square() + (y - 34).square() < 20**2
    colours = ((0.9, 0.2), (0.5, 0.4), (0.1, 0.6))
    image = torch.stack([torch.where(disc, bright, dark) for bright, dark in colours])
    box, mirrored = target((16.0, 14.0, 57.0, 55.0)), target((39.0, 14.0, 80.0, 55.0))
    model = BoxTeacher(tiny(), warmup_steps=30, momentum=0.8).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        total(model([image, image.flip(2)], [box, mirrored])).backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert box_iou(found["boxes"][:1], box["boxes"]) > 0.75
    mask = found["masks"][0, 0] > 0.5
    assert (mask & disc).sum() / (mask | disc).sum() > 0.82


# Another's weights.


def reference_network():
    transformers = pytest.importorskip(
        "transformers",
        reason="transformers, the reference that Mask2Former is compared with, is not installed",
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        decoder_layers=5,
        encoder_feedforward_dim=256,
        dim_feedforward=512,
        num_queries=7,
        num_labels=3,
    )
    torch.manual_seed(0)
    network = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for parameter in network.parameters():  # many begin as 0 or 1, which would hide a wrong name
        parameter.data.add_(torch.randn_like(parameter) * 0.03)
    return network


def empty_counterpart(**changes: int) -> Mask2Former:
    torch.manual_seed(1)
    sizes = {"channels": 64, "num_queries": 7, "encoder_layers": 2, "decoder_layers": 4, **changes}
    return Mask2Former(build_backbone("resnet18", "none", strides=STRIDES), 3, **sizes).eval()


def test_the_same_weights_give_transformers_logits():
    network, model = reference_network(), empty_counterpart()
    load_transformers_weights(model, network.state_dict())
    images = seeded_images((96, 128), (96, 128))
    with torch.no_grad():
        pixels = torch.stack([model.backbone.normalize(image) for image in images])
        expected = network(pixel_values=pixels, output_auxiliary_logits=True)
        rounds, features = model._predict(images)
    theirs = [
        (each["class_queries_logits"], each["masks_queries_logits"]) for each in expected.auxiliary_logits
    ]
    theirs.append((expected.class_queries_logits, expected.masks_queries_logits))
    assert len(rounds) == len(theirs) == 5
    for ours, (classes, masks) in zip(rounds, theirs, strict=True):
        assert_close(ours.class_logits, classes, rtol=0, atol=1e-4)
        assert_close(mask_logits(ours.mask_embeddings, features), masks, rtol=0, atol=1e-4)
        assert masks.abs().max() > 0.1


def test_weights_of_another_size_are_refused_by_name():
    state = reference_network().state_dict()
    with pytest.raises(InputError, match=r"query_features: the model has .5, 64., the weights .7, 64."):
        load_transformers_weights(empty_counterpart(num_queries=5), state)
    with pytest.raises(InputError, match=r"layers\.3.*the model has nothing"):
        load_transformers_weights(empty_counterpart(decoder_layers=3), state)


def test_a_backbone_of_another_kind_is_left_alone():
    state, model = reference_network().state_dict(), empty_counterpart()
    state = {k: v for k, v in state.items() if not k.startswith("model.pixel_level_module.encoder.")}
    before = model.backbone.network.conv1.weight.clone()
    load_transformers_weights(model, state)
    assert torch.equal(model.backbone.network.conv1.weight, before)
    assert_close(model.decoder.class_logits.weight, state["class_predictor.weight"])
