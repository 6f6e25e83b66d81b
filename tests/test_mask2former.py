"""Mask2Former: its place under every supervision, its detections, what it learns."""

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, MaskSupervised, PseudoMaskProvider
from boxteacher.errors import InputError
from boxteacher_adapters.mask2former import build_mask2former
from tests.disc_support import assert_learns_a_disc
from tests.mask2former_support import tiny, with_masks
from tests.support import seeded_images, target

SUPERVISIONS = [BoxTeacher, BoxSupervised, MaskSupervised]
IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def test_it_follows_the_protocol():
    assert isinstance(tiny(), PseudoMaskProvider)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_trained_parameter_gets_a_gradient(supervision):
    model = supervision(tiny(spatial_prior=True)).train()
    # Ellipses do not depend on queries at first.
    torch.nn.init.normal_(model.student.decoder.prior.offsets[-1].weight, std=0.1)
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
        every = predictions.mask_logits(features)
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
        logits = candidates.own_masks(torch.arange(12))
        assert_close(candidates.own_masks(some), logits[some])
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
    assert sizes == [(100, 128, 3, 3), (100, 256, 6, 9)]
    assert all(network.decoder.prior is not None for network in (small, large))


@pytest.mark.parametrize("spatial_prior", [False, True])
def test_a_disc_is_learnt_from_its_box(spatial_prior):
    assert_learns_a_disc(tiny(spatial_prior=spatial_prior), steps=40, warmup_steps=30, lr=1e-3)
