"""Mask2Former (CVPR 2022): a set of queries, each of which draws one object's mask or says there is none."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher.errors import InputError
from boxteacher.grid import mask_grid, pad_images, upsample_aligned
from boxteacher.protocol import Candidates, Detections, MaskPredictions, StudentOutput, Target
from boxteacher.scoring import mask_quality
from boxteacher.targets import GridTargets, grid_targets
from boxteacher.validation import check_labels
from boxteacher_adapters.mask2former_decoder import MaskedAttentionDecoder, QueryPredictions
from boxteacher_adapters.mask2former_matching import (
    MatchingTargets,
    assign,
    matching_cost,
    matching_targets,
)
from boxteacher_adapters.parts.backbones import Backbone, Weights, build_backbone
from boxteacher_adapters.parts.extent import mask_extent
from boxteacher_adapters.parts.pixel_decoder import PixelDecoder

STRIDES = (4, 8, 16, 32)
_CLASS_WEIGHT = 2.0
_NO_OBJECT_WEIGHT = 0.1
_DETECTIONS_PER_IMAGE = 100


class Mask2Former(nn.Module):
    """Mask2Former on maps of strides 4 to 32; follows `PseudoMaskProvider`.

    The cells of its masks are taken as they are for those of the mask grid: cell (r, c) stands for pixel
    (4 r + 2, 4 c + 2), and training teaches it so. The original reads it as 4 r + 1.5, so weights that come
    from there draw masks half a pixel off.

    Args:
        backbone: maps of strides 4, 8, 16 and 32.
        num_classes: C; labels are 0 … C−1.
        channels: of everything after the backbone, a multiple of 32.
        num_queries: Q, the most objects that an image can have.
        encoder_layers: of the pixel decoder.
        decoder_layers: of masked attention; each takes the next of strides 32, 16 and 8.
        spatial_prior: whether masks begin as ellipses, which short training from boxes alone needs; see
            `SpatialPrior`. The paper's network has none.
    """

    mask_stride = 4
    size_divisor = 32

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

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i).

        As in the original instance inference, the 100 best of all pairs of query and class, each with the
        product of its class probability and the mean probability over its mask; boxes are the masks' extents.
        """
        if self.training:
            raise InputError(
                "Mask2Former is trained through BoxTeacher, BoxSupervised or MaskSupervised: wrap it, "
                "or call eval() to detect"
            )
        class_logits, logits = self._final(images)
        return [
            _detections_of_image(classes, masks, (image.shape[-2], image.shape[-1]))
            for classes, masks, image in zip(class_logits, logits, images, strict=True)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Every query once, as its likeliest class, with the box round its mask."""
        class_logits, logits = self._final(images)
        scores, labels = class_logits.softmax(-1)[..., :-1].max(-1)  # (B, Q) each
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        boxes = _boxes_of_masks(logits, sizes, self.mask_stride)  # (B, Q, 4)
        image_index = torch.arange(len(images), device=boxes.device).repeat_interleave(self.num_queries)
        masks = logits.flatten(0, 1)  # (B · Q, h, w)

        def decode_masks(candidates: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return masks[candidates]

        return Candidates(boxes.flatten(0, 1), scores.flatten(), labels.flatten(), image_index, decode_masks)

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """The classification loss, and for each round one mask per target, drawn by the query matched to it.

        A round is a decoder layer or the queries before the first. Queries without a target are "no object",
        which counts a tenth. Targets' masks are looked at for matching alone, which waits
        for the device once.

        Raises:
            InputError: a label is out of range, or an image has more boxes than there are queries.
        """
        check_labels(targets, self.num_classes)
        counts = [len(target["boxes"]) for target in targets]
        self._check_counts(counts)
        rounds, mask_features = self._predict(images)
        grid = grid_targets(images, targets, mask_grid(images, self.mask_stride, self.size_divisor))
        with_masks = any("masks" in target for target in targets)
        wanted = matching_targets(grid, counts, self.mask_stride, with_masks)
        queries = _match(rounds, mask_features, wanted)  # (R, T)
        every = torch.arange(len(grid.labels), device=queries.device)  # (T,)
        masks = _matched_masks(rounds, mask_features, wanted, queries)
        return StudentOutput(
            {"loss_classification": _classification_loss(rounds, grid, queries)},
            [MaskPredictions(logits, every) for logits in masks],
        )

    def _check_counts(self, counts: Sequence[int]) -> None:
        for i, count in enumerate(counts):
            if count > self.num_queries:
                raise InputError(
                    f"target {i} has {count} boxes, but Mask2Former has {self.num_queries} queries: build it "
                    f"with num_queries of at least {count}, or leave such images out"
                )

    def _predict(self, images: Sequence[Tensor]) -> tuple[list[QueryPredictions], Tensor]:
        """Each round's predictions, and the mask features (B, D, H / 4, W / 4)."""
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        levels, mask_features = self.pixel_decoder(self.backbone(batch))
        return self.decoder(levels, mask_features), mask_features

    def _final(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, H / 4, W / 4) of the last round."""
        rounds, mask_features = self._predict(images)
        return rounds[-1].class_logits.float(), rounds[-1].mask_logits(mask_features).float()


@torch.no_grad()
def _match(rounds: Sequence[QueryPredictions], mask_features: Tensor, targets: MatchingTargets) -> Tensor:
    """(R, T) int64, the query that each target goes to in each round; masks are drawn a round at a time."""
    costs = [matching_cost(each.class_logits, each.mask_logits(mask_features), targets) for each in rounds]
    return assign(torch.stack(costs), targets.counts)


def _matched_masks(
    rounds: Sequence[QueryPredictions], mask_features: Tensor, targets: MatchingTargets, queries: Tensor
) -> list[Tensor]:
    """Per round, the mask logits (T, h, w) of the queries (R, T) that the targets go to."""
    drawn = []
    for each, mine in zip(rounds, queries, strict=True):
        table = torch.zeros_like(targets.labels)  # (B, N)
        table[targets.image_index, targets.slot] = mine
        logits = each.of_queries(table).mask_logits(mask_features)  # (B, N, h, w)
        drawn.append(logits[targets.image_index, targets.slot])
    return drawn


def _classification_loss(rounds: Sequence[QueryPredictions], grid: GridTargets, queries: Tensor) -> Tensor:
    logits = torch.stack([each.class_logits.float() for each in rounds])  # (R, B, Q, C + 1)
    nothing = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], nothing, device=logits.device)  # (R, B, Q)
    number = torch.arange(len(rounds), device=logits.device)[:, None]  # (R, 1)
    wanted[number, grid.image_index, queries] = grid.labels
    weight = logits.new_ones(nothing + 1)
    weight[nothing] = _NO_OBJECT_WEIGHT
    # Every round has the same sum of weights, so this is the rounds' mean.
    return _CLASS_WEIGHT * F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight)


def _boxes_of_masks(logits: Tensor, sizes: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """Boxes (B, Q, 4) in pixels round masks (B, Q, h, w), padding aside; 0 for an empty mask."""
    limit = torch.tensor(sizes, device=logits.device)  # (B, 2) height, width
    height, width = logits.shape[-2:]
    inside_rows = torch.arange(height, device=logits.device) * stride < limit[:, :1]  # (B, h)
    inside_columns = torch.arange(width, device=logits.device) * stride < limit[:, 1:]  # (B, w)
    mask = (logits > 0) & (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])
    boxes = mask_extent(mask.any(3), mask.any(2)) * stride  # (B, Q, 4)
    return boxes.minimum(limit.flip(1).repeat(1, 2)[:, None])


def _detections_of_image(class_logits: Tensor, logits: Tensor, size: tuple[int, int]) -> Detections:
    """Of class logits (Q, C + 1) and mask logits (Q, h, w)."""
    probability = class_logits.softmax(-1)[:, :-1]  # (Q, C)
    scores, entry = probability.flatten().topk(min(_DETECTIONS_PER_IMAGE, probability.numel()))
    query, labels = entry // probability.shape[1], entry % probability.shape[1]
    enlarged = upsample_aligned(logits[None], Mask2Former.mask_stride)[0, :, : size[0], : size[1]]
    masks = enlarged.sigmoid()  # (Q, H, W)
    scores = scores * mask_quality(masks)[query]
    boxes = mask_extent((enlarged > 0).any(2), (enlarged > 0).any(1))  # (Q, 4)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > 0]  # not the empty masks
    return {
        "boxes": boxes[query[order]],
        "labels": labels[order],
        "scores": scores[order],
        "masks": masks[query[order], None],
    }


def build_mask2former(
    num_classes: int, *, backbone: str = "resnet50", weights: Weights = "imagenet", image_size: int = 1333
) -> Mask2Former:
    """Mask2Former with a spatial prior; for images of at most 512 pixels smaller than the paper's.

    The prior lets masks be learnt from boxes alone; `Mask2Former(...)` itself has none unless asked. The
    smaller network has 128 channels instead of 256, three encoder layers instead of six and three decoder
    layers instead of nine.

    Args:
        num_classes: C.
        backbone: see `build_backbone`.
        weights: of the backbone; see `build_backbone`.
        image_size: longest side of the images in pixels.

    Raises:
        InputError: no such backbone, or its weights cannot be had or do not fit.
    """
    body = build_backbone(backbone, weights, strides=STRIDES)
    if image_size > 512:
        return Mask2Former(body, num_classes, spatial_prior=True)
    return Mask2Former(
        body, num_classes, channels=128, encoder_layers=3, decoder_layers=3, spatial_prior=True
    )
