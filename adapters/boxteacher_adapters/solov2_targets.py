"""SOLOv2's targets: the class of each cell of the grids, and the cells whose masks are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from boxteacher.adapter import Target, flat_targets, global_count, num_processes
from boxteacher_adapters.parts.grouping import share_evenly

_CENTER_SIZE = 0.2  # side of a box's center region, whose cells are positive, in sides of the box


@dataclass(frozen=True)
class GridCells:
    """The S cells of all levels' square grids, laid end to end, each level's row by row.

    Attributes:
        row: (S,) int64.
        column: (S,) int64.
        grid: (S,) int64, cells per side of the cell's level.
        min_size: (S,) minimum √area in pixels of the boxes of the cell's level.
        max_size: (S,) maximum, likewise.
    """

    row: Tensor
    column: Tensor
    grid: Tensor
    min_size: Tensor
    max_size: Tensor


@dataclass(frozen=True)
class GridMatches:
    """The target of each cell.

    Attributes:
        positive: (T, S) bool, cells that predict the target's mask; T targets of the batch laid end to end.
        image_index: (T,) int64 of the targets.
        labels: (T,) int64 of the targets.
        cell_labels: (B, S) int64, C for background; where targets share a cell, the last one's.
    """

    positive: Tensor
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
    minima, maxima = zip(*size_ranges, strict=True)
    return GridCells(index // grid, index % grid, grid, of_cells(minima), of_cells(maxima))


def match_cells(
    cells: GridCells, targets: Sequence[Target], padded_size: tuple[int, int], num_classes: int
) -> GridMatches:
    """Assigns to each target the cells around its box's center, on the levels of its size.

    The center region is a fifth of the box, and at most one cell to each side of the center's (SOLO, ECCV
    2020, Sec. 3.3). The original takes the mask's center of mass, which for a filled box is the box's.

    Args:
        cells: S of them.
        targets: one per image.
        padded_size: height and width in pixels of the padded batch, which each grid divides.
        num_classes: C, the label of background.
    """
    boxes, labels, image_index = flat_targets(targets)  # (T, 4), (T,), (T,)
    positive = _positive_cells(cells, boxes.float(), padded_size)  # (T, S)

    order = torch.arange(len(boxes), device=boxes.device)[:, None]  # (T, 1)
    last = torch.full((len(targets), len(cells.row)), -1, device=boxes.device).scatter_reduce(
        0, image_index[:, None].expand_as(positive), torch.where(positive, order, -1), "amax"
    )  # (B, S) index of the last target; −1 for none, which finds background's label at the end
    return GridMatches(positive, image_index, labels, F.pad(labels, (0, 1), value=num_classes)[last])


def best_cells(
    cells: GridCells,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    image_index: Tensor,
    padded_size: tuple[int, int],
) -> Tensor:
    """The cell (T,) int64 that predicts each known box best: the positive one of the most probable class.

    A box without a positive cell, whose center lies outside the image, gets the cell nearest to that.

    Args:
        cells: S of them.
        logits: (B, S, C) of the classes.
        boxes: (T, 4) in pixels.
        labels: (T,) int64.
        image_index: (T,) int64.
        padded_size: height and width in pixels of the padded batch.
    """
    label = labels.clamp(0, logits.shape[-1] - 1)  # forward_student, which comes after, names those beyond
    probability = logits[image_index, :, label].float().sigmoid()  # (T, S)
    positive = _positive_cells(cells, boxes.float(), padded_size)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2  # (T, 2) x, y
    across = (cells.column + 0.5) / cells.grid * padded_size[1] - center[:, :1]  # (T, S) in pixels
    down = (cells.row + 0.5) / cells.grid * padded_size[0] - center[:, 1:]  # (T, S)
    nearness = -torch.hypot(across, down)
    return torch.where(positive.any(1, keepdim=True), probability + positive, nearness).argmax(1)


def _positive_cells(cells: GridCells, boxes: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Cells around the centers of boxes (T, 4), on the levels of their size: (T, S) bool."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)  # (T, 2)
    root_area = size.prod(1).sqrt()[:, None]  # (T, 1)
    center = (boxes[:, :2] + boxes[:, 2:] - 1) / 2  # (T, 2) x, y of the middle pixel
    reach = size * (_CENTER_SIZE / 2)  # (T, 2)
    return (
        (root_area >= cells.min_size)
        & (root_area <= cells.max_size)
        & _near(cells.column, cells.grid, center[:, :1], reach[:, :1], padded_size[1])
        & _near(cells.row, cells.grid, center[:, 1:], reach[:, 1:], padded_size[0])
    )


def _near(cell: Tensor, grid: Tensor, center: Tensor, reach: Tensor, length: int) -> Tensor:
    """Cells in the center region, at most one from the center's cell along one axis: (T, S) bool."""
    cells_per_pixel = grid / length  # (S,)
    middle = (center * cells_per_pixel).floor()  # (T, S)
    first = ((center - reach) * cells_per_pixel).floor().maximum(middle - 1)
    last = ((center + reach) * cells_per_pixel).floor().minimum(middle + 1)
    return (cell >= first) & (cell <= last)


@torch.no_grad()
def sample_positives(matches: GridMatches, logits: Tensor, max_samples: int) -> tuple[Tensor, Tensor]:
    """Target and cell (M,) of the positives whose masks are predicted in training.

    An image's targets share `max_samples` evenly; each keeps its cells with the highest probability of its
    class, and at least one if it has a positive cell.

    Args:
        matches: of T targets in B images.
        logits: (B, S, C) of the classes.
        max_samples: maximum number per image.
    """
    target, cell = matches.positive.nonzero(as_tuple=True)  # (P,) each
    image_index = matches.image_index[target]
    probability = logits[image_index, cell, matches.labels[target]].float().sigmoid()  # (P,)
    kept = share_evenly(image_index, target, probability, len(matches.cell_labels), max_samples)
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
    return focal / (global_count((labels < num_classes).sum()) + 1 / num_processes())
