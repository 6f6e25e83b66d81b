"""The record of channel order, mean and std: what it does to an image, and that it travels in checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint, save_checkpoint
from boxteacher.engine.segmenters import build_segmenter
from boxteacher_adapters.parts.backbones import Backbone, build_backbone
from boxteacher_adapters.parts.pretrained import Preprocessing
from tests.support import seeded_images

INFO = SegmenterInfo("condinst", "resnet18", 64, ["thing"], [1])


@pytest.mark.parametrize("name", ["resnet50_caffe", "resnet101_caffe", "resnet101_caffe_dcn", "swin_b_caffe"])
def test_released_backbones_take_blue_first_and_the_mean_off_bytes(name):
    with torch.device("meta"):
        record = build_backbone(name, "none").preprocessing
    backbone = Backbone(nn.Identity(), (3,), record)
    image = seeded_images((5, 7))[0]
    blue_first = 255 * image[[2, 1, 0]] - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    assert_close(backbone.normalize(image), blue_first, rtol=0, atol=1e-4)  # of bytes up to 255 in float32


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "swin_v2_t"])
def test_torchvision_s_take_images_as_its_weights_say(name):
    with torch.device("meta"):
        record = build_backbone(name, "none").preprocessing
    assert record == Preprocessing("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_same_network_sees_the_same_colors_in_either_order():
    torch.manual_seed(0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    convolution = nn.Conv2d(3, 4, 3)
    reversed_convolution = nn.Conv2d(3, 4, 3)
    reversed_convolution.load_state_dict({"weight": convolution.weight.flip(1), "bias": convolution.bias})
    rgb = Backbone(convolution, (4,), Preprocessing("RGB", mean, std))
    bgr = Backbone(reversed_convolution, (4,), Preprocessing("BGR", mean[::-1], std[::-1]))
    image = seeded_images((8, 8))[0]
    assert_close(
        reversed_convolution(bgr.normalize(image)[None]),
        convolution(rgb.normalize(image)[None]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    segmenter = build_segmenter("condinst", 1, backbone="resnet18", weights="none", image_size=64)
    save_checkpoint(tmp_path / "last.pt", segmenter, INFO)
    return tmp_path / "last.pt"


def rewrite(checkpoint: Path, **changes: object) -> None:
    content = torch.load(checkpoint, weights_only=True)
    kept = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    torch.save(kept, checkpoint)


def test_a_checkpoint_keeps_the_record(checkpoint):
    expected = {"channel_order": "RGB", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert torch.load(checkpoint, weights_only=True)["preprocessing"] == expected
    assert load_checkpoint(checkpoint)[1] == INFO


def test_a_checkpoint_from_before_the_record_still_loads(checkpoint):
    rewrite(checkpoint, preprocessing=...)
    assert "preprocessing" not in torch.load(checkpoint, weights_only=True)
    assert load_checkpoint(checkpoint)[1] == INFO


def test_a_checkpoint_of_other_images_is_refused(checkpoint):
    record = torch.load(checkpoint, weights_only=True)["preprocessing"]
    rewrite(checkpoint, preprocessing=record | {"channel_order": "BGR"})
    with pytest.raises(InputError, match=r"last\.pt: was trained with preprocessing .*'BGR'") as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_segmenter_without_a_record_has_none_in_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "other.pt", nn.Linear(2, 3), INFO)
    assert torch.load(tmp_path / "other.pt", weights_only=True)["preprocessing"] is None
