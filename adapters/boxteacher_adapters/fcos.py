"""FCOS (ICCV 2019): boxes, classes and centerness from every location of a feature pyramid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms, sigmoid_focal_loss

from boxteacher.protocol import Target
from boxteacher_adapters.parts.grouping import rank_in_group

_CENTER_RADIUS = 1.5  # strides, of the square round a box's centre whose locations are positive
_CLASS_THRESHOLD = 0.05  # least class probability of a detection
_CANDIDATES_PER_LEVEL = 1000  # entries (location and class) of each level and image that go to NMS
_NMS_THRESHOLD = 0.6  # a box goes if a better one of its class overlaps it with more than this IoU
_DETECTIONS_PER_IMAGE = 100


@dataclass(frozen=True)
class Locations:
    """The L locations of a pyramid's levels, laid end to end.

    Attributes:
        centers: (L, 2) x, y in pixels.
        level: (L,) int64.
        stride: (L,) in pixels.
        counts: locations of each level, L in all.
    """

    centers: Tensor
    level: Tensor
    stride: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class DensePredictions:
    """What the head says at each location.

    Attributes:
        class_logits: (B, L, C).
        distances: (B, L, 4) to the box's left, top, right and bottom side, in strides, ≥ 0.
        centerness: (B, L) logits.
        controllers: (B, L, P) parameters of the mask head.
    """

    class_logits: Tensor
    distances: Tensor
    centerness: Tensor
    controllers: Tensor


@dataclass(frozen=True)
class DenseTargets:
    """What each location is to predict.

    Attributes:
        target_index: (B, L) int64 into all targets of the batch laid end to end, −1 for background.
        labels: (B, L) int64, C for background.
        distances: (B, L, 4) in strides; of no meaning for background.
    """

    target_index: Tensor
    labels: Tensor
    distances: Tensor


class FCOSHead(nn.Module):
    """Two towers shared by all levels; the controllers of dynamic masks come from the box tower.

    Args:
        channels: of the pyramid.
        num_classes: C.
        num_convs: convolutions per tower.
        num_levels: of the pyramid, each with a scale of its own for distances.
        num_controller_params: P.
    """

    def __init__(
        self, channels: int, num_classes: int, num_convs: int, num_levels: int, num_controller_params: int
    ) -> None:
        super().__init__()
        self.class_tower = _tower(channels, num_convs)
        self.box_tower = _tower(channels, num_convs)
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.controller = nn.Conv2d(channels, num_controller_params, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        prior = 0.01  # of every class at first
        self.class_logits.bias = nn.Parameter(torch.full((num_classes,), math.log(prior / (1 - prior))))

    def forward(self, pyramid: Sequence[Tensor]) -> DensePredictions:
        """Predictions at all locations of the levels (B, channels, h_i, w_i)."""
        levels = []
        for features, scale in zip(pyramid, self.scales, strict=True):
            class_features, box_features = self.class_tower(features), self.box_tower(features)
            levels.append(
                (
                    _by_location(self.class_logits(class_features)),
                    _by_location(F.relu(self.distances(box_features) * scale)),
                    _by_location(self.centerness(box_features))[..., 0],
                    _by_location(self.controller(box_features)),
                )
            )
        return DensePredictions(*(torch.cat(parts, 1) for parts in zip(*levels, strict=True)))


def _tower(channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(32, channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _by_location(maps: Tensor) -> Tensor:
    """(B, D, h, w) to (B, h · w, D)."""
    return maps.flatten(2).transpose(1, 2)


def pyramid_locations(pyramid: Sequence[Tensor], strides: Sequence[int]) -> Locations:
    """The middle of every cell of the levels (B, D, h_i, w_i)."""
    centers, levels, all_strides, counts = [], [], [], []
    for level, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
        height, width = features.shape[-2:]
        x = torch.arange(width, device=features.device) * stride + stride // 2
        y = torch.arange(height, device=features.device) * stride + stride // 2
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        centers.append(torch.stack([columns.flatten(), rows.flatten()], 1).float())  # (h · w, 2)
        counts.append(height * width)
        levels.append(torch.full((height * width,), level, device=features.device))
        all_strides.append(torch.full((height * width,), float(stride), device=features.device))
    return Locations(torch.cat(centers), torch.cat(levels), torch.cat(all_strides), tuple(counts))


def match_locations(
    locations: Locations,
    targets: Sequence[Target],
    level_sizes: Sequence[float],
    num_classes: int,
) -> DenseTargets:
    """Gives each location the smallest box whose centre is near and whose size its level is there for.

    Args:
        locations: L of them.
        targets: of B images.
        level_sizes: the greatest distance to a side, in pixels, that each level but the last is there for.
        num_classes: C, the label of background.
    """
    bounds = locations.centers.new_tensor([-1.0, *level_sizes, math.inf])
    lower, upper = bounds[locations.level][:, None], bounds[locations.level + 1][:, None]  # (L, 1)
    index, labels, distances = [], [], []
    first = 0
    for target in targets:
        boxes = target["boxes"].float()  # (N, 4)
        count = len(boxes)
        sides = _distances(locations.centers, boxes)  # (L, N, 4) in pixels
        farthest = sides.amax(2)  # (L, N)
        positive = _near_center(locations, boxes) & (farthest >= lower) & (farthest <= upper)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # (N,)
        # A last column, larger than any box, is the background's, so that images without boxes work too.
        areas = F.pad(torch.where(positive, area, math.inf), (0, 1), value=torch.finfo(area.dtype).max)
        chosen = areas.argmin(1)  # (L,)
        background = chosen == count
        index.append(torch.where(background, -1, first + chosen))
        labels.append(F.pad(target["labels"], (0, 1), value=num_classes)[chosen])
        sides = F.pad(sides, (0, 0, 0, 1))  # (L, N + 1, 4)
        nearest = sides.gather(1, chosen[:, None, None].expand(-1, 1, 4))[:, 0]  # (L, 4)
        distances.append(nearest / locations.stride[:, None])
        first += count
    return DenseTargets(torch.stack(index), torch.stack(labels), torch.stack(distances))


def _distances(points: Tensor, boxes: Tensor) -> Tensor:
    """From points (L, 2) to the sides of boxes (N, 4), inwards positive: (L, N, 4)."""
    x, y = points[:, None, 0], points[:, None, 1]  # (L, 1)
    return torch.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y], 2)


def _near_center(locations: Locations, boxes: Tensor) -> Tensor:
    """(L, N): the location is in the box, and near its centre on both axes."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N, 2)
    reach = (_CENTER_RADIUS * locations.stride)[:, None]  # (L, 1)
    offset = (locations.centers[:, None] - center).abs()  # (L, N, 2)
    inside = _distances(locations.centers, boxes).amin(2) > 0
    return inside & (offset.amax(2) < reach)


def fcos_losses(predictions: DensePredictions, targets: DenseTargets) -> dict[str, Tensor]:
    """Focal loss of classes, GIoU loss of boxes weighted by centerness, and centerness (FCOS, Eq. 2 and 3).

    Returns:
        `loss_classification`, `loss_box`, `loss_centerness`: scalars, over the number of positives.
    """
    num_classes = predictions.class_logits.shape[-1]
    positive = (targets.target_index >= 0).nonzero(as_tuple=True)  # image and location, (M,) each
    count = max(len(positive[0]), 1)
    one_hot = F.one_hot(targets.labels, num_classes + 1)[..., :num_classes].float()  # (B, L, C)
    focal = sigmoid_focal_loss(predictions.class_logits.float(), one_hot, reduction="sum")

    wanted = targets.distances[positive]  # (M, 4)
    center_wanted = centerness_of(wanted)  # (M,)
    giou = giou_loss(predictions.distances[positive].float(), wanted)  # (M,)
    center_logits = predictions.centerness[positive].float()
    center = F.binary_cross_entropy_with_logits(center_logits, center_wanted, reduction="sum")
    return {
        "loss_classification": focal / count,
        "loss_box": (giou * center_wanted).sum() / center_wanted.sum().clamp(min=1e-6),
        "loss_centerness": center / count,
    }


def centerness_of(distances: Tensor) -> Tensor:
    """√(min(l, r) / max(l, r) · min(t, b) / max(t, b)), (M,), of distances (M, 4) (FCOS, Eq. 3)."""
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]  # (M, 2) each
    ratio = (horizontal.amin(1) / horizontal.amax(1)) * (vertical.amin(1) / vertical.amax(1))
    return ratio.sqrt()


def giou_loss(distances: Tensor, wanted: Tensor) -> Tensor:
    """1 − GIoU (CVPR 2019) of boxes round a common point, given by their distances to it.

    One square stride is added to intersection and union, as CondInst's released code does: it spares
    objects smaller than a cell, for which torchvision's `generalized_box_iou_loss` is all or nothing.

    Args:
        distances: (M, 4) left, top, right, bottom, in strides, ≥ 0.
        wanted: (M, 4), likewise.

    Returns:
        (M,) in [0, 2].
    """
    intersection = _area(torch.minimum(distances, wanted))
    union = _area(distances) + _area(wanted) - intersection
    hull = _area(torch.maximum(distances, wanted))
    return 1 - (intersection + 1) / (union + 1) + (hull - union) / hull.clamp(min=1e-7)


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(1)
    return (left + right) * (top + bottom)


@dataclass(frozen=True)
class DenseDetections:
    """The K best boxes of a batch.

    Attributes:
        boxes: (K, 4) in pixels, inside the image.
        scores: (K,) √(class · centerness).
        labels: (K,) int64.
        image_index: (K,) int64; images in order, best box first in each.
        location: (K,) int64, where among the L locations the box comes from.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_index: Tensor
    location: Tensor


def select_detections(
    predictions: DensePredictions,
    locations: Locations,
    image_sizes: Sequence[tuple[int, int]],
) -> DenseDetections:
    """Boxes above the class threshold, without near duplicates of the same class and image.

    Args:
        predictions: of B images at L locations.
        locations: L of them.
        image_sizes: height and width in pixels of each image.
    """
    num_classes = predictions.class_logits.shape[-1]
    class_probability = predictions.class_logits.float().sigmoid()  # (B, L, C)
    scores = (class_probability * predictions.centerness.float().sigmoid()[..., None]).sqrt()
    scores = torch.where(class_probability > _CLASS_THRESHOLD, scores, -1.0)
    best, entries = [], []
    first = 0
    for count in locations.counts:
        level_scores = scores[:, first : first + count].flatten(1)  # (B, L_i · C)
        values, entry = level_scores.topk(min(_CANDIDATES_PER_LEVEL, level_scores.shape[1]), dim=1)
        best.append(values)
        entries.append(first * num_classes + entry)
        first += count
    score, entry = torch.cat(best, 1), torch.cat(entries, 1)  # (B, candidates)
    image, place = (score > 0).nonzero(as_tuple=True)  # (K,) each
    score, entry = score[image, place], entry[image, place]
    location, label = entry // num_classes, entry % num_classes
    sides = predictions.distances[image, location].float() * locations.stride[location, None]
    center = locations.centers[location]
    boxes = torch.cat([center - sides[:, :2], center + sides[:, 2:]], 1)  # (K, 4)
    keep = suppress_in_groups(boxes, score, image * num_classes + label, _NMS_THRESHOLD)
    boxes = _clip(boxes, image, image_sizes)
    there = (boxes[keep, 2:] > boxes[keep, :2]).all(1)  # not wholly in the canvas's padding
    keep = keep[(rank_in_group(image[keep], score[keep]) < _DETECTIONS_PER_IMAGE) & there]
    keep = keep[image[keep].argsort(stable=True)]
    return DenseDetections(boxes[keep], score[keep], label[keep], image[keep], location[keep])


def suppress_in_groups(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """torchvision's `batched_nms`, in a form that torch.export can trace as well.

    Args:
        boxes: (N, 4).
        scores: (N,).
        group: (N,) int64; boxes of different groups leave one another alone.
        threshold: a box goes if a better one of its group overlaps it with more than this IoU.

    Returns:
        (K,) int64, the boxes that stay, best first.
    """
    if not torch.compiler.is_compiling():
        return batched_nms(boxes, scores, group, threshold)
    # batched_nms takes one of two ways by the number of boxes, which no trace knows. This is its way for few:
    # each group in a square of its own. torchvision tells the tracer that at least two boxes stay, so two
    # without area, which overlap none and come last, are added and taken away.
    padded = F.pad(boxes, (0, 0, 0, 2))  # (N + 2, 4)
    side = padded.max() - padded.min() + 1
    shifted = padded + (F.pad(group, (0, 2)) * side)[:, None]
    return nms(shifted, F.pad(scores, (0, 2), value=-math.inf), threshold)[:-2]


def _clip(boxes: Tensor, image: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    sizes = torch.tensor(image_sizes, device=boxes.device, dtype=boxes.dtype)[image]  # (K, 2) h, w
    limit = sizes.flip(1).repeat(1, 2)  # (K, 4)
    return boxes.clamp(min=0).minimum(limit)
