"""Mask R-CNN (ICCV 2017): torchvision's own model, as its user built it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from boxteacher.adapter import (
    Candidates,
    Detections,
    InputError,
    MaskGrid,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    full_precision,
    mask_grid,
)
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone
from boxteacher_adapters.parts.grouping import share_evenly
from boxteacher_adapters.parts.pretrained import Preprocessing

OUTSIDE = -10.0
"""Mask logit of the cells that a pasted mask does not reach."""

_INITIAL_LOGIT = 2.0  # of every class's masks
_PROPOSALS_PER_DETECTION = 3  # at least, in evaluation
_LEVELS = ["0", "1", "2", "3"]  # torchvision's names of the maps that regions are pooled from


@dataclass(frozen=True)
class _Inputs:
    images: ImageList  # resized
    features: dict[str, Tensor]
    scales: Tensor  # (B, 4) original pixels per resized pixel, of x, y, x, y


class MaskRCNNProvider(Segmenter):
    """A torchvision `MaskRCNN`, unchanged, behind `PseudoMaskProvider`.

    Labels are 0 … C−1 here; torchvision's own begin at 1, background being 0. The model's transform resizes
    images as its user chose, at random in training if they chose so; boxes and masks are returned in pixels
    of the images as they were given. torchvision normalizes its four losses itself, in each process.

    Args:
        model: torchvision's model, with any backbone and weights.
        max_samples: maximum number of positive proposals per image whose masks are predicted in training;
            every target that has a positive proposal keeps at least one.

    Raises:
        InputError: the number of classes cannot be read from the model's box predictor.
    """

    mask_stride = 4
    size_divisor = 32

    def __init__(self, model: MaskRCNN, *, max_samples: int = 64) -> None:
        super().__init__()
        if not hasattr(model.roi_heads.box_predictor, "cls_score"):
            raise InputError(
                f"the box predictor of this {type(model).__name__} is a "
                f"{type(model.roi_heads.box_predictor).__name__} without `cls_score`, whose outputs tell the "
                "number of classes: name its classifier so, as torchvision's FastRCNNPredictor does"
            )
        self.model = model
        self.num_classes = int(model.roi_heads.box_predictor.cls_score.out_features) - 1
        self.max_samples = max_samples

    @property
    def max_detections(self) -> int:
        """torchvision's `box_detections_per_img`."""
        return int(self.model.roi_heads.detections_per_img)

    @max_detections.setter
    def max_detections(self, value: int) -> None:
        self.model.roi_heads.detections_per_img = value

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """torchvision's detections of images (3, H_i, W_i), with labels 0 … C−1."""
        return [{**found, "labels": found["labels"] - 1} for found in self.model(list(images))]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Detections as candidates; masks are decoded in the ground-truth boxes they may be assigned to.

        The model's own `box_score_thresh` and `max_detections` determine which detections there are.
        """
        inputs = self._inputs(images)
        heads, sizes = self.model.roi_heads, inputs.images.image_sizes
        proposals, _ = self._proposals(inputs)
        class_logits, regression = self._boxes(inputs, proposals)
        boxes, scores, labels = heads.postprocess_detections(class_logits, regression, proposals, sizes)
        image_index = _image_index(boxes)  # (K,)
        original_boxes = torch.cat(boxes) * inputs.scales[image_index]  # (K, 4)
        grid = mask_grid(images, self.mask_stride, self.size_divisor)

        def decode(boxes: Tensor, labels: Tensor, image: Tensor, reach: Tensor) -> Tensor:
            # A target's label may be out of range; forward_student, which comes after, says so.
            channels = labels.clamp(0, self.num_classes - 1) + 1
            logits = self._mask_logits(inputs, boxes / inputs.scales[image], image, channels)
            return paste_on_grid(logits, boxes, reach, grid)

        def decode_boxes(boxes: Tensor, labels: Tensor, image: Tensor) -> Tensor:
            # Beyond its box a mask has the values of its rim, so that none of it is lost between the cells.
            margin = boxes.new_tensor([-1, -1, 1, 1]) * self.mask_stride  # (4,)
            return decode(boxes, labels, image, boxes + margin)

        def decode_masks(candidates: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
            return decode(boxes, labels, image_index[candidates], boxes)

        return Candidates(
            original_boxes,
            torch.cat(scores),
            torch.cat(labels) - 1,
            image_index,
            decode_masks,
            decode_boxes,
        )

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """torchvision's four losses, and the masks of positive proposals, at most `max_samples` per image.

        Boxes are clipped to their image, and those without area are ignored. Sampling proposals synchronizes
        with the device, as in torchvision.
        """
        check_labels(targets, self.num_classes)
        inputs = self._inputs(images)
        heads, sizes = self.model.roi_heads, inputs.images.image_sizes
        truth, kept = _resized_targets(targets, inputs.scales, sizes)
        proposals, losses = self._proposals(inputs, truth)
        proposals, matched, labels, offsets = heads.select_training_samples(proposals, truth)
        class_logits, regression = self._boxes(inputs, proposals)
        loss_class, loss_box = fastrcnn_loss(class_logits, regression, labels, offsets)

        image_index = _image_index(proposals)  # (P,)
        label, boxes = torch.cat(labels), torch.cat(proposals)  # (P,), (P, 4)
        # torchvision matches the proposals of an image without boxes, all background, with an index 0.
        target = torch.cat([F.pad(own, (0, 1))[m] for own, m in zip(kept, matched, strict=True)])  # (P,)
        sample = (label > 0).nonzero()[:, 0]  # (P',) the positive ones
        original = boxes[sample] * inputs.scales[image_index[sample]]  # (P', 4)
        target_boxes = torch.cat([each["boxes"] for each in targets])[target[sample]]  # (P', 4)
        overlap = -generalized_box_iou_loss(original, target_boxes)  # (P',) GIoU − 1
        shared = share_evenly(image_index[sample], target[sample], overlap, len(images), self.max_samples)
        sample, original, target_boxes = sample[shared], original[shared], target_boxes[shared]  # M of P'
        logits = self._mask_logits(inputs, boxes[sample], image_index[sample], label[sample])  # (M, r, r)
        # A mask that ended with its proposal could not fill a box beyond it, and would learn to shrink.
        reach = torch.cat(
            [original[:, :2].minimum(target_boxes[:, :2]), original[:, 2:].maximum(target_boxes[:, 2:])], 1
        )  # (M, 4)
        grid = mask_grid(images, self.mask_stride, self.size_divisor)
        masks = MaskPredictions(paste_on_grid(logits, original, reach, grid), target[sample])
        return StudentOutput({**losses, "loss_classifier": loss_class, "loss_box_reg": loss_box}, [masks])

    def _inputs(self, images: Sequence[Tensor]) -> _Inputs:
        resized, _ = self.model.transform(list(images))
        features = self.model.backbone(resized.tensors)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        scales = [
            (image.shape[-1] / width, image.shape[-2] / height) * 2
            for image, (height, width) in zip(images, resized.image_sizes, strict=True)
        ]
        return _Inputs(resized, features, torch.tensor(scales, device=images[0].device))

    def _proposals(
        self, inputs: _Inputs, truth: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Resized boxes (P_i, 4) of each image, and the region proposal network's losses in training."""
        # Half precision would round them, and the ground truth with them, to whole pixels and more.
        with full_precision(inputs.scales.device):
            features = {name: level.float() for name, level in inputs.features.items()}
            return self.model.rpn(inputs.images, features, truth)

    def _boxes(self, inputs: _Inputs, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (P, C + 1) and box offsets (P, 4 · (C + 1)) of proposals."""
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(inputs.features, proposals, inputs.images.image_sizes)
        class_logits, regression = heads.box_predictor(heads.box_head(pooled))
        return class_logits.float(), regression.float()  # torchvision makes boxes in the type of these

    def _mask_logits(self, inputs: _Inputs, boxes: Tensor, image: Tensor, label: Tensor) -> Tensor:
        """Mask logits (M, r, r) of resized boxes (M, 4) for torchvision's labels (M,)."""
        heads = self.model.roi_heads
        order = image.argsort(stable=True)  # the pooling takes each image's boxes together
        counts = torch.bincount(image, minlength=len(inputs.scales)).tolist()
        pooled = heads.mask_roi_pool(
            inputs.features, list(boxes[order].split(counts)), inputs.images.image_sizes
        )
        logits = heads.mask_predictor(heads.mask_head(pooled))  # (M, C + 1, r, r)
        return logits[order.argsort(), label]


def paste_on_grid(logits: Tensor, boxes: Tensor, reach: Tensor, grid: MaskGrid) -> Tensor:
    """Bilinear pasting of box-aligned mask logits onto the mask grid, differentiable in `logits`.

    A box's sides are the outer sides of its map; beyond the centers of the outermost cells their values are
    repeated to the end of `reach`. Grid cells whose pixel lies beyond that are `OUTSIDE`.

    Args:
        logits: (M, r, r) that fill the boxes.
        boxes: (M, 4) `x0, y0, x1, y1` in pixels.
        reach: (M, 4) `x0, y0, x1, y1` in pixels, around the boxes or equal to them.
        grid: mask grid of the batch.

    Returns:
        (M, h, w).
    """
    rows, columns = grid.coordinates(logits.device)  # (h,), (w,)
    size = logits.shape[-1]
    row_weights = _bilinear_weights(boxes[:, 1::2], reach[:, 1::2], rows, size)  # (M, h, r)
    column_weights = _bilinear_weights(boxes[:, 0::2], reach[:, 0::2], columns, size)  # (M, w, r)
    pasted = row_weights @ logits.to(boxes.dtype) @ column_weights.transpose(1, 2)  # (M, h, w)
    inside = (row_weights.sum(2)[:, :, None] * column_weights.sum(2)[:, None]) > 0
    return torch.where(inside, pasted, OUTSIDE)


def _bilinear_weights(span: Tensor, reach: Tensor, pixels: Tensor, size: int) -> Tensor:
    """Weights (M, n, size) of a map's cells at pixels along one axis; 0 beyond `reach`.

    Args:
        span: (M, 2) start and end of the map in pixels.
        reach: (M, 2) start and end of the pixels with weights.
        pixels: (n,) int64.
        size: number of the map's cells.
    """
    center = pixels + 0.5  # (n,)
    start, end = span.split(1, 1)  # (M, 1) each
    position = (center - start) / (end - start).clamp(min=1e-6) * size - 0.5  # (M, n) in cells of the map
    inside = (center >= reach[:, :1]) & (center <= reach[:, 1:])  # (M, n)
    cell = torch.arange(size, device=span.device)
    weights = (1 - (position.clamp(0, size - 1)[..., None] - cell).abs()).clamp(min=0)  # (M, n, size)
    return weights * inside[..., None]


def _image_index(boxes: Sequence[Tensor]) -> Tensor:
    """The image (P,) int64 of each box, for one list of boxes (P_i, 4) per image."""
    counts = torch.tensor([len(each) for each in boxes], device=boxes[0].device)
    return torch.repeat_interleave(torch.arange(len(boxes), device=counts.device), counts)


def _resized_targets(
    targets: Sequence[Target], scales: Tensor, sizes: Sequence[tuple[int, int]]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Targets as torchvision takes them, in resized pixels, and their indices among the batch's targets.

    Boxes without area are left out: they match no anchor, so that torchvision would match them with all.
    """
    found, kept = [], []
    first = 0
    for target, scale, size in zip(targets, scales, sizes, strict=True):
        boxes = clip_boxes_to_image(target["boxes"].float() / scale, size)  # (N, 4)
        own = remove_small_boxes(boxes, 1e-3)  # (N',)
        # torchvision requires the key `masks` with a mask head; only its mask loss, unused here, reads them.
        found.append({"boxes": boxes[own], "labels": target["labels"][own] + 1, "masks": boxes[own]})
        kept.append(first + own)
        first += len(boxes)
    return found, kept


class _Pyramid(nn.Module):
    """A backbone with a feature pyramid of strides 4 to 64, as torchvision's detectors take it."""

    def __init__(
        self, backbone: Backbone, channels: int, norm_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(
            list(backbone.channels), channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm_layer
        )
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized images (B, 3, H, W) to maps (B, channels, h_i, w_i)."""
        return self.fpn(OrderedDict(zip(_LEVELS, self.body(images), strict=True)))


class _Unresized(GeneralizedRCNNTransform):  # type: ignore[misc]
    """A transform that keeps the images' size and normalizes them as the backbone's weights require."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = list(preprocessing.mean), list(preprocessing.std)
        super().__init__(800, 1333, mean, std, size_divisible=32)
        self.channel_order = preprocessing.channel_order

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.flip(-3) if self.channel_order == "BGR" else image)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


def build_mask_rcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    mask_samples: int | None = None,
    max_detections: int = 100,
) -> MaskRCNNProvider:
    """Mask R-CNN on a feature pyramid as in torchvision, or, for images of at most 512 pixels, smaller.

    The small one has 128 channels in the pyramid instead of 256, 256 in the box head instead of 1024, 64 in
    the mask head instead of 256, anchors of half the size, keeps 500 proposals per image in training and 300
    in evaluation instead of 2000 and 1000, samples 64 of them instead of 512, a quarter of those at most for
    masks, and pools the features at one point per cell of a region instead of four. In evaluation both keep
    three proposals per detection if that is more. Images are not resized. Masks begin as filled boxes, which
    learning from boxes alone requires.

    Args:
        num_classes: C, without background.
        backbone: name of the backbone; see `build_backbone`.
        weights: weights of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.
        mask_samples: maximum number of masks per image in training, `max_samples` of `MaskRCNNProvider`; 64,
            or 16 in the small one, if not given.
        max_detections: maximum number of detections per image, torchvision's `box_detections_per_img`.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights, strides=(4, 8, 16, 32))
    small = image_size <= 512
    channels, hidden, mask_channels, sampled = (128, 256, 64, 64) if small else (256, 1024, 256, 512)
    training_proposals, proposals, ratio = (500, 300, 1) if small else (2000, 1000, 2)
    proposals = max(proposals, _PROPOSALS_PER_DETECTION * max_detections)
    first = 16 if small else 32
    anchors = AnchorGenerator(tuple((first * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(
        _Pyramid(body, channels),
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_train=training_proposals,
        rpn_pre_nms_top_n_test=max(1000, proposals),
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(_LEVELS, 7, ratio),
        box_head=TwoMLPHead(channels * 7**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        box_batch_size_per_image=sampled,
        box_detections_per_img=max_detections,
        mask_roi_pool=MultiScaleRoIAlign(_LEVELS, 14, ratio),
        mask_head=MaskRCNNHeads(channels, (mask_channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, num_classes + 1),
    )
    return _provider(model, body, mask_samples or (16 if small else 64))


def build_mask_rcnn_v2(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    mask_samples: int = 64,
) -> MaskRCNNProvider:
    """Mask R-CNN as in torchvision's `maskrcnn_resnet50_fpn_v2` (Li et al., 2021, arXiv:2111.11429).

    Pyramid, box head and mask head have batch norms; the box head has four convolutions and one linear layer,
    and the head of proposals two convolutions. Images are not resized, and masks begin as filled boxes.

    Args:
        num_classes: C, without background.
        backbone: name of the backbone; see `build_backbone`.
        weights: weights of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels; the network is the same for all.
        mask_samples: maximum number of masks per image in training; `max_samples` of `MaskRCNNProvider`.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights, strides=(4, 8, 16, 32))
    channels, norm = 256, nn.BatchNorm2d
    model = MaskRCNN(
        _Pyramid(body, channels, norm),
        num_classes + 1,
        rpn_head=RPNHead(channels, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
    )
    return _provider(model, body, mask_samples)


def _provider(model: MaskRCNN, body: Backbone, mask_samples: int) -> MaskRCNNProvider:
    """A model with images in their size, and with masks that begin as filled boxes."""
    model.transform = _Unresized(body.preprocessing)
    # Masks begin as filled boxes. An outline has the same projections as an object, and cells on an edge have
    # no neighbor of similar color; torchvision's wide initial weights make the strongest edges the first
    # masks, and a class that has become outlines stays so under boxes alone.
    mask_logits = model.roi_heads.mask_predictor.mask_fcn_logits
    nn.init.normal_(mask_logits.weight, std=0.01)
    nn.init.constant_(mask_logits.bias, _INITIAL_LOGIT)
    return MaskRCNNProvider(model, max_samples=mask_samples)
