"""IoU of a checkpoint's pseudo masks with the annotated masks of training images.

    python -m tests.benchmarks.pseudo_masks RUN/last.pt --data DIR
        [--iou-threshold 0.8] [--teacher-size SHORTEST LONGEST] [--batches N]

The checkpoint is the teacher, on images transformed as in `boxteacher train`. Annotated masks are only
compared with; training from boxes never reads them.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from boxteacher import EMATeacher
from boxteacher.data import InstanceDataset, collate, read_split, training_transform
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.grid import mask_grid
from boxteacher.targets import grid_targets

_BATCH_SIZE = 4


def measure(teacher: EMATeacher, batches: DataLoader) -> tuple[Tensor, Tensor]:  # type: ignore[type-arg]
    """IoU (T,) of each target's pseudo mask with its annotated mask on the grid, and confidence (T,)."""
    overlaps, confidences = [], []
    for images, targets in batches:
        grid = mask_grid(images, teacher.provider.mask_stride, teacher.provider.size_divisor)
        truth = grid_targets(images, targets, grid)
        pseudo = teacher(images, targets, grid)
        masks = pseudo.masks & truth.box_masks  # (T, h, w)
        union = (masks | truth.masks).flatten(1).sum(1)  # (T,)
        overlaps.append((masks & truth.masks).flatten(1).sum(1) / union.clamp(min=1))
        confidences.append(pseudo.confidence)
    return torch.cat(overlaps), torch.cat(confidences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iou-threshold", type=float, default=0.5)
    parser.add_argument("--teacher-size", type=int, nargs=2, default=None)
    parser.add_argument("--batches", type=int, default=12, help="number of batches of four images")
    arguments = parser.parse_args()
    segmenter, info = load_checkpoint(arguments.checkpoint)
    index = read_split(arguments.data, "train", read_masks=True)
    data = InstanceDataset(index, transform=training_transform(info.image_size))
    torch.manual_seed(0)
    some = torch.randperm(len(data))[: arguments.batches * _BATCH_SIZE].tolist()
    batches = DataLoader(torch.utils.data.Subset(data, some), _BATCH_SIZE, collate_fn=collate)
    size = None if arguments.teacher_size is None else tuple(arguments.teacher_size)
    teacher = EMATeacher(segmenter, iou_threshold=arguments.iou_threshold, image_size=size)
    overlap, confidence = measure(teacher, batches)
    found = confidence > 0
    print(
        f"{int(found.sum())} of {len(found)} targets have a pseudo mask; IoU with the annotated one: mean "
        f"{overlap[found].mean():.3f}, median {overlap[found].median():.3f}; mean confidence "
        f"{confidence[found].mean():.3f}"
    )


if __name__ == "__main__":
    main()
