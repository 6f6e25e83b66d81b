"""CondInst: its mask head and sampling against loops, and a tiny one under every supervision."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, InputError, MaskSupervised, PseudoMaskProvider
from boxteacher_adapters.condinst import CondInst, DynamicMaskHead, build_condinst
from boxteacher_adapters.fcos import (
    DensePredictions,
    DenseTargets,
)
from boxteacher_adapters.parts.backbones import build_backbone
from tests.disc_support import assert_learns_a_disc
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


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_one_image_too_small_for_batch_norms_is_refused_with_a_remedy(supervision):
    tiny_image = torch.rand(3, 8, 32)
    with pytest.raises(InputError, match=r"one image of \(8, 32\) pixels .*give two images"):
        supervision(tiny()).train()([tiny_image], [target((1, 1, 7, 7))])
    losses = supervision(tiny()).train()([tiny_image, tiny_image], [target((1, 1, 7, 7))] * 2)
    assert all(loss.isfinite() for loss in losses.values())


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
        everything = candidates.own_masks(torch.arange(len(candidates.scores)))
        some = torch.tensor([5, 0, 3])
        assert_close(candidates.own_masks(some), everything[some])
        none = candidates.own_masks(torch.zeros(0, dtype=torch.int64))
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
    assert_learns_a_disc(tiny(), steps=70, warmup_steps=60, lr=5e-4)
