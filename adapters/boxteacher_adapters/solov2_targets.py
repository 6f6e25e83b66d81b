"""SOLOv2's grids: which cells are to predict which target, and which of them draw its mask in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from boxteacher.protocol import Target
from boxteacher_adapters.parts.grouping import share_evenly

_CENTER_SIZE = 0.2  # of the box: the region round its centre whose cells are positive


@dataclass(frozen=True)
class GridCells:
    """The S cells of all levels' square grids, laid end to end, each level's row by row.

    Attributes:
        row: (S,) int64.
        column: (S,) int64.
        grid: (S,) int64, cells per side of the cell's level.
        least_size: (S,) √area in pixels of the smallest box that the cell's level is there for.
        most_size: (S,) and of the largest.
    """

    row: Tensor
    column: Tensor
    grid: Tensor
    least_size: Tensor
    most_size: Tensor


@dataclass(frozen=True)
class GridMatches:
    """What each cell is to predict.

    Attributes:
        hit: (T, S) bool, the cell is to draw the target's mask; T targets of the batch laid end to end.
        image_index: (T,) int64 of the targets.
        labels: (T,) int64 of the targets.
        cell_labels: (B, S) int64, C for background. Where targets share a cell, the last one's.
    """

    hit: Tensor
    image_index: Tensor
    labels: Tensor
    cell_labels: Tensor


def grid_cells(
    grids: Sequence[int], size_ranges: Sequence[tuple[float, float]], device: torch.device
) -> GridCells:
    """The cells of levels with `grids[i]` cells per side for boxes of √area in `size_ranges[i]`."""
    counts = torch.tensor([grid * grid for grid in grids], device=device)
    total = sum(grid * grid for grid in grids)

    def of_cells(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(counts, output_size=total)  # (S,)

    grid = of_cells(grids)
    index = torch.cat([torch.arange(grid * grid, device=device) for grid in grids])  # (S,) in its level
    least, most = zip(*size_ranges, strict=True)
    return GridCells(index // grid, index % grid, grid, of_cells(least), of_cells(most))


def match_cells(
    cells: GridCells, targets: Sequence[Target], canvas: tuple[int, int], num_classes: int
) -> GridMatches:
    """Gives each target the cells round its box's centre, on the levels that are there for its size.

    The centre region is a fifth of the box, and at most a cell to each side of the centre's (SOLO, ECCV
    2020, Sec. 3.3). The original takes the mask's centre of mass, which for a filled box is the box's.

    Args:
        cells: S of them.
        targets: of B images.
        canvas: height and width in pixels that each grid is laid over.
        num_classes: C, the label of background.
    """
    device = cells.row.device
    counts = torch.tensor([len(target["boxes"]) for target in targets], device=device)
    boxes = torch.cat([target["boxes"] for target in targets]).float()  # (T, 4)
    labels = torch.cat([target["labels"] for target in targets])  # (T,)
    image_index = torch.arange(len(targets), device=device).repeat_interleave(counts, output_size=len(boxes))

    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)  # (T, 2)
    root_area = size.prod(1).sqrt()[:, None]  # (T, 1)
    center = (boxes[:, :2] + boxes[:, 2:] - 1) / 2  # (T, 2) x, y of the middle pixel
    reach = size * (_CENTER_SIZE / 2)  # (T, 2)
    hit = (
        (root_area >= cells.least_size)
        & (root_area <= cells.most_size)
        & _near(cells.column, cells.grid, center[:, :1], reach[:, :1], canvas[1])
        & _near(cells.row, cells.grid, center[:, 1:], reach[:, 1:], canvas[0])
    )  # (T, S)

    order = torch.arange(len(boxes), device=device)[:, None]  # (T, 1)
    last = torch.full((len(targets), len(cells.row)), -1, device=device).scatter_reduce(
        0, image_index[:, None].expand_as(hit), torch.where(hit, order, -1), "amax"
    )  # (B, S) target index, −1 for none: which finds the entry for background at the end
    return GridMatches(hit, image_index, labels, F.pad(labels, (0, 1), value=num_classes)[last])


def _near(cell: Tensor, grid: Tensor, center: Tensor, reach: Tensor, length: int) -> Tensor:
    """(T, S): along one axis, the cell lies in the centre region and next to the centre's cell at most."""
    cells_per_pixel = grid / length  # (S,)
    middle = (center * cells_per_pixel).floor()  # (T, S)
    first = ((center - reach) * cells_per_pixel).floor().maximum(middle - 1)
    last = ((center + reach) * cells_per_pixel).floor().minimum(middle + 1)
    return (cell >= first) & (cell <= last)


def select_samples(matches: GridMatches, probability: Tensor, max_samples: int) -> tuple[Tensor, Tensor]:
    """Target and cell (M,) of the positives whose masks are drawn.

    Where an image has too many, its targets share the number evenly, each with the cells that are surest of
    its class; every target that has a positive cell keeps at least one.

    Args:
        matches: of T targets in B images.
        probability: (B, S, C) of the classes.
        max_samples: per image.
    """
    target, cell = matches.hit.nonzero(as_tuple=True)  # (P,) each
    image = matches.image_index[target]
    surety = probability[image, cell, matches.labels[target]]  # (P,)
    kept = share_evenly(image, target, surety, len(matches.cell_labels), max_samples)
    return target[kept], cell[kept]


def category_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss of the classes over one more than the number of positive cells, a scalar.

    Args:
        logits: (B, S, C).
        labels: (B, S) int64, C for background.
    """
    num_classes = logits.shape[-1]
    one_hot = F.one_hot(labels, num_classes + 1)[..., :num_classes].float()  # (B, S, C)
    focal = sigmoid_focal_loss(logits.float(), one_hot, reduction="sum")
    return focal / ((labels < num_classes).sum() + 1)
