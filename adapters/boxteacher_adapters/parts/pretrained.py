"""A network, its ImageNet weights (from a file, or downloaded once) and their preprocessing."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from boxteacher.adapter import InputError, compare_states
from boxteacher_adapters.parts.weight_files import read_weight_file

logger = logging.getLogger(__name__)

Weights = str | Path


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB image in [0, 1] to a network's input.

    Attributes:
        channel_order: order of the input's channels.
        mean: mean of the channels in that order, in [0, 1].
        std: standard deviation of the channels in that order, in [0, 1].
    """

    channel_order: Literal["RGB", "BGR"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Preprocessing("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Caffe's networks subtract the mean from images in [0, 255] and leave their scale.
CAFFE = Preprocessing("BGR", (103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255, 1 / 255, 1 / 255))


@dataclass(frozen=True)
class PretrainedNetwork:
    """A network, and how to fill it with weights.

    Attributes:
        network: network that maps images (B, 3, H, W) to one map per stride.
        channels: numbers of channels of the maps.
        preprocessing: preprocessing that the weights were trained with.
        early: prefixes of the names of parameters up to stride 4.
        download: function that returns the ImageNet weights.
        own_names: function that renames a file's or the download's entries to the network's names.
        left_over: prefixes of entries that the weights may hold beside the network's.
        initial: parts of the names of entries that the weights may lack; these keep their initial values.
    """

    network: nn.Module
    channels: tuple[int, ...]
    preprocessing: Preprocessing
    early: tuple[str, ...]
    download: Callable[[], dict[str, Tensor]]
    own_names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
    left_over: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()


def load_weights(described: PretrainedNetwork, name: str, weights: Weights) -> None:
    """Fills a network with weights from a file or with ImageNet's, which are downloaded once.

    Args:
        described: network to fill.
        name: name of the backbone, for messages.
        weights: path of a file, or "imagenet".

    Raises:
        InputError: the weights cannot be had or do not fit.
    """
    state = _downloaded(described, name) if weights == "imagenet" else read_weight_file(weights)
    state = described.own_names(state)
    wanted = described.network.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(described.left_over)}
    initial = ("num_batches_tracked", *described.initial)
    difference = compare_states(wanted, state, optional=lambda key: any(part in key for part in initial))
    if difference:
        raise InputError(
            f"weights {weights} are not those of {name}, whose entries differ: {difference}; give the "
            "backbone's own"
        )
    described.network.load_state_dict(state, strict=False)
    logger.info("loaded %s weights of %s", weights, name)


def _downloaded(described: PretrainedNetwork, name: str) -> dict[str, Tensor]:
    try:
        return described.download()
    except Exception as error:  # a broken file in the cache raises whatever its bytes lead to
        raise InputError(
            f"ImageNet weights of {name} cannot be had ({_first_line(error)}): download them by hand and "
            "give them with --weights FILE, remove the file from torch's cache if it is broken, or begin "
            "with --weights none"
        ) from error


def weights_at(url: str) -> dict[str, Tensor]:
    """The weights in the file at a URL, which is kept in torch's download cache."""
    return read_weight_file(file_at(url))


def file_at(url: str) -> Path:
    """The file of a URL, which is kept in torch's download cache.

    Raises:
        OSError: the file cannot be downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        checksum = re.search(r"-([0-9a-f]{8})\.pth$", url)  # in the names of torchvision's files
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=checksum and checksum[1])
        except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
            raise OSError(f"{url} to {file}: {error}") from error
    return file


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
