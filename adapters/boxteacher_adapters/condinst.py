"""CondInst (ECCV 2020): FCOS whose every location also predicts the filters of its object's mask head."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from boxteacher.adapter import (
    Candidates,
    Detections,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    full_precision,
    grid_coordinates,
    mask_quality,
    pad_images,
    ranking_score,
    upsample_aligned,
)
from boxteacher_adapters.fcos import (
    DenseDetections,
    DensePredictions,
    FCOSHead,
    Locations,
    best_locations,
    fcos_losses,
    match_locations,
    pyramid_locations,
    sample_positives,
    select_detections,
)
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone

STRIDES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class _Features:
    predictions: DensePredictions
    locations: Locations
    mask_features: Tensor  # (B, D, H / 8, W / 8)


class CondInst(Segmenter):
    """CondInst on a feature pyramid P3 to P7; follows `PseudoMaskProvider`.

    Args:
        backbone: backbone with maps of strides 8, 16 and 32.
        num_classes: C; labels are 0 … C−1.
        channels: number of channels of the pyramid and the box head, a multiple of 32, at least 64.
        num_convs: number of convolutions per tower of the box head.
        mask_channels: number of channels of the mask branch.
        level_sizes: maximum distance in pixels from a location on P3 to P6 to a side of its box; P7 takes
            the larger boxes.
        max_samples: maximum number of positive locations per image whose masks are predicted in training;
            every target that has a positive location keeps at least one.
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
        num_convs: int = 4,
        mask_channels: int = 128,
        level_sizes: tuple[int, int, int, int] = (64, 128, 256, 512),
        max_samples: int = 64,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.level_sizes = level_sizes
        self.max_samples = max_samples
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(
            list(backbone.channels), channels, extra_blocks=LastLevelP6P7(channels, channels)
        )
        self.mask_branch = MaskBranch(channels, mask_channels)
        self.mask_head = DynamicMaskHead(
            self.mask_branch.out_channels, sizes=(*level_sizes, 2 * level_sizes[-1]), stride=STRIDES[0]
        )
        self.box_head = FCOSHead(channels, num_classes, num_convs, len(STRIDES), self.mask_head.num_params)

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i)."""
        features, found = self._select(images)
        masks = self._masks(features, found.image_index, found.location).sigmoid()  # (K, H / 4, W / 4)
        return [
            _detections_of_image(found, masks, found.image_index == i, image.shape[-2:])
            for i, image in enumerate(images)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Detections as candidates; decoding a mask costs its dynamic filters alone."""
        features, found = self._select(images)

        def decode_masks(candidates: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return self._masks(features, found.image_index[candidates], found.location[candidates])

        def decode_boxes(boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
            location = best_locations(
                features.predictions, features.locations, boxes, labels, image_index, self.level_sizes
            )
            return self._masks(features, image_index, location)

        return Candidates(
            found.boxes, found.scores, found.labels, found.image_index, decode_masks, decode_boxes
        )

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """FCOS's losses, and the masks of positive locations, at most `max_samples` per image."""
        check_labels(targets, self.num_classes)
        features = self._features(images)
        matched = match_locations(features.locations, targets, self.level_sizes, self.num_classes)
        image_index, location = sample_positives(features.predictions, matched, self.max_samples)  # (M,) each
        logits = self._masks(features, image_index, location)  # (M, H / 4, W / 4)
        masks = MaskPredictions(logits, matched.target_index[image_index, location])
        return StudentOutput(fcos_losses(features.predictions, matched), [masks])

    def _features(self, images: Sequence[Tensor]) -> _Features:
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = self.backbone(batch)
        pyramid = list(self.fpn(OrderedDict(zip(("p3", "p4", "p5"), maps, strict=True))).values())
        return _Features(
            self.box_head(pyramid), pyramid_locations(pyramid, STRIDES), self.mask_branch(pyramid[:3])
        )

    def _select(self, images: Sequence[Tensor]) -> tuple[_Features, DenseDetections]:
        features = self._features(images)
        sizes = [image.shape[-2:] for image in images]
        return features, select_detections(
            features.predictions, features.locations, sizes, self.max_detections
        )

    def _masks(self, features: _Features, image_index: Tensor, location: Tensor) -> Tensor:
        """Mask logits (M, H / 4, W / 4) of locations (M,) in images (M,)."""
        logits = self.mask_head(
            features.mask_features,
            features.predictions.controllers[image_index, location],
            image_index,
            features.locations.centers[location],
            features.locations.level[location],
        )
        return upsample_aligned(logits, STRIDES[0] // self.mask_stride)[:, 0]


def _detections_of_image(
    found: DenseDetections, masks: Tensor, mine: Tensor, size: Sequence[int]
) -> Detections:
    """One image's detections; boxes and masks are scored together (BoxTeacher, Eq. 2)."""
    pixels = upsample_aligned(masks[mine][:, None], CondInst.mask_stride)
    pixels = pixels[..., : size[0], : size[1]]  # (K, 1, H, W)
    scores = ranking_score(found.scores[mine], mask_quality(pixels[:, 0]))  # (K,)
    order = scores.argsort(descending=True, stable=True)
    return {
        "boxes": found.boxes[mine][order],
        "labels": found.labels[mine][order],
        "scores": scores[order],
        "masks": pixels[order],
    }


class MaskBranch(nn.Module):
    """The mask features that all masks of an image are decoded from, at stride 8 (CondInst, Sec. 3.1).

    Args:
        in_channels: number of channels of P3 to P5.
        channels: number of channels of the convolutions.
    """

    out_channels = 16

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.refine = nn.ModuleList(Conv2dNormActivation(in_channels, channels) for _ in range(3))
        self.tower = nn.Sequential(*(Conv2dNormActivation(channels, channels) for _ in range(4)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        self.tower.append(nn.Conv2d(channels, self.out_channels, 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """P3, P4 and P5 (B, in_channels, h_i, w_i) to (B, out_channels, h_3, w_3)."""
        total = self.refine[0](levels[0])
        for refine, features in zip(self.refine[1:], levels[1:], strict=True):
            factor = levels[0].shape[-1] // features.shape[-1]
            total = total + upsample_aligned(refine(features), factor)
        return self.tower(total)


class DynamicMaskHead(nn.Module):
    """Three 1 × 1 convolutions whose weights each location predicts for its own object (CondInst, Sec. 3.1).

    Args:
        in_channels: number of channels of the mask features.
        sizes: per level, divisor of the coordinates relative to the location.
        stride: pixels per cell of the mask features.
        channels: number of channels between the convolutions.
    """

    sizes: Tensor

    def __init__(self, in_channels: int, sizes: Sequence[int], stride: int, channels: int = 8) -> None:
        super().__init__()
        widths = [in_channels + 2, channels, channels, 1]
        self.weight_shapes = list(zip(widths[1:], widths[:-1], strict=True))
        self.stride = stride
        self.split = [out * into for out, into in self.weight_shapes] + widths[1:]
        self.num_params = sum(self.split)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float32), persistent=False)

    def forward(
        self, features: Tensor, params: Tensor, image_index: Tensor, centers: Tensor, level: Tensor
    ) -> Tensor:
        """Mask logits (M, 1, h, w).

        Args:
            features: (B, in_channels, h, w).
            params: (M, num_params), all weights, then all biases.
            image_index: (M,) int64 of the features that each mask is decoded from.
            centers: (M, 2) x, y in pixels of the predicting location.
            level: (M,) int64 of the predicting location.
        """
        height, width = features.shape[-2:]
        rows, columns = grid_coordinates(
            height * self.stride, width * self.stride, self.stride, features.device
        )
        size = self.sizes[level]  # (M,)
        x = (centers[:, :1] - columns) / size[:, None]  # (M, w)
        y = (centers[:, 1:] - rows) / size[:, None]  # (M, h)
        # Half precision would round coordinates to whole pixels.
        with full_precision(features.device):
            (first, first_bias), *others = self._layers(params.float())
            # Coordinates add a term per column and a term per row, so that no map of them is built.
            across = first[:, :, 0, None] * x[:, None]  # (M, channels, w)
            down = first[:, :, 1, None] * y[:, None] + first_bias  # (M, channels, h)
            position = (across[:, :, None, :] + down[:, :, :, None]).flatten(2)  # (M, channels, h · w)
            own_features = features[image_index].float().flatten(2)  # (M, in_channels, h · w)
            out = torch.baddbmm(position, first[:, :, 2:], own_features)  # (M, channels, h · w)
            for weight, bias in others:
                out = torch.bmm(weight, out.relu_()).add_(bias)
        return out.unflatten(2, (height, width))

    def _layers(self, params: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights (M, out, in) and biases (M, out, 1) of each convolution."""
        parts = params.split(self.split, dim=1)
        layers = len(self.weight_shapes)
        return [
            (parts[i].unflatten(1, shape), parts[layers + i].unsqueeze(2))
            for i, shape in enumerate(self.weight_shapes)
        ]


def build_condinst(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    mask_samples: int = 64,
) -> CondInst:
    """CondInst as in the paper, or, for images of at most 512 pixels, with smaller heads.

    The small heads have 128 channels instead of 256, two convolutions per tower instead of four, a mask
    branch of 64 channels instead of 128, and a pyramid whose levels take objects of half the size.

    Args:
        num_classes: C.
        backbone: name of the backbone; see `build_backbone`.
        weights: weights of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.
        mask_samples: maximum number of masks per image in training; `max_samples` of `CondInst`.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights)
    if image_size > 512:
        return CondInst(body, num_classes, max_samples=mask_samples)
    return CondInst(
        body,
        num_classes,
        channels=128,
        num_convs=2,
        mask_channels=64,
        level_sizes=(32, 64, 128, 256),
        max_samples=mask_samples,
    )
