"""Shows how pseudo masks grow while a network learns from boxes alone: the picture on the front page.

    python examples/show_training.py --data FOLDER_FOR_DEMO_DATA --output docs/front.jpg

Trains CondInst on the demo's boxes for 400 steps, three to six minutes. Needs boxteacher[timm,viz].
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from boxteacher import BoxTeacher, Detections, EMATeacher, Target
from boxteacher.adapter import mask_grid, upsample_aligned
from boxteacher.data import (
    InstanceDataset,
    collate,
    evaluation_transform,
    read_split,
    training_transform,
    write_shapes,
)
from boxteacher_adapters.condinst import build_condinst

STEPS = 400
SHOWN_AT = (50, 100, 400)
SHOWN_IMAGES = (2, 7)
COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231"]


def overlay(image: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
    """An image (3, H, W) in [0, 1] under masks (N, H, W) bool and boxes (N, 4), four times as large."""
    picture = (upsample(image[None])[0] * 255).to(torch.uint8)
    if len(boxes) == 0:
        return picture
    if masks.any():
        picture = draw_segmentation_masks(
            picture, upsample(masks[None].float())[0] > 0.5, 0.6, COLORS[: len(masks)]
        )
    return draw_bounding_boxes(picture, 4 * boxes, colors=COLORS[: len(boxes)], width=4)


def upsample(maps: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(maps, scale_factor=4, mode="bilinear")


def pseudo_masks(teacher: EMATeacher, image: Tensor, target: Target) -> Tensor:
    """The teacher's masks (N, H, W) bool of one image's boxes."""
    grid = mask_grid([image], teacher.provider.mask_stride, teacher.provider.size_divisor)
    masks = teacher([image], [target], grid).masks.float()  # (N, h, w)
    return upsample_aligned(masks[:, None], grid.stride)[:, 0, : image.shape[1], : image.shape[2]] > 0.5


def confident(found: Detections) -> tuple[Tensor, Tensor]:
    """Masks (K, H, W) bool and boxes (K, 4) of the detections that score above 0.6, four at most."""
    kept = (found["scores"] > 0.6).nonzero()[: len(COLORS), 0]
    return found["masks"][kept, 0] > 0.5, found["boxes"][kept]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    write_shapes(arguments.data)
    index = read_split(arguments.data, "train")
    data = InstanceDataset(index, transform=training_transform(128))
    loader = DataLoader(data, 8, sampler=RandomSampler(data, num_samples=8 * STEPS), collate_fn=collate)
    plain = InstanceDataset(index, transform=evaluation_transform(128))
    shown = [plain[i] for i in SHOWN_IMAGES]
    none = torch.zeros(0, 1, 1, dtype=torch.bool)
    columns = {"boxes": [overlay(image, none, target["boxes"]) for image, target in shown]}

    segmenter = build_condinst(len(index.class_names), backbone="efficientnet_lite0", image_size=128)
    teacher = EMATeacher(segmenter, momentum=0.975)
    model = BoxTeacher(segmenter, teacher=teacher, warmup_steps=80, pseudo_warmup_steps=STEPS).train()
    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    for step, (images, targets) in enumerate(loader, start=1):
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        if step in SHOWN_AT:
            model.synchronize()
            columns[f"pseudo masks, step {step}"] = [
                overlay(image, pseudo_masks(teacher, image, target), target["boxes"])
                for image, target in shown
            ]

    new = InstanceDataset(read_split(arguments.data, "val"), transform=evaluation_transform(128))
    model.eval()
    with torch.inference_mode():
        columns["predicted"] = [overlay(new[i][0], *confident(model([new[i][0]])[0])) for i in SHOWN_IMAGES]

    figure, axes = plt.subplots(len(shown), len(columns), figsize=(2 * len(columns), 2 * len(shown) + 0.3))
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=9)
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture.permute(1, 2, 0))
            axes[i, j].axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(arguments.output, dpi=90)
    print(arguments.output)


if __name__ == "__main__":
    main()
