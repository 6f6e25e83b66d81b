"""Mask2Former (CVPR 2022): a set of queries, each of which predicts one object's class and mask, or none."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from boxteacher.adapter import (
    Candidates,
    Detections,
    GridTargets,
    InputError,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    global_count,
    grid_targets,
    mask_grid,
    mask_quality,
    pad_images,
    upsample_aligned,
)
from boxteacher_adapters.mask2former_decoder import MaskedAttentionDecoder, QueryPredictions
from boxteacher_adapters.mask2former_matching import assign, check_scipy, matching_cost, matching_targets
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone
from boxteacher_adapters.parts.maps import mask_boxes, mask_boxes_in_images
from boxteacher_adapters.parts.pixel_decoder import PixelDecoder

STRIDES = (4, 8, 16, 32)
_CLASS_WEIGHT = 2.0
_NO_OBJECT_WEIGHT = 0.1


class Mask2Former(Segmenter):
    """Mask2Former on maps of strides 4 to 32; follows `PseudoMaskProvider`.

    The cells of its masks are taken for those of the mask grid: cell (r, c) stands for pixel (4 r + 2,
    4 c + 2), and training teaches it so. In the original it stands for 4 r + 1.5, so that masks from the
    original's weights are half a pixel off.

    Args:
        backbone: backbone with maps of strides 4, 8, 16 and 32.
        num_classes: C; labels are 0 … C−1.
        channels: number of channels of everything after the backbone, a multiple of 32.
        num_queries: Q, maximum number of objects in an image.
        encoder_layers: number of layers of the pixel decoder.
        decoder_layers: number of layers of masked attention; each takes the next of strides 32, 16 and 8.
        spatial_prior: whether masks begin as ellipses, which short training from boxes alone requires; see
            `SpatialPrior`. The paper's network has none.
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
        num_queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        spatial_prior: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(backbone.channels, channels, encoder_layers)
        self.decoder = MaskedAttentionDecoder(
            channels, num_classes, num_queries, decoder_layers, spatial_prior=spatial_prior
        )

    def train(self, mode: bool = True) -> Self:
        """As any module's; raises InputError if `mode` is True and scipy is not installed."""
        if mode:  # said before the first step, for which a run would make its folder
            check_scipy()
        return super().train(mode)

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i).

        As in the original instance inference, the best pairs of query and class, `max_detections` of them,
        scored by class probability times mean probability over the mask; boxes are the masks' extents.
        """
        class_logits, logits = self._last_layer(images)
        return [
            _detections_of_image(classes, masks, image.shape[-2:], self.max_detections)
            for classes, masks, image in zip(class_logits, logits, images, strict=True)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Every query once, as its most probable class, with the box around its mask."""
        class_logits, logits = self._last_layer(images)
        scores, labels = class_logits.softmax(-1)[..., :-1].max(-1)  # (B, Q) each
        masks = logits.flatten(0, 1)  # (B · Q, h, w)
        image_index = torch.arange(len(images), device=masks.device).repeat_interleave(self.num_queries)
        sizes = torch.tensor([image.shape[-2:] for image in images], device=masks.device)  # (B, 2)
        boxes = mask_boxes_in_images(masks > 0, sizes[image_index], self.mask_stride)  # (B · Q, 4)

        def decode_masks(candidates: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return masks[candidates]

        return Candidates(boxes, scores.flatten(), labels.flatten(), image_index, decode_masks)

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """The classification loss, and per decoder layer the mask of the query that matches each target.

        The learned queries count as a layer before the first. Queries without a target are "no object", with
        a tenth of the weight. Annotated masks serve matching alone, which synchronizes with the device once.

        Raises:
            InputError: a label is out of range, or an image has more boxes than there are queries.
        """
        check_labels(targets, self.num_classes)
        counts = [len(target["boxes"]) for target in targets]
        for i, count in enumerate(counts):
            if count > self.num_queries:
                raise InputError(
                    f"target {i} has {count} boxes, but Mask2Former has {self.num_queries} queries: build it "
                    f"with num_queries of at least {count}, or leave such images out"
                )
        layers, mask_features = self._predict(images)
        grid = grid_targets(images, targets, mask_grid(images, self.mask_stride, self.size_divisor))
        with_masks = any("masks" in target for target in targets)
        matching = matching_targets(grid, counts, self.mask_stride, with_masks)

        with torch.no_grad():  # masks of all queries, one layer at a time
            costs = [
                matching_cost(layer.class_logits, layer.mask_logits(mask_features), matching)
                for layer in layers
            ]
            queries = assign(torch.stack(costs), counts)  # (R, T)

        masks = []
        target_index = torch.arange(len(grid.labels), device=queries.device)  # (T,)
        for layer, layer_queries in zip(layers, queries, strict=True):
            table = torch.zeros_like(matching.labels)  # (B, N)
            table[grid.image_index, matching.slot] = layer_queries
            logits = layer.of_queries(table).mask_logits(mask_features)  # (B, N, h, w)
            masks.append(MaskPredictions(logits[grid.image_index, matching.slot], target_index))
        return StudentOutput({"loss_classification": _classification_loss(layers, grid, queries)}, masks)

    def _predict(self, images: Sequence[Tensor]) -> tuple[list[QueryPredictions], Tensor]:
        """Predictions of each decoder layer, and the mask features (B, D, H / 4, W / 4)."""
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        levels, mask_features = self.pixel_decoder(self.backbone(batch))
        return self.decoder(levels, mask_features), mask_features

    def _last_layer(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, H / 4, W / 4) of the last decoder layer."""
        layers, mask_features = self._predict(images)
        return layers[-1].class_logits.float(), layers[-1].mask_logits(mask_features).float()


def _classification_loss(layers: Sequence[QueryPredictions], grid: GridTargets, queries: Tensor) -> Tensor:
    """Cross-entropy of all decoder layers' queries, weighted by class, a scalar.

    Args:
        layers: R of them, with class logits (B, Q, C + 1).
        grid: T targets.
        queries: (R, T) int64, the query of each target.
    """
    logits = torch.stack([layer.class_logits.float() for layer in layers])  # (R, B, Q, C + 1)
    no_object = logits.shape[-1] - 1
    labels = torch.full(logits.shape[:-1], no_object, device=logits.device)  # (R, B, Q)
    layer_index = torch.arange(len(layers), device=logits.device)[:, None]  # (R, 1)
    labels[layer_index, grid.image_index, queries] = grid.labels
    class_weight = logits.new_ones(no_object + 1)  # (C + 1,)
    class_weight[no_object] = _NO_OBJECT_WEIGHT
    # Every layer has the same sum of weights, so this is the layers' mean.
    loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), class_weight)
    total_weight = class_weight[labels].sum()
    return _CLASS_WEIGHT * loss * (total_weight / global_count(total_weight))


def _detections_of_image(
    class_logits: Tensor, logits: Tensor, size: Sequence[int], max_detections: int
) -> Detections:
    """Detections from class logits (Q, C + 1) and mask logits (Q, h, w)."""
    probability = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    scores, entry = probability.flatten().topk(min(max_detections, probability.numel()))
    query, labels = entry // probability.shape[1], entry % probability.shape[1]
    enlarged = upsample_aligned(logits[None], Mask2Former.mask_stride)[0, :, : size[0], : size[1]]
    masks = enlarged.sigmoid()  # (Q, H, W)
    scores = scores * mask_quality(masks)[query]
    boxes = mask_boxes(enlarged > 0)  # (Q, 4)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > 0]  # without empty masks
    return {
        "boxes": boxes[query[order]],
        "labels": labels[order],
        "scores": scores[order],
        "masks": masks[query[order], None],
    }


def build_mask2former(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    weights: Weights = "imagenet",
    image_size: int = 1333,
    max_detections: int = 100,
) -> Mask2Former:
    """Mask2Former with a spatial prior; for images of at most 512 pixels smaller than the paper's.

    The prior lets masks be learned from boxes alone; `Mask2Former(...)` itself has none unless asked. The
    smaller network has 128 channels instead of 256, three encoder layers instead of six and three decoder
    layers instead of nine.

    Args:
        num_classes: C.
        backbone: name of the backbone; see `build_backbone`.
        weights: weights of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.
        max_detections: maximum number of detections per image; there are as many queries, at least 100.

    Raises:
        InputError: the backbone is unknown, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights, strides=STRIDES)
    size: dict[str, int] = {}
    if image_size <= 512:
        size = {"channels": 128, "encoder_layers": 3, "decoder_layers": 3}
    model = Mask2Former(body, num_classes, num_queries=max(100, max_detections), spatial_prior=True, **size)
    model.max_detections = max_detections
    return model
