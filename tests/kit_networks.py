"""Correct segmenters that the kit must pass, written as users write them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import Conv2dNormActivation, batched_nms, generalized_box_iou_loss, masks_to_boxes

from boxteacher.adapter import (
    Candidates,
    Detections,
    InputError,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    flat_targets,
    grid_coordinates,
    grid_targets,
    mask_grid,
    pad_images,
    upsample_aligned,
)
from boxteacher_adapters.condinst import build_condinst
from boxteacher_adapters.mask2former import build_mask2former
from boxteacher_adapters.mask_rcnn import MaskRCNNProvider, build_mask_rcnn
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.solov2 import build_solov2
from tests.example_support import TinyBackbone, load_example

NUM_CLASSES = 3
OUTSIDE = -10.0  # mask logit beyond the box that a mask is cropped to


class CroppedPrototypes(Segmenter):
    """Prototypes cropped to the box that the network itself predicts, with batch norm (as in YOLO)."""

    mask_stride = 4
    size_divisor = 32
    strides = (8, 16, 32)

    def __init__(
        self, backbone: nn.Module, num_classes: int = NUM_CLASSES, channels: int = 64, prototypes: int = 16
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.outputs = (num_classes, 4, prototypes)
        self.backbone = backbone
        self.laterals = nn.ModuleList(_conv(width, channels, 1) for width in backbone.channels)
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in backbone.channels)
        self.heads = nn.ModuleList(
            nn.Sequential(_conv(channels, channels, 3), nn.Conv2d(channels, sum(self.outputs), 1))
            for _ in backbone.channels
        )
        self.prototypes = nn.Sequential(
            _conv(channels, channels, 3), nn.Upsample(scale_factor=2), _conv(channels, prototypes, 3)
        )
        for head in self.heads:
            nn.init.constant_(head[-1].bias[:num_classes], -4.0)

    def predict(self, images: list[Tensor]) -> tuple[Tensor, ...]:
        """Class logits (B, L, C), boxes (B, L, 4), coefficients (B, L, P), prototypes, cells (L, 3)."""
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = [lateral(x) for lateral, x in zip(self.laterals, self.backbone(batch), strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[-2:])
        maps = [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]
        cells, outputs = [], []
        for stride, head, level in zip(self.strides, self.heads, maps, strict=True):
            outputs.append(head(level).float().flatten(2).transpose(1, 2))  # (B, L_i, C + 4 + P)
            rows, columns = grid_coordinates(*batch.shape[-2:], stride, batch.device)
            places = torch.cartesian_prod(rows, columns).flip(1).float()  # (L_i, 2) x, y
            cells.append(F.pad(places, (0, 1), value=stride))
        cell = torch.cat(cells)  # (L, 3) x, y, stride
        class_logits, sides, coefficients = torch.cat(outputs, 1).split(self.outputs, 2)
        sides = 2 * cell[:, 2:] * sides.clamp(max=3).exp()
        boxes = torch.cat([cell[:, :2] - sides[..., :2], cell[:, :2] + sides[..., 2:]], 2)  # (B, L, 4)
        return class_logits, boxes, coefficients, self.prototypes(maps[0]).float(), cell

    def masks(self, predicted: tuple[Tensor, ...], image: Tensor, cell: Tensor) -> Tensor:
        """Mask logits (M, h, w) of cells (M,) of images (M,), cropped to the boxes predicted there."""
        _, boxes, coefficients, prototypes, _ = predicted
        logits = torch.einsum("mp,mphw->mhw", coefficients[image, cell], prototypes[image])
        height, width = (self.mask_stride * side for side in logits.shape[1:])
        rows, columns = grid_coordinates(height, width, self.mask_stride, logits.device)
        x0, y0, x1, y1 = boxes[image, cell].detach()[:, :, None, None].unbind(1)  # (M, 1, 1) each
        inside = (columns >= x0) & (columns < x1) & (rows[:, None] >= y0) & (rows[:, None] < y1)
        return torch.where(inside, logits, OUTSIDE)

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        check_labels(targets, self.num_classes)
        class_logits, boxes, *_, cell = predicted = self.predict(images)
        known, labels, owner = flat_targets(targets)
        center, side = (known[:, :2] + known[:, 2:]) / 2, (known[:, 2:] - known[:, :2]).amax(1, keepdim=True)
        near = (cell[:, :2] - center[:, None]).abs().amax(2) < 1.5 * cell[:, 2]  # (T, L)
        fits = torch.stack([side < 48, (side >= 32) & (side < 96), side >= 64], 2)[:, 0]  # (T, 3)
        near &= fits.gather(1, (cell[:, 2].log2() - 3).long()[None].expand(len(known), -1))
        target, place = near.nonzero(as_tuple=True)  # (M,)
        image = owner[target]
        truth = torch.zeros_like(class_logits)
        truth[image, place, labels[target]] = 1.0
        focal = F.binary_cross_entropy_with_logits(class_logits, truth, reduction="none")
        focal = (focal * (truth - class_logits.sigmoid()).square()).sum() / max(len(target), 1)
        box = generalized_box_iou_loss(boxes[image, place], known[target], reduction="sum") / max(
            len(target), 1
        )
        masks = MaskPredictions(self.masks(predicted, image, place), target)
        return StudentOutput({"loss_class": focal, "loss_box": box}, [masks])

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        class_logits, boxes, *_ = predicted = self.predict(images)
        scores, labels = class_logits.sigmoid().max(2)
        image, place = (scores > 0.05).nonzero(as_tuple=True)
        scores, labels = scores[image, place], labels[image, place]
        sizes = torch.tensor([[i.shape[2], i.shape[1]] * 2 for i in images], device=scores.device)
        found = boxes[image, place].clamp(min=0).minimum(sizes[image])
        keep = batched_nms(found, scores, image * self.num_classes + labels, 0.6)
        image, place = image[keep], place[keep]

        def decode_masks(indices: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return self.masks(predicted, image[indices], place[indices])

        return Candidates(found[keep], scores[keep], labels[keep], image, decode_masks)

    def detect(self, images: list[Tensor]) -> list[Detections]:
        found = self.forward_teacher(images)
        logits = found.own_masks(torch.arange(len(found.scores), device=found.scores.device))
        masks = upsample_aligned(logits[:, None].sigmoid(), self.mask_stride)  # (K, 1, H, W)
        return _detections(found, masks, images)


class TransformersMask2Former(Segmenter):
    """`transformers`' Mask2Former, used as it is; matched by class and by the extent of the box."""

    mask_stride = 4
    size_divisor = 32

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_classes = int(model.config.num_labels)

    def predict(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per decoder layer class logits (B, Q, C + 1) and mask logits (B, Q, H / 4, W / 4)."""
        batch = pad_images([(image - 0.45) / 0.225 for image in images], self.size_divisor)
        output = self.model(pixel_values=batch, output_auxiliary_logits=True)
        last = {
            "class_queries_logits": output.class_queries_logits,
            "masks_queries_logits": output.masks_queries_logits,
        }
        layers = [*output.auxiliary_logits, last]
        return [
            (each["class_queries_logits"].float(), each["masks_queries_logits"].float()) for each in layers
        ]

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        from scipy.optimize import linear_sum_assignment

        check_labels(targets, self.num_classes)
        truth = grid_targets(images, targets, mask_grid(images, self.mask_stride, self.size_divisor))
        known = torch.where(
            (truth.mask_confidence > 0)[:, None, None], truth.masks, truth.box_masks
        ).float()  # (T, h, w)
        index = torch.arange(len(known))
        losses, masks = [], []
        for class_logits, logits in self.predict(images):
            labels = torch.full(class_logits.shape[:2], self.num_classes, device=logits.device)  # (B, Q)
            queries = torch.zeros_like(index)
            for i in range(len(images)):
                mine = index[truth.image_index == i]
                if len(mine) > logits.shape[1]:
                    raise InputError(f"target {i} has {len(mine)} boxes: give at most {logits.shape[1]}")
                with torch.no_grad():
                    probability = class_logits[i].softmax(1)[:, truth.labels[mine]]  # (Q, N)
                    ours, theirs = logits[i].sigmoid().flatten(1), known[mine].flatten(1)
                    either = ours.sum(1)[:, None] + theirs.sum(1)
                    cost = -2 * probability - 10 * (ours @ theirs.T + 1) / (either + 1)  # (Q, N)
                    queries[mine] = torch.from_numpy(linear_sum_assignment(cost.T.numpy())[1])
                labels[i, queries[mine]] = truth.labels[mine]
            weight = torch.ones(self.num_classes + 1)
            weight[-1] = 0.1
            losses.append(F.cross_entropy(class_logits.flatten(0, 1), labels.flatten(), weight))
            masks.append(MaskPredictions(logits[truth.image_index, queries], index))
        return StudentOutput({"loss_class": torch.stack(losses).mean()}, masks)

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        class_logits, logits = self.predict(images)[-1]
        scores, labels = class_logits.softmax(-1)[..., :-1].max(-1)  # (B, Q)
        image = torch.arange(len(images)).repeat_interleave(scores.shape[1])
        masks = logits.flatten(0, 1)  # (B · Q, h, w)
        boxes = torch.zeros(len(masks), 4)
        there = (masks > 0).flatten(1).any(1)
        if there.any():
            boxes[there] = masks_to_boxes(masks[there] > 0) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        sizes = torch.tensor([[i.shape[2], i.shape[1]] * 2 for i in images])
        boxes = (boxes * self.mask_stride).minimum(sizes[image])
        return Candidates(
            boxes, scores.flatten(), labels.flatten(), image, lambda indices, *_: masks[indices]
        )

    def detect(self, images: list[Tensor]) -> list[Detections]:
        found = self.forward_teacher(images)
        masks = found.own_masks(torch.arange(len(found.scores)))
        return _detections(found, upsample_aligned(masks[:, None], self.mask_stride).sigmoid(), images)


def _conv(inputs: int, outputs: int, size: int) -> nn.Module:
    return Conv2dNormActivation(inputs, outputs, size, activation_layer=nn.SiLU)


def _detections(found: Candidates, masks: Tensor, images: list[Tensor]) -> list[Detections]:
    """Candidates of a batch, with masks (K, 1, H, W) on the padded batch, image by image."""
    detections = []
    for i, image in enumerate(images):
        mine = found.image_index == i
        cut = masks[mine, :, : image.shape[1], : image.shape[2]]
        detections.append(
            {
                "boxes": found.boxes[mine],
                "labels": found.labels[mine],
                "scores": found.scores[mine],
                "masks": cut,
            }
        )
    return detections


def _example() -> nn.Module:
    return load_example().PrototypeSegmenter(build_backbone("efficientnet_lite0"), NUM_CLASSES)


def _transformers_mask2former() -> nn.Module:
    import transformers

    stages = ["stage1", "stage2", "stage3", "stage4"]
    body = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=stages,
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=body,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=2,
        decoder_layers=4,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        num_attention_heads=4,
        num_queries=20,
        num_labels=NUM_CLASSES,
    )
    return TransformersMask2Former(transformers.Mask2FormerForUniversalSegmentation(config))


def _mobilenet_mask_rcnn() -> nn.Module:
    body = mobilenet_backbone(
        backbone_name="mobilenet_v3_large",
        weights=None,
        fpn=True,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=6,
    )
    anchors = AnchorGenerator(((16, 32, 64, 128),) * 3, ((0.5, 1.0, 2.0),) * 3)
    model = MaskRCNN(
        body,
        NUM_CLASSES + 1,
        rpn_anchor_generator=anchors,
        min_size=128,
        max_size=256,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        box_batch_size_per_image=64,
        mask_head=MaskRCNNHeads(256, (64, 64), 1),
    )
    model.roi_heads.mask_predictor = MaskRCNNPredictor(64, 64, NUM_CLASSES + 1)
    return MaskRCNNProvider(model, max_samples=8)


def _adapter(build: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build(NUM_CLASSES, backbone="resnet18", weights="none", image_size=128)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cropped_prototypes": lambda: CroppedPrototypes(TinyBackbone(), channels=32, prototypes=8),
    "small_example": lambda: load_example().PrototypeSegmenter(TinyBackbone(), NUM_CLASSES, channels=32),
    "cropped_prototypes": lambda: CroppedPrototypes(build_backbone("efficientnet_lite0", "none")),
    "example": _example,
    "condinst": _adapter(build_condinst),
    "solov2": _adapter(build_solov2),
    "mask2former": _adapter(build_mask2former),
    "mask_rcnn": _adapter(build_mask_rcnn),
    "transformers_mask2former": _transformers_mask2former,
    "mobilenet_mask_rcnn": _mobilenet_mask_rcnn,
}
