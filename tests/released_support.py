"""Stand-ins for released checkpoints: their entries' names and shapes, with values that can be recomputed.

The reference numbers were computed from the same values.
"""

import gzip
import json
import math
import zlib

import torch
from torch import Tensor

from tests.support import DATA

Shapes = dict[str, tuple[int, ...]]


def released_shapes(name: str) -> Shapes:
    """Names and shapes of a released checkpoint's entries: r50, r101, r101_dcn, swin-base or solov2_r50."""
    every = json.loads(gzip.decompress((DATA / "released_keys.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in every[name].items()}


def is_computed(key: str) -> bool:
    """Constants that the original code computes itself."""
    return key.endswith(("sizes_of_interest", "relative_position_index"))


def stand_in(key: str, shape: tuple[int, ...]) -> Tensor:
    """The value that the reference numbers were computed with."""
    kind = key.rpartition(".")[2]
    if kind in ("num_batches_tracked", "_iter") or is_computed(key):
        return torch.zeros(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if kind == "running_var":
        value = 1 + noise.abs() / 10
    elif kind == "running_mean":
        value = noise / 10
    elif kind == "bias":
        value = noise / 20
    elif kind == "relative_position_bias_table":
        value = noise / 50
    elif kind == "scale" or len(shape) == 1:
        value = 1 + noise / 10
    else:
        value = noise / math.sqrt(math.prod(shape[1:]))
    return _adjusted(key, value)


def _adjusted(key: str, value: Tensor) -> Tensor:
    """Shifts the heads' weights so that the networks detect objects."""
    if key.endswith(("cls_logits.weight", "cate_pred.weight")):
        return 3 * value
    if key.endswith("cls_logits.bias"):
        return value - 4
    if key.endswith("cate_pred.bias"):
        return value - 2
    if key.endswith("bbox_pred.bias"):
        return value + 2
    return 2 * value if key.endswith("controller.weight") else value


def rendered_images(seed: int) -> list[Tensor]:
    """The two images (3, 128, 160) and (3, 112, 144), RGB in [0, 1], that numbers with this seed came from.

    Five soft discs on a gradient, in whole bytes.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    return [_rendered(height, width, generator) / 255 for height, width in ((128, 160), (112, 144))]


def _rendered(height: int, width: int, generator: torch.Generator) -> Tensor:
    down = torch.linspace(0, 1, height)[:, None]  # (H, 1)
    across = torch.linspace(0, 1, width)  # (W,)
    ramps = torch.stack([across.expand(height, -1), down.expand(-1, width), across * down])
    image = 80 * ramps + 60  # (3, H, W)
    for _ in range(5):
        middle_y, middle_x, size = torch.rand(3, generator=generator).tolist()
        color = 255 * torch.rand(3, generator=generator)
        distance = ((down - middle_y).square() + (across - middle_x).square()).sqrt()  # (H, W)
        inside = ((0.08 + 0.12 * size - distance) * 40).sigmoid()
        image = image * (1 - inside) + color[:, None, None] * inside
    return image.clamp(0, 255).round()


def stand_in_checkpoint(shapes: Shapes) -> dict[str, Tensor]:
    return {key: stand_in(key, shape) for key, shape in shapes.items()}


def only(network: str, shapes: Shapes) -> Shapes:
    """One of BoxTeacher's two networks, `teacher` or `student`."""
    return {key: shape for key, shape in shapes.items() if key.startswith(f"{network}.")}
