"""Where the cells of a map lie: as channels that a convolution can see, and on the mask grid."""

import torch
import torch.nn.functional as F
from torch import Tensor


def append_coordinates(maps: Tensor) -> Tensor:
    """Two channels more: x, then y, from −1 in the first cell to 1 in the last (CoordConv, NeurIPS 2018).

    Args:
        maps: (N, C, h, w).

    Returns:
        (N, C + 2, h, w).
    """
    count, _, height, width = maps.shape
    x = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
    y = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    coordinates = torch.stack([columns, rows])  # (2, h, w)
    return torch.cat([maps, coordinates.expand(count, -1, -1, -1)], 1)


def centers_to_grid(maps: Tensor, stride: int) -> Tensor:
    """Moves values from the middles of the cells to the pixels that the mask grid's cells stand for.

    A cell of a convolutional map that is enlarged by `interpolate(…, align_corners=False)` stands for the
    middle of its stride × stride pixels, which for an even stride is half a pixel above and left of pixel
    (stride // 2, stride // 2). Values between the middles are bilinear; beyond the last they go on.

    Args:
        maps: (N, h, w).
        stride: pixels per cell.

    Returns:
        (N, h, w).
    """
    offset = (stride // 2 - (stride - 1) / 2) / stride  # in cells
    padded = F.pad(maps[:, None], (0, 1, 0, 1), mode="replicate")[:, 0]  # (N, h + 1, w + 1)
    rows = torch.lerp(padded[:, :-1], padded[:, 1:], offset)  # (N, h, w + 1)
    return torch.lerp(rows[..., :-1], rows[..., 1:], offset)
