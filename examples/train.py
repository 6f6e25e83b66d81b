"""Trains any of the segmenters from boxes alone, as a page to copy and edit.

    python examples/train.py --model condinst --data DIR --output RUN

DIR holds COCO JSON: `annotations/{train,val}.json` with `{train,val}/`, or COCO's own layout. `boxteacher
train` adds checks, logs, checkpoints on the way, and more settings.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler

from boxteacher import BoxTeacher, EMATeacher
from boxteacher.data import InstanceDataset, collate, read_split, training_transform
from boxteacher.engine.checkpoint import SegmenterInfo, save_checkpoint
from boxteacher.engine.devices import pick_device, to_device
from boxteacher.engine.evaluate import evaluate
from boxteacher.engine.segmenters import build_segmenter, segmenter_names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=segmenter_names(), default="condinst")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", default="imagenet", choices=("imagenet", "none"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=512)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = pick_device("auto")
    index = read_split(arguments.data, "train")
    data = InstanceDataset(index, transform=training_transform(arguments.image_size))
    sampler = RandomSampler(data, num_samples=arguments.steps * arguments.batch_size)
    loader = DataLoader(data, arguments.batch_size, sampler=sampler, collate_fn=collate, num_workers=2)

    segmenter = build_segmenter(
        arguments.model,
        len(index.class_names),
        backbone=arguments.backbone,
        weights=arguments.weights,
        image_size=arguments.image_size,
    )
    model = BoxTeacher(
        segmenter,
        teacher=EMATeacher(segmenter, momentum=0.99),
        warmup_steps=arguments.steps // 5,
        pseudo_warmup_steps=arguments.steps,
    )
    model.to(device).train()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=arguments.steps)
    for step, (images, targets) in enumerate(loader, start=1):
        losses = model(*to_device(images, targets, device))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()  # the teacher follows by itself
        schedule.step()
        if step % 20 == 0:
            print(step, {name: round(loss.item(), 3) for name, loss in losses.items()})

    arguments.output.mkdir(parents=True, exist_ok=True)
    info = SegmenterInfo(
        arguments.model, arguments.backbone, arguments.image_size, index.class_names, index.category_ids
    )
    checkpoint = arguments.output / "last.pt"
    model.synchronize()  # the teacher follows the last step
    save_checkpoint(checkpoint, model.segmenter, info)
    print(evaluate(checkpoint, arguments.data).table)


if __name__ == "__main__":
    main()
