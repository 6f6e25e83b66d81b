"""A segmenter of one's own, taught masks from boxes alone; docs/write_an_adapter.md walks through it.

    python examples/write_an_adapter.py --data FOLDER_FOR_DEMO_DATA

Cells of a map of stride 8 predict classes, boxes and the coefficients of mask prototypes (YOLACT, ICCV 2019).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.ops import Conv2dNormActivation, batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from boxteacher import BoxTeacher, EMATeacher
from boxteacher.adapter import (
    Candidates,
    Detections,
    MaskPredictions,
    Segmenter,
    StudentOutput,
    Target,
    check_labels,
    global_count,
    grid_coordinates,
    pad_images,
    upsample_aligned,
)
from boxteacher.data import InstanceDataset, collate, read_split, training_transform, write_shapes
from boxteacher.engine.evaluate import evaluate_segmenter
from boxteacher_adapters.parts.backbones import build_backbone

STRIDE = 8  # of the one map that everything is predicted from


@dataclass
class Features:
    """What the network predicts at the L cells of its map."""

    cells: Tensor  # (L, 2) x, y in pixels
    class_logits: Tensor  # (B, L, C)
    boxes: Tensor  # (B, L, 4) in pixels
    coefficients: Tensor  # (B, L, 1 + P): a bias, then one weight per prototype
    prototypes: Tensor  # (B, P, H / 8, W / 8)


class PrototypeSegmenter(Segmenter):
    """A mask is a weighted sum of prototypes, and falls off outside its own box."""

    mask_stride = 4
    size_divisor = 32

    def __init__(
        self, backbone: nn.Module, num_classes: int, channels: int = 96, prototypes: int = 16
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.outputs = (num_classes, 4, 1 + prototypes)
        self.backbone = backbone
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in backbone.channels)
        self.head = nn.Sequential(
            Conv2dNormActivation(channels, channels, norm_layer=None),
            Conv2dNormActivation(channels, channels, norm_layer=None),
            nn.Conv2d(channels, sum(self.outputs), 1),
        )
        self.prototypes = nn.Sequential(
            Conv2dNormActivation(channels, channels, norm_layer=None),
            Conv2dNormActivation(channels, channels, norm_layer=None),
            nn.Conv2d(channels, prototypes, 1),
        )
        nn.init.constant_(self.head[-1].bias[:num_classes], -4.0)  # classes are rare at first

    def features(self, images: list[Tensor]) -> Features:
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = [lateral(x) for lateral, x in zip(self.laterals, self.backbone(batch), strict=True)]
        level = sum(upsample_aligned(x, 2**i) for i, x in enumerate(maps))  # (B, channels, H / 8, W / 8)
        head = self.head(level).float().flatten(2).transpose(1, 2)  # (B, L, C + 4 + 1 + P)
        class_logits, sides, coefficients = head.split(self.outputs, 2)

        rows, columns = grid_coordinates(*batch.shape[-2:], STRIDE, batch.device)
        cells = torch.cartesian_prod(rows, columns).flip(1).float()  # (L, 2) x, y
        sides = 2 * STRIDE * sides.clamp(max=4).exp()  # (B, L, 4) pixels from the cell to each side
        boxes = torch.cat([cells - sides[..., :2], cells + sides[..., 2:]], 2)  # (B, L, 4)
        return Features(cells, class_logits, boxes, coefficients, self.prototypes(level).float())

    def masks(self, features: Features, image: Tensor, cell: Tensor) -> Tensor:
        """Mask logits (M, h, w) on the mask grid of cells (M,) of images (M,)."""
        coefficients = features.coefficients[image, cell]  # (M, 1 + P)
        prototypes = features.prototypes.flatten(2)[image]  # (M, P, L)
        logits = coefficients[:, :1] + torch.einsum("mp,mpl->ml", coefficients[:, 1:], prototypes)  # (M, L)

        boxes = features.boxes[image, cell].detach()  # (M, 4)
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2  # (M, 2) each
        outside = ((features.cells - center[:, None]).abs() - half[:, None]).relu().sum(2)  # (M, L) pixels
        logits = (logits - outside / STRIDE).unflatten(1, features.prototypes.shape[-2:])  # (M, H / 8, W / 8)
        return upsample_aligned(logits[:, None], STRIDE // self.mask_stride)[:, 0]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        features = self.features(images)
        scores, labels = features.class_logits.sigmoid().max(2)  # (B, L) each
        image, cell = (scores > 0.05).nonzero(as_tuple=True)  # (K,) each
        scores, labels = scores[image, cell], labels[image, cell]
        sizes = torch.tensor([[i.shape[2], i.shape[1]] * 2 for i in images], device=scores.device)  # (B, 4)
        boxes = features.boxes[image, cell].clamp(min=0).minimum(sizes[image])  # (K, 4)
        keep = batched_nms(boxes, scores, image * self.num_classes + labels, 0.5)
        image, cell = image[keep], cell[keep]

        def decode_masks(indices: Tensor, _boxes: Tensor, _labels: Tensor) -> Tensor:
            return self.masks(features, image[indices], cell[indices])

        return Candidates(boxes[keep], scores[keep], labels[keep], image, decode_masks)

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        check_labels(targets, self.num_classes)
        features = self.features(images)
        boxes = torch.cat([target["boxes"] for target in targets])  # (T, 4)
        labels = torch.cat([target["labels"] for target in targets])  # (T,)
        owner = torch.cat([torch.full_like(target["labels"], i) for i, target in enumerate(targets)])  # (T,)

        # The cells nearest to the middle of a box, nine at most, are its positive samples.
        center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2  # (T, 1, 2)
        near = (features.cells - center).abs().amax(2) < 1.5 * STRIDE  # (T, L)
        target, cell = near.nonzero(as_tuple=True)  # (M,) each
        image, count = owner[target], global_count(near.sum(), minimum=1)

        truth = torch.zeros_like(features.class_logits)  # (B, L, C)
        truth[image, cell, labels[target]] = 1.0
        focal = sigmoid_focal_loss(features.class_logits, truth, reduction="sum") / count
        giou = generalized_box_iou_loss(features.boxes[image, cell], boxes[target], reduction="sum") / count
        masks = MaskPredictions(self.masks(features, image, cell), target)
        return StudentOutput({"loss_class": focal, "loss_box": giou}, [masks])

    def detect(self, images: list[Tensor]) -> list[Detections]:
        found = self.forward_teacher(images)
        indices = torch.arange(len(found.scores), device=found.scores.device)
        probabilities = found.own_masks(indices).sigmoid()[:, None]  # (K, 1, h, w)
        masks = upsample_aligned(probabilities, self.mask_stride)  # (K, 1, H, W)
        detections = []
        for i, image in enumerate(images):
            mine = found.image_index == i
            detections.append(
                {
                    "boxes": found.boxes[mine],
                    "labels": found.labels[mine],
                    "scores": found.scores[mine],
                    "masks": masks[mine, :, : image.shape[1], : image.shape[2]],
                }
            )
        return detections


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    write_shapes(arguments.data)
    index = read_split(arguments.data, "train")
    data = InstanceDataset(index, transform=training_transform(128))
    sampler = RandomSampler(data, num_samples=8 * arguments.steps)
    loader = DataLoader(data, 8, sampler=sampler, collate_fn=collate)

    segmenter = PrototypeSegmenter(build_backbone("efficientnet_lite0"), len(index.class_names))
    model = BoxTeacher(
        segmenter,
        teacher=EMATeacher(segmenter, momentum=0.97),
        warmup_steps=arguments.steps // 5,
        pseudo_warmup_steps=arguments.steps,
    ).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, arguments.steps)
    for images, targets in loader:  # targets: boxes and labels, no masks
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()  # the teacher follows by itself
        schedule.step()

    classes = {"class_names": index.class_names, "category_ids": index.category_ids}
    print(evaluate_segmenter(model.unwrap(), arguments.data, image_size=128, **classes).table)


if __name__ == "__main__":
    main()
