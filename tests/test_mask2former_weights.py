"""The weights of `transformers`' Mask2Former give its logits here."""

import pytest
import torch
from torch.testing import assert_close

from boxteacher.errors import InputError
from boxteacher_adapters.mask2former import STRIDES, Mask2Former
from boxteacher_adapters.mask2former_weights import load_transformers_weights
from boxteacher_adapters.parts.backbones import build_backbone
from tests.support import seeded_images


@pytest.fixture(scope="module")
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


def test_the_same_weights_give_transformers_logits(reference_network):
    network, model = reference_network, empty_counterpart()
    load_transformers_weights(model, network.state_dict())
    images = seeded_images((96, 128), (96, 128))
    with torch.no_grad():
        pixels = torch.stack([model.backbone.normalize(image) for image in images])
        expected = network(pixel_values=pixels, output_auxiliary_logits=True)
        layers, features = model._predict(images)
    theirs = [
        (each["class_queries_logits"], each["masks_queries_logits"]) for each in expected.auxiliary_logits
    ]
    theirs.append((expected.class_queries_logits, expected.masks_queries_logits))
    assert len(layers) == len(theirs) == 5
    for ours, (classes, masks) in zip(layers, theirs, strict=True):
        assert_close(ours.class_logits, classes, rtol=0, atol=1e-4)
        assert_close(ours.mask_logits(features), masks, rtol=0, atol=1e-4)
        assert masks.abs().max() > 0.1


def test_weights_of_another_size_are_refused_by_name(reference_network):
    state = reference_network.state_dict()
    with pytest.raises(InputError, match=r"of another shape \(.*query_"):
        load_transformers_weights(empty_counterpart(num_queries=5), state)
    with pytest.raises(InputError, match=r"unknown \(.*layers\.3"):
        load_transformers_weights(empty_counterpart(decoder_layers=3), state)


def test_a_backbone_of_another_kind_is_left_alone(reference_network):
    state, model = reference_network.state_dict(), empty_counterpart()
    state = {k: v for k, v in state.items() if not k.startswith("model.pixel_level_module.encoder.")}
    before = model.backbone.network.conv1.weight.clone()
    load_transformers_weights(model, state)
    assert torch.equal(model.backbone.network.conv1.weight, before)
    assert_close(model.decoder.class_logits.weight, state["class_predictor.weight"])
