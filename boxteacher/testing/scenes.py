"""Images with known boxes: bright rectangles on a dull ground, whose masks are the boxes themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from boxteacher.protocol import Target

SQUARE = ((67, 93), (94, 61))  # height and width: odd, mixed, and together on a square canvas
OBLONG = ((53, 93), (47, 89))  # likewise, on a canvas that is wider than high
_GROUND = (0.35, 0.45, 0.4)
_COLORS = ((0.95, 0.2, 0.1), (0.1, 0.3, 0.95), (0.95, 0.9, 0.15))  # of the classes in `scene_labels`


def scene_labels(num_classes: int) -> list[int]:
    """The labels in use: at most three, so that few steps teach them, the highest among them."""
    return sorted({0, num_classes // 2, num_classes - 1})


def known_boxes(
    num_classes: int,
    device: torch.device,
    *,
    seed: int,
    sizes: Sequence[tuple[int, int]] = SQUARE,
    counts: Sequence[int] = (1, 2),
) -> tuple[list[Tensor], list[Target]]:
    """Images (3, H_i, W_i), and targets with masks.

    The labels in use take turns over a batch's objects, so three objects show them all; a class shows in the
    colour, and not in the place.

    Args:
        num_classes: C.
        device: of all tensors.
        seed: of positions, sizes and noise, and of the first object's label.
        sizes: height and width of each image.
        counts: objects in each image.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = scene_labels(num_classes)
    turn = seed
    images: list[Tensor] = []
    targets: list[Target] = []
    for (height, width), count in zip(sizes, counts, strict=True):
        image = torch.tensor(_GROUND)[:, None, None].expand(3, height, width).clone()
        boxes, labels = [], []
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for n in range(count):
            x0, y0, x1, y1 = _box(height, width, n, count, generator)
            kind, turn = turn % len(classes), turn + 1
            image[:, y0:y1, x0:x1] = torch.tensor(_COLORS[kind])[:, None, None]
            masks[n, y0:y1, x0:x1] = True
            boxes.append([x0, y0, x1, y1])
            labels.append(classes[kind])
        image = (image + 0.1 * torch.rand(image.shape, generator=generator) - 0.05).clamp(0, 1)
        images.append(image.to(device))
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64, device=device),
                "masks": masks.to(device),
            }
        )
    return images, targets


def _box(
    height: int, width: int, n: int, count: int, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """A box, in whole pixels, in the n-th of `count` parts of the image along its longest side."""
    rows, columns = (height // count, width) if height > width else (height, width // count)
    top, left = (n * rows, 0) if height > width else (0, n * columns)
    draws = torch.rand(4, generator=generator).tolist()
    box_height, box_width = int(rows * (0.5 + 0.3 * draws[0])), int(columns * (0.5 + 0.3 * draws[1]))
    y0 = top + int((rows - box_height) * draws[2])
    x0 = left + int((columns - box_width) * draws[3])
    return x0, y0, x0 + box_width, y0 + box_height
