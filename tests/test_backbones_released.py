"""The released models' backbones: Caffe's ResNets, deformable convolutions, Swin."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.swin_transformer import ShiftedWindowAttention

from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.resnets import ModulatedDeformConv2d
from boxteacher_adapters.parts.swin import AlwaysShiftedAttention
from tests.backbone_support import batch, features, with_statistics


def test_caffe_s_resnets_shrink_maps_in_the_first_convolution():
    backbone = build_backbone("resnet50_caffe", "none", strides=(4, 8))
    with_statistics(backbone).eval()
    before, after = features(backbone, batch())
    block, rest = backbone.network["layer2"][0], backbone.network["layer2"][1:]
    with torch.no_grad():
        x = block.bn1(F.conv2d(before[..., ::2, ::2], block.conv1.weight)).relu()
        x = block.bn2(F.conv2d(x, block.conv2.weight, padding=1)).relu()
        shortcut = block.downsample[1](F.conv2d(before[..., ::2, ::2], block.downsample[0].weight))
        expected = rest((block.bn3(block.conv3(x)) + shortcut).relu())
    assert_close(after, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_the_deformable_resnet_shrinks_maps_in_its_deformable_convolutions():
    with torch.device("meta"):
        network = build_backbone("resnet101_caffe_dcn", "none").network
    for name, module in network.named_modules():
        if name.endswith("conv2"):
            first = name in ("layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2")
            assert isinstance(module, ModulatedDeformConv2d) == (not name.startswith("layer1."))
            assert module.stride == ((2, 2) if first else (1, 1))
        elif name.endswith("conv1") and name != "conv1":
            assert module.stride == (1, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_deformable_convolution_begins_as_half_the_convolution_whose_place_it_takes(stride):
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 4, 3, stride=stride, padding=1, bias=False)
    deformable = ModulatedDeformConv2d(convolution)
    x = torch.randn(2, 6, 9, 11)
    assert_close(deformable(x), 0.5 * convolution(x))


@pytest.mark.parametrize(("first", "rows", "columns"), [(0, 1, 0), (1, 0, 1)])
def test_offsets_come_in_pairs_of_row_and_column_before_the_masks(first, rows, columns):
    """Every even one of the first 18 numbers moves a cell down, every odd one to the right."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    deformable = ModulatedDeformConv2d(convolution)
    with torch.no_grad():
        deformable.offset.bias[first:18:2] = 1
        deformable.offset.bias[18:] = 20  # the logistic function of 20 is 1 in float32
    x = torch.randn(1, 3, 8, 8)
    moved = convolution(F.pad(x, (0, 1, 0, 1)))[..., rows : rows + 8, columns : columns + 8]
    assert_close(deformable(x)[..., 1:-1, 1:-1], moved[..., 1:-1, 1:-1])


@pytest.mark.parametrize("name", ["resnet50_caffe", "swin_t", "swin_v2_t"])
def test_maps_of_any_image_have_the_requested_strides(name):
    backbone = build_backbone(name, "none", strides=(4, 16, 32))
    for height, width in ((64, 96), (65, 99), (33, 31)):
        maps = features(backbone, batch(height, width)[:1])
        for x, stride, channels in zip(maps, (4, 16, 32), backbone.channels, strict=True):
            assert x.shape == (1, channels, -(-height // stride), -(-width // stride))


def test_fewer_maps_are_the_same_maps():
    torch.manual_seed(0)
    whole = build_backbone("swin_t", "none", strides=(4, 8, 16, 32))
    part = build_backbone("swin_t", "none", strides=(8,))
    part.network.load_state_dict(
        {k: v for k, v in whole.network.state_dict().items() if k in part.network.state_dict()}
    )
    assert_close(features(part, batch())[0], features(whole, batch())[1])


def test_swin_pads_at_the_right_and_bottom_with_zeros():
    torch.manual_seed(0)
    backbone = build_backbone("swin_t", "none")
    images = torch.randn(1, 3, 62, 93)
    for odd, even in zip(
        features(backbone, images), features(backbone, F.pad(images, (0, 3, 0, 2))), strict=True
    ):
        assert_close(odd, even, rtol=0, atol=0)


def test_swin_s_maps_are_torchvision_s_with_a_norm_on_each():
    torch.manual_seed(0)
    theirs = torchvision.models.swin_t().eval()
    backbone = build_backbone("swin_t", "none", strides=(4, 8, 16, 32))
    state = theirs.state_dict()
    backbone.network.load_state_dict(
        {k: v for k, v in state.items() if k.startswith("features.")}, strict=False
    )
    x, expected = batch(64, 96), []
    with torch.no_grad():
        for i, layer in enumerate(theirs.features):
            x = layer(x)
            if i in (1, 3, 5, 7):
                expected.append(F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
    for ours, other in zip(features(backbone, batch(64, 96)), expected, strict=True):
        assert_close(ours, other)


def original_attention(attention: ShiftedWindowAttention, x: Tensor) -> Tensor:
    """The original's shifted window attention, (1, h, w, D), between all pairs of cells at once."""
    height, width, channels = x.shape[1:]
    window, shift, heads = 7, 3, attention.num_heads
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    sides = x.shape[1:3]
    # Where each row and column is after the roll, and which of the three slices of its side it is in then.
    places = [(torch.arange(side) - shift) % side for side in sides]
    slices = [
        (p >= side - window).int() + (p >= side - shift).int() for p, side in zip(places, sides, strict=True)
    ]
    row, column = (grid.flatten() for grid in torch.meshgrid(*places, indexing="ij"))
    part = torch.stack([grid.flatten() for grid in torch.meshgrid(*slices, indexing="ij")])
    where = torch.stack([row // window, column // window, *part])  # window and region of each cell
    together = (where[:, :, None] == where[:, None, :]).all(0)
    down, right = row[:, None] - row[None], column[:, None] - column[None]
    index = ((down + window - 1) * (2 * window - 1) + right + window - 1)[together]
    logits = torch.full((len(row), len(row), heads), -torch.inf)
    logits[together] = attention.relative_position_bias_table[index]
    query, key, value = attention.qkv(x).reshape(len(row), 3, heads, channels // heads).unbind(1)
    logits = logits.permute(2, 0, 1) + torch.einsum("qhd,khd->hqk", query, key) / (channels // heads) ** 0.5
    result = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).flatten(1)
    return attention.proj(result).unflatten(0, sides)[None, :height, :width]


@pytest.mark.parametrize("size", [(4, 5), (7, 7), (2, 10), (9, 6), (1, 1), (8, 15)])
def test_the_released_swin_shifts_its_windows_on_small_maps_too(size):
    torch.manual_seed(0)
    attention = AlwaysShiftedAttention(12, [7, 7], [3, 3], num_heads=2).eval()
    nn.init.normal_(attention.relative_position_bias_table)
    nn.init.normal_(attention.qkv.weight, std=0.5)
    nn.init.normal_(attention.qkv.bias)
    x = torch.randn(1, *size, 12)
    with torch.no_grad():
        assert_close(attention(x), original_attention(attention, x))
        plain = ShiftedWindowAttention(12, [7, 7], [3, 3], num_heads=2)
        plain.load_state_dict(attention.state_dict())
        same = torch.allclose(plain.eval()(x), attention(x))
    assert same == (min(size) > 7)


def test_the_released_swin_s_attention_is_the_one_that_always_shifts():
    with torch.device("meta"):
        network = build_backbone("swin_b_caffe", "none").network
    attentions = [m for m in network.modules() if isinstance(m, ShiftedWindowAttention)]
    assert len(attentions) == 24
    assert all(isinstance(attention, AlwaysShiftedAttention) for attention in attentions)


# What is trained.


def test_the_released_resnet_trains_the_convolutions_of_its_last_three_stages():
    backbone = build_backbone("resnet50_caffe", "none").freeze().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(x.square().mean() for x in backbone(batch())).backward()
    optimizer.step()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    expected = {
        f"network.{name}.weight"
        for name, module in backbone.network.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(("layer2.", "layer3.", "layer4."))
    }
    assert changed == expected


def test_a_frozen_swin_trains_from_its_second_stage_on_and_drops_nothing_before():
    torch.manual_seed(0)
    backbone = build_backbone("swin_t", "none", strides=(4, 8)).freeze().train()
    for name, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad == name.startswith(("features.3.", "norms.")), name
    images = batch(32, 32).repeat(16, 1, 1, 1)
    first, second = backbone(images), backbone(images)
    assert_close(first[0], second[0], rtol=0, atol=0)
    assert not torch.equal(first[1], second[1])  # stochastic depth of the second stage
