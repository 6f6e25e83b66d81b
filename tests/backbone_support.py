"""What the tests of backbones share: names as the files of others spell them, and a network to fill files."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from boxteacher_adapters.parts.backbones import Backbone
from tests.support import seeded_images

RESNET_BLOCKS = {"resnet50_caffe": (3, 4, 6, 3), "resnet101_caffe": (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def batch(height: int = 64, width: int = 64) -> Tensor:
    return torch.stack(seeded_images((height, width), (height, width)))


def features(backbone: Backbone, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return backbone.eval()(images)


def with_statistics(network: nn.Module) -> nn.Module:
    """The network with batch norms that are nobody's default."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.1 * torch.randn(shape, generator=generator))
    return network


def detectron2_keys(blocks: tuple[int, ...], deformable: bool = False) -> Iterator[str]:
    layers = ["stem.conv1"]
    for stage, count in enumerate(blocks, start=2):
        layers.append(f"res{stage}.0.shortcut")
        layers += [f"res{stage}.{block}.conv{i}" for block in range(count) for i in (1, 2, 3)]
        if deformable and stage > 2:
            for block, entry in itertools.product(range(count), ("weight", "bias")):
                yield f"res{stage}.{block}.conv2_offset.{entry}"
    for layer in layers:
        yield f"{layer}.weight"
        yield from (f"{layer}.norm.{entry}" for entry in NORM)


def caffe2_keys(blocks: tuple[int, ...]) -> Iterator[str]:
    yield from ("conv1_w", "res_conv1_bn_s", "res_conv1_bn_b")
    for stage, count in enumerate(blocks, start=2):
        branches = [f"res{stage}_0_branch1"]
        branches += [f"res{stage}_{block}_branch2{i}" for block in range(count) for i in "abc"]
        for branch in branches:
            yield from (f"{branch}_w", f"{branch}_bn_s", f"{branch}_bn_b")


def swin_keys(blocks: tuple[int, ...]) -> Iterator[str]:
    affine = ["patch_embed.proj", "patch_embed.norm", "norm1", "norm2", "norm3"]
    for stage, count in enumerate(blocks):
        for block in (f"layers.{stage}.blocks.{i}" for i in range(count)):
            yield f"{block}.attn.relative_position_bias_table"
            layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            affine += [f"{block}.{layer}" for layer in layers]
        if stage < len(blocks) - 1:
            yield f"layers.{stage}.downsample.reduction.weight"
            affine.append(f"layers.{stage}.downsample.norm")
    yield from (f"{layer}.{entry}" for layer in affine for entry in ("weight", "bias"))
