"""ResNets: torchvision's, and those of Caffe's ImageNet weights and the released BoxTeachers."""

from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import DeformConv2d

from boxteacher_adapters.parts.detectron2_names import in_torchvision_names, resnet_name
from boxteacher_adapters.parts.pretrained import CAFFE, IMAGENET, PretrainedNetwork, weights_at

_MSRA = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA"
CAFFE_RESNETS = {
    "resnet50_caffe": ("resnet50", f"{_MSRA}/R-50.pkl"),
    "resnet101_caffe": ("resnet101", f"{_MSRA}/R-101.pkl"),
    "resnet101_caffe_dcn": ("resnet101", f"{_MSRA}/R-101.pkl"),
}
_LAYERS = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}


def torchvision_resnet(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    """One of torchvision's `resnet18` … `resnet152`.

    Args:
        name: name of the network.
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.
    """
    network = torchvision.models.get_model(name, weights=None)
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    return PretrainedNetwork(
        *_maps(network, strides),
        IMAGENET,
        early=("conv1.", "bn1.", "layer1."),
        download=partial(weights.get_state_dict, progress=True),
        left_over=_beyond(strides),
    )


def caffe_resnet(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    """A ResNet as in the released BoxTeachers, for BGR images in [0, 255] without their mean.

    The first 1 × 1 convolution of a stage has the stride in `resnet50_caffe` and `resnet101_caffe`; in
    `resnet101_caffe_dcn` the 3 × 3 convolution has it, as in torchvision, and all 3 × 3 convolutions of the
    last three stages are deformable. Weights may have torchvision's, detectron2's or Caffe2's names; with
    weights without offsets, the offsets of a deformable network begin at zero.

    Args:
        name: name of the network.
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.
    """
    architecture, url = CAFFE_RESNETS[name]
    network = torchvision.models.get_model(architecture, weights=None)
    for stage in (network.layer2, network.layer3, network.layer4):
        if name.endswith("_dcn"):
            for block in stage:
                block.conv2 = ModulatedDeformConv2d(block.conv2)
        else:
            first = stage[0]
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    return PretrainedNetwork(
        *_maps(network, strides),
        CAFFE,
        early=("conv1.", "bn1.", "layer1."),
        download=partial(weights_at, url),
        own_names=partial(in_torchvision_names, rename=resnet_name),
        left_over=_beyond(strides),
        initial=(".conv2.offset.",),
    )


def _maps(network: Any, strides: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    layers = [_LAYERS[stride] for stride in strides]
    channels = tuple(16 * stride * network.layer1[0].expansion for stride in strides)
    return IntermediateLayerGetter(network, {layer: layer for layer in layers}), channels


def _beyond(strides: tuple[int, ...]) -> tuple[str, ...]:
    """Prefixes of entries that a network with these maps does not need."""
    return ("fc.", *(f"{layer}." for stride, layer in _LAYERS.items() if stride > strides[-1]))


class ModulatedDeformConv2d(DeformConv2d):  # type: ignore[misc]
    """A modulated deformable convolution (Deformable ConvNets v2, CVPR 2019) that replaces another.

    A second convolution predicts an offset and a weight in [0, 1] for every cell of the kernel at each output
    position. It begins at zero, which gives half the output of the convolution that is replaced.

    Args:
        convolution: square convolution without bias or groups, whose kernel is taken over.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        geometry: dict[str, Any] = {
            "kernel_size": convolution.kernel_size[0],
            "stride": convolution.stride[0],
            "padding": int(convolution.padding[0]),
            "dilation": convolution.dilation[0],
        }
        channels = convolution.in_channels
        super().__init__(channels, convolution.out_channels, bias=False, **geometry)
        self.weight = convolution.weight
        self.cells = convolution.weight[0, 0].numel()
        self.offset = nn.Conv2d(channels, 3 * self.cells, **geometry)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, h, w)."""
        # y and x of the first cell, y and x of the second, …: (B, 2 · cells, h, w); (B, cells, h, w)
        offsets, mask = torch.split(self.offset(x), [2 * self.cells, self.cells], dim=1)
        return super().forward(x, offsets, mask.sigmoid())
