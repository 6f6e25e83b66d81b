"""SOLOv2 (NeurIPS 2020): grid cells that predict a class and the kernel that decodes their object's mask."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxteacher.adapter import (
    Candidates,
    Detections,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    pad_images,
)
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone
from boxteacher_adapters.parts.maps import flatten_levels, mask_boxes, mask_boxes_in_images
from boxteacher_adapters.solov2_masks import (
    Objects,
    Selection,
    centers_to_grid,
    predict_masks,
    select_objects,
)
from boxteacher_adapters.solov2_targets import (
    best_cells,
    category_loss,
    grid_cells,
    match_cells,
    sample_positives,
)

SIZE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, math.inf))
"""Minimum and maximum √area in pixels of the boxes of each level, in images of 1333 pixels."""

_CLASS_PRIOR = 0.01  # initial probability of every class (RetinaNet, ICCV 2017, Sec. 4.1)
_DETECTION = Selection(min_probability=0.1, max_cells=math.inf, max_entries=500, min_score=0.05)
# A teacher proposes from the first step on: whether its masks are any good is for the core to judge.
_PROPOSAL = Selection(min_probability=0.0, max_cells=200, max_entries=200, min_score=0.0)


@dataclass(frozen=True)
class _Features:
    category_maps: list[Tensor]  # (B, C, G_i, G_i) logits of each level
    kernels: Tensor  # (B, S, E) of all levels' cells
    mask_features: Tensor  # (B, E, H / 4, W / 4)


class SOLOv2(Segmenter):
    """SOLOv2 on a feature pyramid P2 to P6; follows `PseudoMaskProvider`.

    All numbers of channels are multiples of 32, as group norm requires.

    Args:
        backbone: backbone with maps of strides 4, 8, 16 and 32.
        num_classes: C; labels are 0 … C−1.
        channels: number of channels of the pyramid.
        head_channels: number of channels of the category and kernel towers.
        num_convs: number of convolutions per tower.
        mask_channels: number of channels of the mask branch.
        num_kernels: E, number of channels of the mask features and of a kernel.
        grids: numbers of cells per side of each level's grid.
        size_ranges: minimum and maximum √area in pixels of the boxes of each level.
        max_samples: maximum number of positive cells per image whose masks are predicted in training; every
            target that has a positive cell keeps at least one.
    """

    mask_stride = 4
    size_divisor = 32
    max_detections = 100

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        head_channels: int = 512,
        num_convs: int = 4,
        mask_channels: int = 128,
        num_kernels: int = 256,
        grids: tuple[int, ...] = (40, 36, 24, 16, 12),
        size_ranges: tuple[tuple[float, float], ...] = SIZE_RANGES,
        max_samples: int = 64,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.grids = grids
        self.size_ranges = size_ranges
        self.max_samples = max_samples
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), channels, extra_blocks=LastLevelMaxPool())
        self.head = SOLOv2Head(channels, num_classes, head_channels, num_convs, num_kernels, grids)
        self.mask_branch = MaskBranch(channels, mask_channels, num_kernels)

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i)."""
        found = self._select(self._features(images), _DETECTION)
        return [
            _detections_of_image(found.only(found.image_index == i), image.shape[-2:])
            for i, image in enumerate(images)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """The best objects after matrix NMS, whatever their scores; their boxes are those of their masks."""
        features = self._features(images)
        found = self._select(features, _PROPOSAL)
        sizes = torch.tensor([image.shape[-2:] for image in images], device=found.logits.device)  # (B, 2)
        boxes = mask_boxes_in_images(found.logits > 0, sizes[found.image_index], self.mask_stride)  # (K, 4)
        inside = (boxes[:, 2] > boxes[:, 0]).nonzero()[:, 0]  # not wholly in the padding
        found, boxes = found.only(inside), boxes[inside]

        def decode_masks(candidates: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return centers_to_grid(found.logits[candidates], self.mask_stride)

        def decode_boxes(boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
            cells = grid_cells(self.grids, self.size_ranges, boxes.device)
            height, width = features.mask_features.shape[-2:]
            cell = best_cells(
                cells,
                flatten_levels(features.category_maps),
                boxes,
                labels,
                image_index,
                (height * self.mask_stride, width * self.mask_stride),
            )
            logits = predict_masks(features.mask_features, image_index, features.kernels[image_index, cell])
            return centers_to_grid(logits, self.mask_stride)

        return Candidates(
            boxes, found.class_scores, found.labels, found.image_index, decode_masks, decode_boxes
        )

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """The category loss, and the masks of positive cells, at most `max_samples` per image."""
        check_labels(targets, self.num_classes)
        features = self._features(images)
        category_logits = flatten_levels(features.category_maps)  # (B, S, C)
        height, width = features.mask_features.shape[-2:]
        matches = match_cells(
            grid_cells(self.grids, self.size_ranges, category_logits.device),
            targets,
            (height * self.mask_stride, width * self.mask_stride),
            self.num_classes,
        )
        target, cell = sample_positives(matches, category_logits, self.max_samples)  # (M,) each
        image_index = matches.image_index[target]
        kernels = features.kernels[image_index, cell]  # (M, E)
        logits = predict_masks(features.mask_features, image_index, kernels)  # (M, H / 4, W / 4)
        masks = MaskPredictions(centers_to_grid(logits, self.mask_stride), target)
        return StudentOutput({"loss_category": category_loss(category_logits, matches.cell_labels)}, [masks])

    def _features(self, images: Sequence[Tensor]) -> _Features:
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = self.backbone(batch)
        pyramid = list(self.fpn(OrderedDict(zip(("p2", "p3", "p4", "p5"), maps, strict=True))).values())
        category_maps, kernel_maps = self.head(pyramid)
        return _Features(category_maps, flatten_levels(kernel_maps), self.mask_branch(pyramid[:4]))

    def _select(self, features: _Features, selection: Selection) -> Objects:
        selection = selection.up_to(self.max_detections)
        return select_objects(features.category_maps, features.kernels, features.mask_features, selection)


def _detections_of_image(found: Objects, size: Sequence[int]) -> Detections:
    probabilities = F.interpolate(
        found.logits.sigmoid()[:, None], scale_factor=SOLOv2.mask_stride, mode="bilinear"
    )[..., : size[0], : size[1]]  # (K, 1, H, W)
    boxes = mask_boxes(probabilities[:, 0] > 0.5)  # (K, 4)
    inside = (boxes[:, 2] > boxes[:, 0]).nonzero()[:, 0]  # not wholly in the padding
    return {
        "boxes": boxes[inside],
        "labels": found.labels[inside],
        "scores": found.scores[inside],
        "masks": probabilities[inside],
    }


class SOLOv2Head(nn.Module):
    """Two towers, shared by all levels, over the pyramid resampled to square grids.

    Args:
        channels: number of channels of the pyramid.
        num_classes: C.
        head_channels: number of channels of the towers.
        num_convs: number of convolutions per tower.
        num_kernels: E.
        grids: numbers of cells per side of each level's grid.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        head_channels: int,
        num_convs: int,
        num_kernels: int,
        grids: Sequence[int],
    ) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.category_tower = _tower(channels, head_channels, num_convs)
        self.kernel_tower = _tower(channels + 2, head_channels, num_convs)
        self.category = nn.Conv2d(head_channels, num_classes, 3, padding=1)
        self.kernel = nn.Conv2d(head_channels, num_kernels, 3, padding=1)
        _initialize(self)
        prior_logit = math.log(_CLASS_PRIOR / (1 - _CLASS_PRIOR))
        self.category.bias = nn.Parameter(torch.full((num_classes,), prior_logit))
        self.kernel.bias = nn.Parameter(torch.zeros(num_kernels))

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """P2 to P6 to category logits (B, C, G_i, G_i) and kernels (B, E, G_i, G_i) of each level."""
        p2, p3, p4, p5, p6 = pyramid
        p2 = F.interpolate(p2, scale_factor=0.5, mode="bilinear")
        p6 = F.interpolate(p6, p5.shape[-2:], mode="bilinear")
        categories, kernels = [], []
        for features, grid in zip((p2, p3, p4, p5, p6), self.grids, strict=True):
            cells = F.interpolate(append_coordinates(features), (grid, grid), mode="bilinear")
            categories.append(self.category(self.category_tower(cells[:, :-2])))
            kernels.append(self.kernel(self.kernel_tower(cells)))
        return categories, kernels


class MaskBranch(nn.Module):
    """The mask features that all masks of an image are decoded from, at stride 4 (SOLOv2, Sec. 3.2).

    Args:
        in_channels: number of channels of P2 to P5.
        channels: number of channels of the levels' sum.
        out_channels: E.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        widths = (in_channels, in_channels, in_channels, in_channels + 2)  # P5 comes with its coordinates
        levels = [_conv_norms([width] + [channels] * max(i, 1)) for i, width in enumerate(widths)]
        for block in chain(*levels[1:]):
            block.append(nn.Upsample(scale_factor=2, mode="bilinear"))
        self.levels = nn.ModuleList(nn.Sequential(*blocks) for blocks in levels)
        self.out = Conv2dNormActivation(channels, out_channels, 1, norm_layer=_GROUP_NORM)
        _initialize(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """P2 to P5 (B, in_channels, h_i, w_i) to (B, out_channels, h_2, w_2)."""
        p2, p3, p4, p5 = levels
        inputs = (p2, p3, p4, append_coordinates(p5))
        return self.out(sum(blocks(maps) for blocks, maps in zip(self.levels, inputs, strict=True)))


_GROUP_NORM = partial(nn.GroupNorm, 32)


def _conv_norms(widths: Sequence[int]) -> list[nn.Sequential]:
    """3 × 3 convolutions from each number of channels to the next, each with group norm and ReLU."""
    return [Conv2dNormActivation(*pair, norm_layer=_GROUP_NORM) for pair in pairwise(widths)]


def _tower(in_channels: int, channels: int, num_convs: int) -> nn.Sequential:
    return nn.Sequential(*chain(*_conv_norms([in_channels] + [channels] * num_convs)))


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)


def append_coordinates(maps: Tensor) -> Tensor:
    """Maps with two more channels: x, then y, from −1 in the first cell to 1 in the last (CoordConv, 2018).

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


def build_solov2(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    mask_samples: int = 64,
) -> SOLOv2:
    """SOLOv2 as in the paper, or, for images of at most 512 pixels, smaller and with coarser grids.

    The small one has a pyramid and towers of 128 channels instead of 256 and 512, two convolutions per tower
    instead of four, a mask branch of 64 channels instead of 128, 64 kernels instead of 256, and grids of half
    as many cells per side; its levels take boxes of the same share of the image.

    Args:
        num_classes: C.
        backbone: name of the backbone; see `build_backbone`.
        weights: weights of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.
        mask_samples: maximum number of masks per image in training; `max_samples` of `SOLOv2`.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights, strides=(4, 8, 16, 32))
    if image_size > 512:
        return SOLOv2(body, num_classes, max_samples=mask_samples)
    share = image_size / 1333
    return SOLOv2(
        body,
        num_classes,
        channels=128,
        head_channels=128,
        num_convs=2,
        mask_channels=64,
        num_kernels=64,
        grids=(20, 18, 12, 8, 6),
        size_ranges=tuple((minimum * share, maximum * share) for minimum, maximum in SIZE_RANGES),
        max_samples=mask_samples,
    )
