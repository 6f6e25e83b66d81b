"""SOLOv2 (NeurIPS 2020): grid cells that predict a class and the kernel that draws their object's mask."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxteacher.errors import InputError
from boxteacher.grid import pad_images
from boxteacher.protocol import Candidates, Detections, MaskPredictions, StudentOutput, Target
from boxteacher.validation import check_labels
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone
from boxteacher_adapters.parts.coordinates import append_coordinates, centers_to_grid
from boxteacher_adapters.parts.extent import mask_extent
from boxteacher_adapters.solov2_masks import Objects, Selection, by_cell, draw_masks, select_objects
from boxteacher_adapters.solov2_targets import category_loss, grid_cells, match_cells, select_samples

SIZE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, math.inf))
"""√area in pixels of the boxes that each level is there for, in images of 1333 pixels."""

_DETECTION = Selection(least_probability=0.1, most_cells=math.inf, most_entries=500, least_score=0.05)
# A teacher proposes from the first step on: whether its masks are any good is for the core to judge.
_PROPOSAL = Selection(least_probability=0.0, most_cells=200, most_entries=200, least_score=0.0)


@dataclass(frozen=True)
class _Features:
    category_maps: list[Tensor]  # (B, C, G_i, G_i) logits of each level
    kernels: Tensor  # (B, S, E) of all levels' cells
    mask_features: Tensor  # (B, E, H / 4, W / 4)


class SOLOv2(nn.Module):
    """SOLOv2 on a feature pyramid P2 to P6; follows `PseudoMaskProvider`.

    Args:
        backbone: maps of strides 4, 8, 16 and 32.
        num_classes: C; labels are 0 … C−1.
        channels: of the pyramid.
        head_channels: of the category and kernel towers.
        num_convs: convolutions per tower.
        mask_channels: of the mask branch.
        num_kernels: E, of the mask features that a kernel weighs.
        grids: cells per side of each level's grid.
        size_ranges: √area in pixels of the smallest and the largest box that each level is there for.
        max_samples: positive cells per image whose masks are drawn in training; every target that has a
            positive cell keeps at least one.

    All numbers of channels, and `num_kernels`, are multiples of 32, as group norm wants.
    """

    mask_stride = 4
    size_divisor = 32

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

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i)."""
        if self.training:
            raise InputError(
                "SOLOv2 is trained through BoxTeacher, BoxSupervised or MaskSupervised: wrap it, "
                "or call eval() to detect"
            )
        found = self._select(images, _DETECTION)
        return [
            _detections_of_image(found.only(found.image_index == i), image.shape[-2:])
            for i, image in enumerate(images)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """The best objects after matrix NMS, however low they score; their boxes are those of their masks."""
        found = self._select(images, _PROPOSAL)
        sizes = torch.tensor([image.shape[-2:] for image in images], device=found.logits.device)  # (B, 2)
        masks = (found.logits > 0) & self._inside(sizes, found.logits)[found.image_index]  # (K, h, w)
        there = masks.flatten(1).any(1).nonzero()[:, 0]  # not wholly in the canvas's padding
        found, masks = found.only(there), masks[there]
        limit = sizes.flip(1).repeat(1, 2)[found.image_index]  # (K, 4)
        boxes = (mask_extent(masks.any(2), masks.any(1)) * self.mask_stride).minimum(limit)

        def decode_masks(candidates: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return centers_to_grid(found.logits[candidates], self.mask_stride)

        return Candidates(boxes, found.class_scores, found.labels, found.image_index, decode_masks)

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """The category loss, and the masks of positive cells, `max_samples` per image at most."""
        check_labels(targets, self.num_classes)
        features = self._features(images)
        logits = by_cell(features.category_maps)  # (B, S, C)
        height, width = features.mask_features.shape[-2:]
        matches = match_cells(
            grid_cells(self.grids, self.size_ranges, logits.device),
            targets,
            (height * self.mask_stride, width * self.mask_stride),
            self.num_classes,
        )
        target, cell = select_samples(matches, logits.detach().float().sigmoid(), self.max_samples)
        image = matches.image_index[target]
        drawn = draw_masks(features.mask_features, image, features.kernels[image, cell])  # (M, H / 4, W / 4)
        masks = MaskPredictions(centers_to_grid(drawn, self.mask_stride), target)
        return StudentOutput({"loss_category": category_loss(logits, matches.cell_labels)}, [masks])

    def _features(self, images: Sequence[Tensor]) -> _Features:
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = self.backbone(batch)
        pyramid = list(self.fpn(OrderedDict(zip(("p2", "p3", "p4", "p5"), maps, strict=True))).values())
        category_maps, kernel_maps = self.head(pyramid)
        return _Features(category_maps, by_cell(kernel_maps), self.mask_branch(pyramid[:4]))

    def _select(self, images: Sequence[Tensor], selection: Selection) -> Objects:
        features = self._features(images)
        return select_objects(features.category_maps, features.kernels, features.mask_features, selection)

    def _inside(self, sizes: Tensor, maps: Tensor) -> Tensor:
        """(B, h, w) bool: the cell begins in the image of that height and width, not in the padding."""
        height, width = maps.shape[-2:]
        rows = torch.arange(height, device=maps.device) * self.mask_stride
        columns = torch.arange(width, device=maps.device) * self.mask_stride
        return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]


def _detections_of_image(found: Objects, size: Sequence[int]) -> Detections:
    probabilities = F.interpolate(
        found.logits.sigmoid()[:, None], scale_factor=SOLOv2.mask_stride, mode="bilinear"
    )[..., : size[0], : size[1]]  # (K, 1, H, W)
    masks = probabilities[:, 0] > 0.5
    there = masks.flatten(1).any(1).nonzero()[:, 0]  # not wholly in the canvas's padding
    masks = masks[there]
    return {
        "boxes": mask_extent(masks.any(2), masks.any(1)),
        "labels": found.labels[there],
        "scores": found.scores[there],
        "masks": probabilities[there],
    }


class SOLOv2Head(nn.Module):
    """Two towers, shared by all levels, over the pyramid resampled to square grids.

    Args:
        channels: of the pyramid.
        num_classes: C.
        head_channels: of the towers.
        num_convs: convolutions per tower.
        num_kernels: E.
        grids: cells per side of each level's grid.
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        prior = 0.01  # of every class at first
        nn.init.constant_(_bias(self.category), math.log(prior / (1 - prior)))
        nn.init.zeros_(_bias(self.kernel))

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of P2 to P6: category logits (B, C, G_i, G_i) and kernels (B, E, G_i, G_i) of each level."""
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
    """The features that all masks of an image are drawn from, at stride 4 (SOLOv2, Sec. 3.2).

    Args:
        in_channels: of P2 to P5.
        channels: of the levels' sum.
        out_channels: E.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        widths = (in_channels, in_channels, in_channels, in_channels + 2)  # P5 comes with its coordinates
        self.levels = nn.ModuleList(
            nn.ModuleList(
                _conv_norm(width if i == 0 else channels, channels, 3) for i in range(max(level, 1))
            )
            for level, width in enumerate(widths)
        )
        self.out = _conv_norm(channels, out_channels, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """P2 to P5 (B, in_channels, h_i, w_i) to (B, out_channels, h_2, w_2)."""
        p2, p3, p4, p5 = levels
        first, *deeper = self._blocks()
        total = first[0](p2)
        for blocks, features in zip(deeper, (p3, p4, append_coordinates(p5)), strict=True):
            for block in blocks:
                features = F.interpolate(block(features), scale_factor=2, mode="bilinear")
            total = total + features
        return self.out(total)

    def _blocks(self) -> list[list[nn.Module]]:
        return [[*blocks] for blocks in self.levels]  # type: ignore[misc]


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.01)
    return nn.Sequential(conv, nn.GroupNorm(32, out_channels), nn.ReLU(inplace=True))


def _tower(in_channels: int, channels: int, num_convs: int) -> nn.Sequential:
    widths = [in_channels] + [channels] * num_convs
    return nn.Sequential(
        *(layer for i in range(num_convs) for layer in _conv_norm(widths[i], widths[i + 1], 3))
    )


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def build_solov2(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    mask_samples: int = 64,
) -> SOLOv2:
    """SOLOv2 as the paper has it, or, for images of at most 512 pixels, smaller and with coarser grids.

    The small one has a pyramid and towers of 128 channels instead of 256 and 512, two convolutions per tower
    instead of four, a mask branch of 64 channels instead of 128 and as many kernels instead of 256, and
    grids of half as many cells per side; its levels are there for boxes of the same share of the image.

    Args:
        num_classes: C.
        backbone: see `build_backbone`.
        weights: of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.
        mask_samples: `max_samples` of `SOLOv2`.

    Raises:
        InputError: no such backbone, or its weights cannot be had or do not fit.
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
        size_ranges=tuple((least * share, most * share) for least, most in SIZE_RANGES),
        max_samples=mask_samples,
    )
