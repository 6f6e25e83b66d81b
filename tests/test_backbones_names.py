"""Names of the released backbones' entries in detectron2's, Caffe2's and Swin's files."""

import pytest
import torch

from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.detectron2_names import in_torchvision_names, resnet_name, swin_name
from tests.backbone_support import RESNET_BLOCKS, caffe2_keys, detectron2_keys, swin_keys


def entries(name: str) -> set[str]:
    """What a file with a backbone's weights has to hold: all but what the network computes or counts."""
    with torch.device("meta"):
        network = build_backbone(name, "none").network
    return {
        key
        for key in network.state_dict()
        if not key.endswith(("num_batches_tracked", "relative_position_index"))
    }


@pytest.mark.parametrize("name", RESNET_BLOCKS)
def test_every_entry_of_a_resnet_has_its_name_in_detectron2(name):
    keys = list(detectron2_keys(RESNET_BLOCKS[name]))
    renamed = [resnet_name(key) for key in keys]
    assert len(set(renamed)) == len(keys)
    assert set(renamed) == entries(name)


def test_every_entry_of_a_deformable_resnet_has_its_name_in_detectron2():
    keys = list(detectron2_keys(RESNET_BLOCKS["resnet101_caffe"], deformable=True))
    assert {resnet_name(key) for key in keys} == entries("resnet101_caffe_dcn")
    assert len(keys) == len(entries("resnet101_caffe_dcn"))


def test_caffe2_names_are_those_of_every_entry_but_the_statistics():
    renamed = [resnet_name(key) for key in caffe2_keys(RESNET_BLOCKS["resnet50_caffe"])]
    assert len(set(renamed)) == len(renamed)
    statistics = {key for key in entries("resnet50_caffe") if "running_" in key}
    assert set(renamed) == entries("resnet50_caffe") - statistics


def test_every_entry_of_swin_has_its_name_in_the_original():
    keys = list(swin_keys((2, 2, 18, 2)))
    renamed = [swin_name(key) for key in keys]
    assert len(set(renamed)) == len(keys)
    assert set(renamed) == entries("swin_b_caffe")


@pytest.mark.parametrize(
    "key",
    [
        "fc1000_w",
        "fc1000_b",
        "conv1_b",
        "stem.conv1.bias",
        "stem.fc.weight",
        "res6.0.conv1.weight",
        "conv1.weight",
    ],
)
def test_what_a_resnet_has_no_place_for_has_no_name(key):
    assert resnet_name(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "norm.weight",
        "head.bias",
        "layers.0.blocks.1.attn_mask",
        "layers.0.blocks.0.attn.relative_position_index",
        "features.0.0.weight",
    ],
)
def test_what_swin_has_no_place_for_has_no_name(key):
    assert swin_name(key) is None


def test_entries_that_the_network_has_no_place_for_are_left_out():
    proj, other = torch.randn(4, 3, 4, 4), torch.randn(2)
    state = {"patch_embed.proj.weight": proj, "head.weight": other, "layers.0.blocks.1.attn_mask": other}
    assert in_torchvision_names(state, swin_name) == {"features.0.0.weight": proj}


def test_torchvision_s_names_stay_as_they_are():
    state = {"conv1.weight": torch.randn(4, 3, 7, 7), "bn1.weight": torch.ones(4)}
    assert in_torchvision_names(state, resnet_name) == state


def test_statistics_that_a_file_has_are_kept():
    state = {f"stem.conv1.norm.{entry}": torch.randn(4) for entry in ("weight", "bias", "running_var")}
    renamed = in_torchvision_names(state, resnet_name)
    assert renamed["bn1.running_var"] is state["stem.conv1.norm.running_var"]
    assert not renamed["bn1.running_mean"].any()
