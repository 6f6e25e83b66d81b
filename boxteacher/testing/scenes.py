"""Images with known boxes: bright rectangles on a dull ground, whose masks are the boxes themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from boxteacher.protocol import Target
from boxteacher.testing.findings import Subject

Batch = tuple[list[Tensor], list[Target]]

SQUARE = ((67, 93), (94, 61))  # height and width: odd, mixed, and together on a square padded batch
OBLONG = ((53, 93), (47, 89))  # likewise, on a padded batch that is wider than high
_GROUND = (0.35, 0.45, 0.4)
_COLORS = ((0.95, 0.2, 0.1), (0.1, 0.3, 0.95), (0.95, 0.9, 0.15))  # one for each class in use


def known_boxes(
    subject: Subject,
    *,
    seed: int,
    sizes: Sequence[tuple[int, int]] = SQUARE,
    counts: Sequence[int] = (1, 2),
) -> Batch:
    """Images (3, H_i, W_i) of these sizes, with so many objects each, and targets with masks.

    At most three classes are in use, so that few steps teach them: the first, the middle and the last. They
    take turns over a batch's objects, the seed says with which to begin; a class shows in the color alone.
    """
    device = subject.device
    generator = torch.Generator().manual_seed(seed)
    classes = sorted({0, subject.num_classes // 2, subject.num_classes - 1})
    turn = seed
    images: list[Tensor] = []
    targets: list[Target] = []
    for (height, width), count in zip(sizes, counts, strict=True):
        image = torch.tensor(_GROUND)[:, None, None].expand(3, height, width).clone()
        longest = int(height > width)  # of x, y
        boxes, labels = torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64)
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for n in range(count):
            # A box of whole pixels in the n-th part of the image along its longest side.
            part, start = torch.tensor([width, height]), torch.zeros(2, dtype=torch.int64)
            part[longest] //= count
            start[longest] = n * part[longest]
            random = torch.rand(2, 2, generator=generator)
            size = (part * (0.5 + 0.3 * random[0])).long()
            start += ((part - size) * random[1]).long()
            boxes[n] = torch.cat([start, start + size])
            x0, y0, x1, y1 = boxes[n].int().tolist()
            kind, turn = turn % len(classes), turn + 1
            image[:, y0:y1, x0:x1] = torch.tensor(_COLORS[kind])[:, None, None]
            masks[n, y0:y1, x0:x1] = True
            labels[n] = classes[kind]
        image = (image + 0.1 * torch.rand(image.shape, generator=generator) - 0.05).clamp(0, 1)
        images.append(image.to(device))
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)})
    return images, targets
