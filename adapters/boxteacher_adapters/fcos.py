"""FCOS (ICCV 2019): boxes, classes and centerness from every location of a feature pyramid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, batched_nms, nms, sigmoid_focal_loss

from boxteacher.adapter import Target, global_count, grid_coordinates
from boxteacher_adapters.parts.grouping import rank_in_group, share_evenly
from boxteacher_adapters.parts.maps import flatten_levels

_CLASS_PRIOR = 0.01  # initial probability of every class (RetinaNet, ICCV 2017, Sec. 4.1)
_CENTER_RADIUS = 1.5  # distance in strides, on both axes, below which a location is near a box's center
_CLASS_THRESHOLD = 0.05  # class probability that a detection must exceed
_CANDIDATES_PER_LEVEL = 1000  # pairs of location and class that go to NMS, per level and image, at least
_CANDIDATES_PER_DETECTION = 10
_NMS_THRESHOLD = 0.6  # IoU with a better box of the same class above which a box is removed


@dataclass(frozen=True)
class Locations:
    """The L locations of a pyramid's levels, laid end to end.

    Attributes:
        centers: (L, 2) x, y in pixels.
        level: (L,) int64.
        stride: (L,) in pixels.
        counts: numbers of locations of each level, L in all.
    """

    centers: Tensor
    level: Tensor
    stride: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class DensePredictions:
    """The head's outputs at all locations.

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
    """The target of each location.

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
        channels: number of the pyramid's channels.
        num_classes: C.
        num_convs: number of convolutions per tower.
        num_levels: number of the pyramid's levels, each with its own scale of distances.
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
        prior_logit = math.log(_CLASS_PRIOR / (1 - _CLASS_PRIOR))
        self.class_logits.bias = nn.Parameter(torch.full((num_classes,), prior_logit))

    def forward(self, pyramid: Sequence[Tensor]) -> DensePredictions:
        """Predictions at all locations of the levels (B, channels, h_i, w_i)."""
        levels = []
        for features, scale in zip(pyramid, self.scales, strict=True):
            class_features, box_features = self.class_tower(features), self.box_tower(features)
            distances = F.relu(self.distances(box_features) * scale)
            centerness, controllers = self.centerness(box_features), self.controller(box_features)
            levels.append((self.class_logits(class_features), distances, centerness, controllers))
        class_logits, distances, centerness, controllers = map(flatten_levels, zip(*levels, strict=True))
        return DensePredictions(class_logits, distances, centerness[..., 0], controllers)


def _tower(channels: int, num_convs: int) -> nn.Sequential:
    norm = partial(nn.GroupNorm, 32)
    blocks = [Conv2dNormActivation(channels, channels, norm_layer=norm, bias=True) for _ in range(num_convs)]
    return nn.Sequential(*chain(*blocks))


def pyramid_locations(pyramid: Sequence[Tensor], strides: Sequence[int]) -> Locations:
    """The center of every cell of the levels (B, D, h_i, w_i)."""
    device = pyramid[0].device
    centers, counts = [], []  # (h_i · w_i, 2) each
    for features, stride in zip(pyramid, strides, strict=True):
        height, width = features.shape[-2:]
        rows, columns = grid_coordinates(height * stride, width * stride, stride, device)
        centers.append(torch.cartesian_prod(rows, columns).flip(1).float())
        counts.append(height * width)
    level = torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(counts)])  # (L,)
    stride_of_level = torch.tensor(strides, device=device, dtype=torch.float32)
    return Locations(torch.cat(centers), level, stride_of_level[level], tuple(counts))


def match_locations(
    locations: Locations,
    targets: Sequence[Target],
    level_sizes: Sequence[float],
    num_classes: int,
) -> DenseTargets:
    """Assigns to each location the smallest box whose center is near and whose size belongs to its level.

    Args:
        locations: L of them.
        targets: one per image.
        level_sizes: maximum distance in pixels from a location to a side of its box, of each level but the
            last.
        num_classes: C, the label of background.
    """
    index, labels, distances = [], [], []
    first = 0
    for target in targets:
        boxes = target["boxes"].float()  # (N, 4)
        count = len(boxes)
        sides, positive = _positive_locations(locations, boxes, level_sizes)  # (L, N, 4), (L, N)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # (N,)
        # A last column, larger than any box, is the background's, so that images without boxes work too.
        areas = F.pad(torch.where(positive, area, math.inf), (0, 1), value=torch.finfo(area.dtype).max)
        chosen = areas.argmin(1)  # (L,)
        background = chosen == count
        index.append(torch.where(background, -1, first + chosen))
        labels.append(F.pad(target["labels"], (0, 1), value=num_classes)[chosen])
        sides = F.pad(sides, (0, 0, 0, 1))  # (L, N + 1, 4)
        chosen_sides = sides.gather(1, chosen[:, None, None].expand(-1, 1, 4))[:, 0]  # (L, 4)
        distances.append(chosen_sides / locations.stride[:, None])
        first += count
    return DenseTargets(torch.stack(index), torch.stack(labels), torch.stack(distances))


def _positive_locations(
    locations: Locations, boxes: Tensor, level_sizes: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Distances (L, N, 4) in pixels from L locations to the sides of boxes (N, 4), and which are positive."""
    bounds = locations.centers.new_tensor([-1.0, *level_sizes, math.inf])
    lower, upper = bounds[locations.level][:, None], bounds[locations.level + 1][:, None]  # (L, 1)
    radius = (_CENTER_RADIUS * locations.stride)[:, None]  # (L, 1)
    points = locations.centers[:, None]  # (L, 1, 2)
    sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], 2)  # (L, N, 4)
    farthest = sides.amax(2)  # (L, N)
    offset = (points - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(2)  # (L, N)
    inside = (sides.amin(2) > 0) & (offset < radius)
    return sides, inside & (farthest >= lower) & (farthest <= upper)


def best_locations(
    predictions: DensePredictions,
    locations: Locations,
    boxes: Tensor,
    labels: Tensor,
    image_index: Tensor,
    level_sizes: Sequence[float],
) -> Tensor:
    """The location (T,) int64 that predicts each known box best.

    That is the one with the largest √(class · centerness) · IoU of the predicted box. Locations that would be
    positive for the box come first; the others serve a box that lies between the locations' centers.

    Args:
        predictions: of B images at L locations.
        locations: L of them.
        boxes: (T, 4) in pixels.
        labels: (T,) int64.
        image_index: (T,) int64.
        level_sizes: as in `match_locations`.
    """
    sides, positive = _positive_locations(locations, boxes, level_sizes)  # (L, T, 4), (L, T)
    predicted = predictions.distances[image_index].float() * locations.stride[:, None]  # (T, L, 4)
    actual = sides.transpose(0, 1)  # (T, L, 4)
    intersection = _area(torch.minimum(predicted, actual))
    union = _area(predicted) + _area(actual) - intersection  # (T, L)
    # Labels out of range are named by forward_student, which comes after.
    label = labels.clamp(0, predictions.class_logits.shape[-1] - 1)
    own_class = predictions.class_logits[image_index, :, label].float().sigmoid()  # (T, L)
    centerness = predictions.centerness[image_index].float().sigmoid()
    score = (own_class * centerness).sqrt() * intersection / union.clamp(min=1e-6)  # (T, L)
    return (score + positive.T).argmax(1)


@torch.no_grad()
def sample_positives(
    predictions: DensePredictions, targets: DenseTargets, max_samples: int
) -> tuple[Tensor, Tensor]:
    """Image index and location (M,) of the positive locations whose masks are predicted in training.

    An image's targets share `max_samples` evenly; each keeps its locations with the highest class probability
    times centerness, as in CondInst's released code.
    """
    image_index, location = (targets.target_index >= 0).nonzero(as_tuple=True)  # (P,) each
    probability = predictions.class_logits[image_index, location].float().sigmoid().amax(1)  # (P,)
    score = probability * predictions.centerness[image_index, location].float().sigmoid()
    target_index = targets.target_index[image_index, location]
    kept = share_evenly(image_index, target_index, score, len(targets.target_index), max_samples)
    return image_index[kept], location[kept]


def fcos_losses(predictions: DensePredictions, targets: DenseTargets) -> dict[str, Tensor]:
    """Focal loss of classes, GIoU loss of boxes weighted by centerness, and centerness (FCOS, Eq. 2 and 3).

    Returns:
        `loss_classification`, `loss_box`, `loss_centerness`: scalars, over the number of positives.
    """
    num_classes = predictions.class_logits.shape[-1]
    positive = (targets.target_index >= 0).nonzero(as_tuple=True)  # image index and location, (P,) each
    one_hot = F.one_hot(targets.labels, num_classes + 1)[..., :num_classes].float()  # (B, L, C)
    focal = sigmoid_focal_loss(predictions.class_logits.float(), one_hot, reduction="sum")

    distances = targets.distances[positive]  # (P, 4)
    centerness = centerness_of(distances)  # (P,)
    giou = giou_loss(predictions.distances[positive].float(), distances)  # (P,)
    logits = predictions.centerness[positive].float()  # (P,)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, centerness, reduction="sum")

    # Every process calls these, also without a positive location.
    count = global_count((targets.target_index >= 0).sum(), minimum=1)
    total_centerness = global_count(centerness.sum(), minimum=1e-6)
    return {
        "loss_classification": focal / count,
        "loss_box": (giou * centerness).sum() / total_centerness,
        "loss_centerness": cross_entropy / count,
    }


def centerness_of(distances: Tensor) -> Tensor:
    """√(min(l, r) / max(l, r) · min(t, b) / max(t, b)), (M,), of distances (M, 4) (FCOS, Eq. 3)."""
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]  # (M, 2) each
    ratio = (horizontal.amin(1) / horizontal.amax(1)) * (vertical.amin(1) / vertical.amax(1))
    return ratio.sqrt()


def giou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """1 − GIoU (CVPR 2019) of boxes around a common point, given by their distances to it.

    One square stride is added to intersection and union, as in CondInst's released code, for the sake of
    objects smaller than a cell, for which torchvision's `generalized_box_iou_loss` is all or nothing.

    Args:
        distances: (M, 4) left, top, right, bottom, in strides, ≥ 0.
        targets: (M, 4), likewise.

    Returns:
        (M,) in [0, 2].
    """
    intersection = _area(torch.minimum(distances, targets))
    union = _area(distances) + _area(targets) - intersection
    enclosing = _area(torch.maximum(distances, targets))
    return 1 - (intersection + 1) / (union + 1) + (enclosing - union) / enclosing.clamp(min=1e-7)


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(-1)
    return (left + right).clamp(min=0) * (top + bottom).clamp(min=0)


@dataclass(frozen=True)
class DenseDetections:
    """The K best boxes of a batch.

    Attributes:
        boxes: (K, 4) in pixels, inside the image.
        scores: (K,) √(class · centerness).
        labels: (K,) int64.
        image_index: (K,) int64; images in order, best box first in each.
        location: (K,) int64, that predicts the box, among the L locations.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_index: Tensor
    location: Tensor


def select_detections(
    predictions: DensePredictions,
    locations: Locations,
    image_sizes: Sequence[Sequence[int]],
    max_detections: int = 100,
) -> DenseDetections:
    """Boxes above the class threshold, after NMS within each class and image.

    Args:
        predictions: of B images at L locations.
        locations: L of them.
        image_sizes: height and width in pixels of each image.
        max_detections: maximum number of boxes per image, the best first.
    """
    candidates = max(_CANDIDATES_PER_LEVEL, _CANDIDATES_PER_DETECTION * max_detections)
    num_classes = predictions.class_logits.shape[-1]
    class_probability = predictions.class_logits.float().sigmoid()  # (B, L, C)
    scores = (class_probability * predictions.centerness.float().sigmoid()[..., None]).sqrt()
    scores = torch.where(class_probability > _CLASS_THRESHOLD, scores, -1.0)
    best, entries = [], []
    first = 0
    for count in locations.counts:
        level_scores = scores[:, first : first + count].flatten(1)  # (B, L_i · C)
        values, entry = level_scores.topk(min(candidates, level_scores.shape[1]), dim=1)
        best.append(values)
        entries.append(first * num_classes + entry)
        first += count
    score, entry = torch.cat(best, 1), torch.cat(entries, 1)  # (B, candidates)
    image, rank = (score > 0).nonzero(as_tuple=True)  # (K,) each
    score, entry = score[image, rank], entry[image, rank]
    location, label = entry // num_classes, entry % num_classes
    sides = predictions.distances[image, location].float() * locations.stride[location, None]
    center = locations.centers[location]
    boxes = torch.cat([center - sides[:, :2], center + sides[:, 2:]], 1)  # (K, 4)
    keep = suppress_in_groups(boxes, score, image * num_classes + label, _NMS_THRESHOLD)
    sizes = torch.tensor(image_sizes, device=boxes.device, dtype=boxes.dtype)[image]  # (K, 2) height, width
    boxes = boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2))
    inside = (boxes[keep, 2:] > boxes[keep, :2]).all(1)  # not wholly in the padding
    keep = keep[(rank_in_group(image[keep], score[keep]) < max_detections) & inside]
    keep = keep[image[keep].argsort(stable=True)]
    return DenseDetections(boxes[keep], score[keep], label[keep], image[keep], location[keep])


def suppress_in_groups(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """torchvision's `batched_nms`, in a form that torch.export can trace as well.

    Args:
        boxes: (N, 4).
        scores: (N,).
        group: (N,) int64; boxes of different groups do not suppress one another.
        threshold: IoU with a better box of the same group above which a box is removed.

    Returns:
        (K,) int64, the boxes that are kept, best first.
    """
    if not torch.compiler.is_compiling():
        return batched_nms(boxes, scores, group, threshold)
    # batched_nms chooses between two implementations by the number of boxes, which no trace knows. This is
    # the one for few: boxes of each group are moved to a square of their own. torchvision tells the tracer
    # that at least two boxes are kept, so two without area, which overlap none and come last, are added and
    # removed.
    padded = F.pad(boxes, (0, 0, 0, 2))  # (N + 2, 4)
    side = padded.max() - padded.min() + 1
    moved = padded + (F.pad(group, (0, 2)) * side)[:, None]
    return nms(moved, F.pad(scores, (0, 2), value=-math.inf), threshold)[:-2]
