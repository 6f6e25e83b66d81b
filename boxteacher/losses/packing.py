"""Boxes of the mask grid, cut out and packed together, so that work and memory grow with their area."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_CELLS_ON_CPU = 2**17  # of one packing, whose tensors then stay in a core's cache
_MAX_CELLS = 2**24
_WIDTH_RATIO = 1.25  # of the widest to the narrowest box of one packing


@dataclass(frozen=True)
class BoxRegions:
    """The box of each of M masks, outside of which a pair loss looks at no mask.

    Attributes:
        extents: (M, 4) int64, the box's first row, first column, end row, end column on the grid (h, w);
            the ends are exclusive.
        image_index: (M,) int64.
        valid: (B, h, w) bool, cells of each image that may be another cell's neighbor.
    """

    extents: Tensor
    image_index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class PackedBoxes:
    """Boxes of similar width, each with a border, stacked below one another: R rows and S columns.

    A cell and its neighbor are as far apart here as on the grid, for every cell of a box and every neighbor
    no farther away than the border.

    Attributes:
        grid: h and w.
        mask: (R,) int64, the mask whose box each row belongs to.
        row: (R,) int64, the row of the grid; it may lie outside the grid.
        first_column: (R,) int64, the column of the grid at column 0; it may be negative.
        inside: (R, S) bool, whether a cell lies on the grid.
        in_box: (R, S) bool, whether a cell lies in the box, not in its border.
    """

    grid: tuple[int, int]
    mask: Tensor
    row: Tensor
    first_column: Tensor
    inside: Tensor
    in_box: Tensor

    def pack(self, maps: Tensor, index: Tensor | None = None) -> Tensor:
        """Cells (R, S) of the boxes from maps (N, h, w); 0 outside the grid.

        Args:
            maps: of any type.
            index: (M,) int64, the map of each mask; map m for mask m if not given.
        """
        flat = self._positions(self.mask if index is None else index[self.mask])
        return maps.reshape(-1)[flat.clamp_(0, maps.numel() - 1)].masked_fill_(~self.inside, 0)

    def unpack_into(self, maps: Tensor, cells: Tensor) -> None:
        """Writes cells (R, S) to where they came from in maps (M · h · w + 1,), whose last entry is a bin."""
        flat = self._positions(self.mask).masked_fill_(~self.inside, len(maps) - 1)
        maps[flat] = cells.to(maps.dtype)

    def _positions(self, index: Tensor) -> Tensor:
        height, width = self.grid
        start = (index * height + self.row) * width + self.first_column  # (R,)
        return start[:, None] + torch.arange(self.inside.shape[1], device=start.device)


def pack_boxes(extents: Tensor, grid: tuple[int, int], border: int) -> Iterator[PackedBoxes]:
    """Packs all boxes, each with a border, into as many packings as their widths ask for.

    The sizes of the packings depend on the data, so this synchronizes with the device, once.

    Args:
        extents: (M, 4) as in `BoxRegions`.
        grid: h and w.
        border: cells on each side of a box.
    """
    if len(extents) == 0:
        return
    heights, widths = _sizes(extents.cpu(), border)  # (M,) each
    order = widths.argsort(descending=True, stable=True)
    # Boxes of one class of widths share a packing, which ends where it would grow too large.
    width_class = (widths[order].double().log() / math.log(_WIDTH_RATIO)).ceil().long()
    limit = _MAX_CELLS_ON_CPU if extents.device.type == "cpu" else _MAX_CELLS
    part = (heights * widths)[order].cumsum(0) // limit
    _, counts = torch.unique_consecutive(torch.stack([width_class, part]), dim=1, return_counts=True)
    for masks in order.split(counts.tolist()):
        rows, columns = int(heights[masks].sum()), int(widths[masks].max())
        yield _packed(extents, masks.to(extents.device, non_blocking=True), rows, columns, grid, border)


def _sizes(extents: Tensor, border: int) -> tuple[Tensor, Tensor]:
    heights, widths = (extents[:, 2:] - extents[:, :2] + 2 * border).unbind(1)
    return heights, widths


def _packed(
    extents: Tensor, masks: Tensor, rows: int, columns: int, grid: tuple[int, int], border: int
) -> PackedBoxes:
    heights, _ = _sizes(extents[masks], border)
    place = torch.repeat_interleave(
        torch.arange(len(masks), device=masks.device), heights, output_size=rows
    )  # (R,)
    top, left, bottom, right = extents[masks][place].unbind(1)  # (R,) each
    row_in_box = torch.arange(rows, device=masks.device) - (heights.cumsum(0) - heights)[place]
    row = row_in_box + top - border  # (R,)
    first_column = left - border  # (R,)
    column = torch.arange(columns, device=masks.device)  # (S,)
    grid_end = torch.where((row >= 0) & (row < grid[0]), grid[1] - first_column, 0)  # (R,)
    box_end = torch.where((row >= top) & (row < bottom), right - first_column, 0)  # (R,)
    return PackedBoxes(
        grid=grid,
        mask=masks[place],
        row=row,
        first_column=first_column,
        inside=(column >= -first_column[:, None]) & (column < grid_end[:, None]),
        in_box=(column >= border) & (column < box_end[:, None]),
    )
