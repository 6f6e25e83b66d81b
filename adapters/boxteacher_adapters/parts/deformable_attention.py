"""Multi-scale deformable attention (Deformable DETR, ICLR 2021) in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher.adapter import full_precision


class DeformableAttention(nn.Module):
    """Attention of each query to a few points around its position on every level (Deformable DETR, Eq. 3).

    Args:
        channels: number of channels of queries and maps, a multiple of `num_heads`.
        num_levels: number of levels.
        num_heads: number of heads that share the channels.
        num_points: number of points per head and level.
    """

    def __init__(self, channels: int, num_levels: int, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.values = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.values, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.offsets.bias = nn.Parameter(self._rays())

    def forward(
        self, queries: Tensor, centers: Tensor, tokens: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The attended values (B, N, channels).

        Args:
            queries: (B, N, channels).
            centers: (N, 2) x, y of each query, in fractions of the map's width and height.
            tokens: (B, S, channels), the levels' cells in row-major order, one level after another.
            sizes: height and width of each level, S cells in all.
        """
        shape = (self.num_heads, self.num_levels, self.num_points)
        with full_precision(queries.device):  # half precision would round the points
            queries, tokens = queries.float(), tokens.float()
            offsets = self.offsets(queries).unflatten(-1, (*shape, 2))  # (B, N, heads, levels, points, 2)
            weights = self.weights(queries).unflatten(-1, (self.num_heads, -1)).softmax(-1)
            weights = weights.unflatten(-1, shape[1:])  # (B, N, heads, levels, points)
            values = self.values(tokens).unflatten(-1, (self.num_heads, -1))  # (B, S, heads, D)
            attended: Tensor | float = 0.0
            levels = values.split([height * width for height, width in sizes], 1)
            for level, (cells, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
                extent = torch.tensor((width, height), device=centers.device)
                points = centers[:, None, None] + offsets[:, :, :, level] / extent
                attended = attended + _weighted_samples(
                    cells.unflatten(1, (height, width)), points, weights[:, :, :, level]
                )
            return self.output(attended)

    def _rays(self) -> Tensor:
        """Offsets (heads · levels · points · 2) in cells: each head's points lie on a ray of its own."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)  # (heads, 2)
        direction = direction / direction.abs().amax(1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)[:, None]  # (points, 1)
        rays = direction[:, None, None] * distance  # (heads, 1, points, 2)
        return rays.expand(-1, self.num_levels, -1, -1).flatten()


def _weighted_samples(maps: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Bilinear samples of one level's maps, 0 outside, summed with weights: (B, N, heads · D).

    Args:
        maps: (B, h, w, heads, D).
        points: (B, N, heads, points, 2) x, y in fractions of width and height.
        weights: (B, N, heads, points).
    """
    heads = maps.shape[3]
    maps = maps.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B · heads, D, h, w)
    grid = 2 * points.transpose(1, 2).flatten(0, 1) - 1  # (B · heads, N, points, 2)
    samples = F.grid_sample(maps, grid, align_corners=False)  # (B · heads, D, N, points)
    total = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # (B · heads, D, N)
    return total.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)
