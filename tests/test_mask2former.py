"""Mask2Former: its losses and masks per decoder layer, its detections and candidates, what it learns."""

import pytest
import torch
from torch.testing import assert_close

from boxteacher.errors import InputError
from boxteacher_adapters.mask2former import Mask2Former, build_mask2former
from tests.disc_support import assert_learns_a_disc
from tests.mask2former_support import tiny
from tests.support import seeded_images, target

IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    return tiny().eval().requires_grad_(False)


def test_more_boxes_than_queries_are_refused_by_name():
    with pytest.raises(InputError, match="target 0 has 2 boxes, but Mask2Former has 1 queries"):
        tiny(queries=1).train().forward_student(IMAGES, TARGETS)


def test_each_decoder_layer_has_one_mask_per_target_which_its_query_predicts(model):
    output = model.forward_student(IMAGES, TARGETS)
    assert len(output.masks) == 4
    layers, features = model._predict(IMAGES)
    image = [0, 0, 1]
    for each, layer in zip(output.masks, layers, strict=True):
        assert each.target_index.tolist() == [0, 1, 2]
        assert each.logits.shape == (3, 16, 24)
        every = layer.mask_logits(features)
        for t in range(3):
            apart = (every[image[t]] - each.logits[t]).abs().amax((1, 2))
            assert apart.min() < 1e-3 < apart.sort()[0][1]
        assert not (each.logits[0] == each.logits[1]).all()


def test_the_class_loss_is_the_weighted_mean_of_the_decoder_layers(model, monkeypatch):
    queries = torch.tensor([[4, 0, 2], [1, 2, 3], [0, 1, 5], [3, 4, 4]])
    monkeypatch.setattr("boxteacher_adapters.mask2former.assign", lambda costs, counts: queries)
    targets = [{**TARGETS[0], "labels": torch.tensor([2, 1])}, TARGETS[1]]
    loss = model.forward_student(IMAGES, targets).losses["loss_classification"]
    layers, _ = model._predict(IMAGES)
    expected = []
    for layer, matched in zip(layers, queries.tolist(), strict=True):
        labels = torch.full((2, 6), 3)
        labels[0, matched[0]], labels[0, matched[1]], labels[1, matched[2]] = 2, 1, 0
        weight = torch.tensor([1, 1, 1, 0.1])[labels]
        nll = -layer.class_logits.log_softmax(2).gather(2, labels[:, :, None])[:, :, 0]
        expected.append((nll * weight).sum() / weight.sum())
    assert_close(loss, 2 * torch.stack(expected).mean(), rtol=1e-3, atol=1e-4)


def test_detections_have_tight_boxes_and_come_best_first(model):
    for found in model(IMAGES):
        assert 0 < len(found["scores"]) <= 18
        assert (found["scores"].diff() <= 0).all()
        for box, mask in zip(found["boxes"].int().tolist(), found["masks"][:, 0] > 0.5, strict=True):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_scores_are_class_times_mean_mask_probability(model):
    (found,) = model(IMAGES[:1])
    classes, _ = model._last_layer(IMAGES[:1])
    own = found["masks"][:, 0]
    quality = torch.stack([m[m > 0.5].mean() for m in own])
    probability = classes[0].softmax(1)[:, :3].flatten()
    for score, label in zip((found["scores"] / quality).tolist(), found["labels"].tolist(), strict=True):
        assert (probability[label::3] - score).abs().min() < 1e-4


def test_candidates_are_the_queries_with_boxes_round_their_masks(model):
    candidates = model.forward_teacher(IMAGES)
    logits = candidates.own_masks(torch.arange(12))
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


def test_small_images_get_the_small_network():
    small, large = (
        build_mask2former(3, backbone="resnet18", weights="none", image_size=size) for size in (512, 513)
    )
    sizes = [
        (*m.decoder.query_features.shape, len(m.pixel_decoder.layers), len(m.decoder.layers))
        for m in (small, large)
    ]
    assert sizes == [(100, 128, 3, 3), (100, 256, 6, 9)]
    assert all(network.decoder.prior is not None for network in (small, large))


@pytest.mark.parametrize("spatial_prior", [False, True])
@pytest.mark.slow
def test_a_disc_is_learned_from_its_box(spatial_prior):
    assert_learns_a_disc(tiny(spatial_prior=spatial_prior), steps=40, warmup_steps=30, lr=1e-3)
