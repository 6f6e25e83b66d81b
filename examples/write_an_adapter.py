"""A segmenter of one's own, taught masks from boxes alone; docs/write_an_adapter.md walks through it.

    python examples/write_an_adapter.py --data FOLDER_FOR_DEMO_DATA

Cells of a map of stride 8 give classes, boxes and the coefficients of mask prototypes (YOLACT, ICCV 2019).
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.ops import Conv2dNormActivation, batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from boxteacher import BoxTeacher, Candidates, MaskPredictions, StudentOutput
from boxteacher.data import InstanceDataset, collate, read_split, training_transform, write_shapes
from boxteacher.engine.evaluate import evaluate_segmenter
from boxteacher.geometry import grid_coordinates, pad_images
from boxteacher.resampling import upsample_aligned
from boxteacher.validation import check_labels
from boxteacher_adapters.parts.backbones import build_backbone


class PrototypeSegmenter(nn.Module):
    mask_stride, size_divisor, stride = 4, 32, 8  # the last: of the one map that everything is read from

    def __init__(self, backbone, num_classes, channels=96, prototypes=16):
        super().__init__()
        self.backbone, self.num_classes, self.split = backbone, num_classes, (num_classes, 4, prototypes + 1)
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in backbone.channels)
        convs = [Conv2dNormActivation(channels, channels, norm_layer=None) for _ in range(4)]
        self.head = nn.Sequential(*convs[:2], nn.Conv2d(channels, sum(self.split), 1))
        self.prototypes = nn.Sequential(*convs[2:], nn.Conv2d(channels, prototypes, 1))
        nn.init.constant_(self.head[-1].bias[:num_classes], -4.0)

    def forward(self, images):
        found = self.forward_teacher(images)
        masks = found.own_masks(torch.arange(len(found.scores), device=found.scores.device)).sigmoid()
        masks = upsample_aligned(masks[:, None], self.mask_stride)  # (K, 1, H, W) on the canvas
        columns = {"boxes": found.boxes, "labels": found.labels, "scores": found.scores, "masks": masks}
        each = [{k: v[found.image_index == i] for k, v in columns.items()} for i in range(len(images))]
        for one, image in zip(each, images, strict=True):
            one["masks"] = one["masks"][..., : image.shape[1], : image.shape[2]]
        return each

    def features(self, images):
        batch = pad_images([self.backbone.normalize(image) for image in images], self.size_divisor)
        maps = [lateral(x) for lateral, x in zip(self.laterals, self.backbone(batch), strict=True)]
        level = sum(upsample_aligned(x, 2**i) for i, x in enumerate(maps))  # (B, channels, H / 8, W / 8)
        head = self.head(level).float().flatten(2).transpose(1, 2)  # (B, L, C + 4 + P + 1)
        classes, sides, coefficients = head.split(self.split, 2)
        rows, columns = grid_coordinates(*batch.shape[-2:], self.stride, batch.device)
        cells = torch.cartesian_prod(rows, columns).flip(1).float()  # (L, 2) x, y in pixels
        sides = 2 * self.stride * sides.clamp(max=4).exp()  # (B, L, 4) pixels from the cell
        boxes = torch.cat([cells - sides[..., :2], cells + sides[..., 2:]], 2)  # (B, L, 4)
        return cells, classes, boxes, coefficients, self.prototypes(level).float()

    def masks(self, features, image, cell):
        cells, _, boxes, coefficients, prototypes = features
        boxes, chosen = boxes[image, cell].detach(), coefficients[image, cell]  # (M, 4), (M, P + 1)
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2  # (M, 2) each
        outside = ((cells - center[:, None]).abs() - half[:, None]).relu().sum(2) / self.stride  # (M, L)
        drawn = torch.einsum("mp,mpl->ml", chosen[:, 1:], prototypes.flatten(2)[image])  # (M, L)
        logits = (drawn + chosen[:, :1] - outside).unflatten(1, prototypes.shape[-2:])  # (M, H / 8, W / 8)
        return upsample_aligned(logits[:, None], self.stride // self.mask_stride)[:, 0]  # (M, h, w)

    def forward_teacher(self, images):
        features = self.features(images)
        scores, labels = features[1].sigmoid().max(2)  # (B, L) each
        image, cell = (scores > 0.05).nonzero(as_tuple=True)  # (K,) each
        sizes = torch.tensor([[i.shape[2], i.shape[1]] * 2 for i in images], device=scores.device)  # (B, 4)
        boxes = features[2][image, cell].clamp(min=0).minimum(sizes[image])  # (K, 4)
        keep = batched_nms(boxes, scores[image, cell], image * self.num_classes + labels[image, cell], 0.5)
        boxes, image, cell = boxes[keep], image[keep], cell[keep]
        decode_masks = lambda index, *_: self.masks(features, image[index], cell[index])  # noqa: E731
        return Candidates(boxes, scores[image, cell], labels[image, cell], image, decode_masks)

    def forward_student(self, images, targets):
        check_labels(targets, self.num_classes)
        features = cells, classes, boxes, _, _ = self.features(images)
        wanted, labels = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
        owner = torch.cat([torch.full_like(target["labels"], i) for i, target in enumerate(targets)])  # (T,)
        center = (wanted[:, None, :2] + wanted[:, None, 2:]) / 2  # (T, 1, 2)
        near = (cells - center).abs().amax(2) < 1.5 * self.stride  # (T, L)
        target, cell = near.nonzero(as_tuple=True)  # (M,) each, nine for a target at most
        image, count, truth = owner[target], max(len(target), 1), torch.zeros_like(classes)
        truth[image, cell, labels[target]] = 1.0
        focal = sigmoid_focal_loss(classes, truth, reduction="sum") / count
        giou = generalized_box_iou_loss(boxes[image, cell], wanted[target], reduction="sum") / count
        losses = {"loss_class": focal, "loss_box": giou}
        return StudentOutput(losses, [MaskPredictions(self.masks(features, image, cell), target)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    folder, steps = vars(parser.parse_args()).values()
    write_shapes(folder)
    torch.manual_seed(0)
    index = read_split(folder, "train")
    data = InstanceDataset(index, transform=training_transform(128))
    loader = DataLoader(data, 8, sampler=RandomSampler(data, num_samples=8 * steps), collate_fn=collate)
    segmenter = PrototypeSegmenter(build_backbone("efficientnet_lite0"), len(index.class_names))
    model = BoxTeacher(segmenter, momentum=0.97, warmup_steps=steps // 5, pseudo_warmup_steps=steps).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for batch in loader:  # images and targets: boxes and labels, no masks
        optimizer.zero_grad()
        sum(model(*batch).values()).backward()
        optimizer.step()  # the teacher follows by itself
        schedule.step()
    classes = {"class_names": index.class_names, "category_ids": index.category_ids}
    print(evaluate_segmenter(model.export(), folder, image_size=128, **classes).table)


if __name__ == "__main__":
    main()
