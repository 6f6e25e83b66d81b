"""Weights of ResNets and Swins from the files of others, and from downloads that are kept."""

import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher_adapters.parts.backbones import Backbone, build_backbone
from boxteacher_adapters.parts.detectron2_names import resnet_name
from boxteacher_adapters.parts.resnets import CAFFE_RESNETS
from tests.backbone_support import (
    RESNET_BLOCKS,
    batch,
    caffe2_keys,
    detectron2_keys,
    features,
    with_statistics,
)


@pytest.fixture(scope="module")
def caffe() -> Backbone:
    torch.manual_seed(3)
    backbone = build_backbone("resnet50_caffe", "none")
    with_statistics(backbone)
    return backbone.eval()


@pytest.fixture(scope="module")
def caffe2_file(caffe: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as in Caffe2's pickles: numpy arrays, no statistics, a classifier, a bias in the stem."""
    state = caffe.network.state_dict()
    arrays = {key: state[resnet_name(key)].numpy() for key in caffe2_keys(RESNET_BLOCKS["resnet50_caffe"])}
    arrays |= {"conv1_b": torch.full((64,), 1e-9).numpy()}
    arrays |= {"fc1000_w": torch.zeros(1000, 2048).numpy(), "fc1000_b": torch.zeros(1000).numpy()}
    path = tmp_path_factory.mktemp("weights") / "R-50.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def assert_scales_and_shifts(backbone: Backbone, caffe: Backbone) -> None:
    """The network is `caffe` with norms that multiply by their gain, add their bias, and nothing else."""
    expected = build_backbone("resnet50_caffe", "none")
    expected.load_state_dict(caffe.state_dict())
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.eps = 0.0
    for ours, other in zip(features(backbone, batch()), features(expected, batch()), strict=True):
        assert_close(ours, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_caffe2_s_pickle_gives_norms_that_scale_and_shift(caffe, caffe2_file):
    backbone = build_backbone("resnet50_caffe", caffe2_file)
    assert_scales_and_shifts(backbone, caffe)
    assert not backbone.network["layer1"][0].conv1.weight.requires_grad


def test_the_download_is_kept_and_read_from_the_cache(caffe, caffe2_file, cache, monkeypatch):
    url = caffe2_file.as_uri()
    monkeypatch.setitem(CAFFE_RESNETS, "resnet50_caffe", ("resnet50", url))
    assert_scales_and_shifts(build_backbone("resnet50_caffe"), caffe)
    assert (cache / "R-50.pkl").read_bytes() == caffe2_file.read_bytes()
    monkeypatch.setitem(CAFFE_RESNETS, "resnet50_caffe", ("resnet50", url.replace("weights", "gone")))
    assert_scales_and_shifts(build_backbone("resnet50_caffe"), caffe)


@pytest.mark.parametrize("name", ["resnet50_caffe", "resnet101_caffe_dcn", "swin_b_caffe", "swin_t"])
def test_a_download_that_fails_leaves_a_way_out(name, cache, monkeypatch):
    def refuse(url: str, *_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError(f"no network for {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with torch.device("meta"), pytest.raises(InputError) as caught:
        build_backbone(name)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert "no network for https://" in message
    assert "--weights FILE" in message


def test_weights_without_offsets_fill_a_deformable_network(caffe, caffe2_file, monkeypatch):
    monkeypatch.setitem(CAFFE_RESNETS, "small_dcn", ("resnet50", ""))
    backbone = build_backbone("small_dcn", caffe2_file)
    block = backbone.network["layer3"][2]
    assert_close(block.conv2.weight, caffe.network["layer3"][2].conv2.weight)
    assert not block.conv2.offset.weight.any()


def test_weights_with_other_offsets_are_refused(caffe, tmp_path, monkeypatch):
    monkeypatch.setitem(CAFFE_RESNETS, "small_dcn", ("resnet50", ""))
    state = {"layer3.2.conv2.offset.bias": torch.zeros(18)}  # not modulated
    torch.save(caffe.network.state_dict() | state, tmp_path / "dcn.pth")
    with pytest.raises(InputError, match=r"layer3\.2\.conv2\.offset\.bias"):
        build_backbone("small_dcn", tmp_path / "dcn.pth")


@pytest.mark.parametrize("spelling", ["detectron2", "torchvision"])
def test_a_state_dict_gives_the_same_maps_under_either_spelling(caffe, tmp_path, spelling):
    state = dict(caffe.network.state_dict())
    if spelling == "detectron2":
        keys = detectron2_keys(RESNET_BLOCKS["resnet50_caffe"])
        state = {"model": {key: state[resnet_name(key)] for key in keys}}
    torch.save(state, tmp_path / "weights.pth")
    backbone = build_backbone("resnet50_caffe", tmp_path / "weights.pth")
    for ours, other in zip(features(backbone, batch()), features(caffe, batch()), strict=True):
        assert_close(ours, other, rtol=0, atol=0)


def test_fewer_maps_need_fewer_entries(caffe, tmp_path):
    torch.save(caffe.network.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone("resnet50_caffe", tmp_path / "weights.pth", strides=(8,))
    assert_close(features(backbone, batch())[0], features(caffe, batch())[0], rtol=0, atol=0)


def test_torchvision_s_swin_weights_fill_all_but_the_norms_of_the_maps(cache):
    torch.manual_seed(5)
    theirs = torchvision.models.swin_t()
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / "swin_t-704ceda3.pth")  # as torchvision names what it downloads
    ours = build_backbone("swin_t").network.state_dict()
    for key, value in theirs.state_dict().items():
        if key.startswith("features."):
            assert_close(ours.pop(key), value, rtol=0, atol=0)
    assert {key.split(".")[0] for key in ours} == {"norms"}


def test_a_deeper_swin_s_weights_are_refused(tmp_path):
    state = build_backbone("swin_t", "none").network.state_dict()
    torch.save(state | {"features.5.6.norm1.weight": torch.zeros(384)}, tmp_path / "swin_s.pth")
    with pytest.raises(InputError, match=r"swin_s\.pth are not those of swin_t, .*features\.5\.6"):
        build_backbone("swin_t", tmp_path / "swin_s.pth")
