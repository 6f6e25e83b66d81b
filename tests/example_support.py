"""The segmenter of examples/write_an_adapter.py, and a small version that trains in seconds."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "write_an_adapter.py"


def load_example() -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("write_an_adapter", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TinyBackbone(nn.Module):
    """Maps of strides 8, 16 and 32 from a handful of convolutions, with one batch norm."""

    channels = (24, 24, 24)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4, padding=3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.deeper = nn.ModuleList(nn.Conv2d(24, 24, 3, stride=2, padding=1) for _ in range(2))

    def normalize(self, image: Tensor) -> Tensor:
        return (image - 0.45) * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for conv in self.deeper:
            maps.append(conv(maps[-1]).relu())
        return maps


class TinySegmenter(load_example().PrototypeSegmenter):  # type: ignore[misc]
    """The example's segmenter on `TinyBackbone`."""

    def __init__(self, num_classes: int = 3) -> None:
        torch.manual_seed(0)
        super().__init__(TinyBackbone(), num_classes, channels=32, prototypes=8)
