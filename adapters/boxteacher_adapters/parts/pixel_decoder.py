"""Mask2Former's pixel decoder: attention between maps of several strides, and the mask features."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from boxteacher_adapters.parts.deformable_attention import DeformableAttention
from boxteacher_adapters.parts.maps import flatten_levels


class PixelDecoder(nn.Module):
    """Deformable self-attention over strides 8, 16 and 32, then one step of a feature pyramid to stride 4.

    Mask2Former (CVPR 2022), Sec. 3.2.1 and 4.1.

    Args:
        in_channels: numbers of channels of the backbone's maps of strides 4, 8, 16 and 32.
        channels: number of channels of levels and mask features, a multiple of 32.
        num_layers: number of layers of deformable attention.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_layers: int) -> None:
        super().__init__()
        finest, *others = in_channels
        block = partial(
            Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, 32), activation_layer=None, bias=True
        )
        self.projections = nn.ModuleList(block(width, channels, 1) for width in reversed(others))
        self.level_embedding = nn.Parameter(torch.randn(len(others), channels))
        self.layers = nn.ModuleList(DeformableEncoderLayer(channels, len(others)) for _ in range(num_layers))
        self.lateral = block(finest, channels, 1, bias=False)
        self.smooth = block(channels, channels, 3, bias=False, activation_layer=nn.ReLU)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.mask_features = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps (B, in_channels_i, h_i, w_i), finest first, to levels and mask features.

        Returns:
            The levels (B, channels, h_i, w_i) of strides 32, 16 and 8, coarsest first, and mask features
            (B, channels, H / 4, W / 4).
        """
        finest, *others = maps
        projected = [project(x) for project, x in zip(self.projections, reversed(others), strict=True)]
        sizes = [(x.shape[-2], x.shape[-1]) for x in projected]
        channels, device = projected[0].shape[1], finest.device
        tokens = flatten_levels(projected)  # (B, S, channels)
        position = torch.cat(
            [
                sine_position_embedding(*size, channels, device) + level
                for size, level in zip(sizes, self.level_embedding, strict=True)
            ]
        )  # (S, channels)
        centers = torch.cat([_cell_centers(*size, device) for size in sizes])  # (S, 2)
        for layer in self.layers:
            tokens = layer(tokens, position, centers, sizes)
        parts = tokens.split([height * width for height, width in sizes], 1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        enlarged = F.interpolate(levels[-1], finest.shape[-2:], mode="bilinear")
        return levels, self.mask_features(self.smooth(self.lateral(finest) + enlarged))


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward net, each followed by its layer norm."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, num_levels)
        self.attention_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward(channels, 4 * channels)
        self.feedforward_norm = nn.LayerNorm(channels)

    def forward(
        self, tokens: Tensor, position: Tensor, centers: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Tokens (B, S, channels) to tokens; `position` is (S, channels), `centers` (S, 2) x, y in [0, 1]."""
        tokens = self.attention_norm(tokens + self.attention(tokens + position, centers, tokens, sizes))
        return self.feedforward_norm(tokens + self.feedforward(tokens))


def feedforward(channels: int, hidden: int) -> nn.Sequential:
    """Two linear layers with a ReLU between them, and Xavier initialization."""
    widen, narrow = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
    for layer in (widen, narrow):
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(widen, nn.ReLU(inplace=True), narrow)


def _cell_centers(height: int, width: int, device: torch.device) -> Tensor:
    """x, y (h · w, 2) of each cell's center in fractions of the map's width and height."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.cartesian_prod(y, x).flip(1)


def sine_position_embedding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines (h · w, channels) of a cell's row, then of its column (DETR, ECCV 2020, App. A.4).

    Row i of h counts as the angle 2π (i + 1) / h; channels 2k and 2k + 1 of a half of D channels are its
    sine and cosine over 10000^(2k / D).
    """
    half = channels // 2
    period = 10_000 ** (2 * torch.arange(half // 2, device=device) / half)  # (half / 2,)

    def waves(count: int) -> Tensor:
        angle = torch.arange(1, count + 1, device=device) * (2 * math.pi / (count + 1e-6))
        phase = angle[:, None] / period  # (count, half / 2)
        return torch.stack([phase.sin(), phase.cos()], 2).flatten(1)  # (count, half)

    rows = waves(height)[:, None].expand(-1, width, -1)
    columns = waves(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)
