"""Pictures of detections."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from boxteacher.engine.fonts import FONT_SIZE, font_and_names
from boxteacher.protocol import Detections

_PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
)


def draw_detections(
    image: Tensor, detections: Detections, class_names: Sequence[str], score_threshold: float
) -> Tensor:
    """Draws the masks, boxes, classes and scores of detections on their image, each in a color of its own.

    Args:
        image: (3, H, W), RGB in [0, 1].
        detections: detections in this image, at this size.
        class_names: names of labels 0 … C−1 (see `font_and_names`).
        score_threshold: minimum score of the detections that are shown.

    Returns:
        (3, H, W) uint8.
    """
    picture = (image.cpu().clamp(0, 1) * 255).to(torch.uint8)
    shown = detections["scores"] >= score_threshold
    masks = (detections["masks"][shown, 0] > 0.5).cpu()  # (K, H, W)
    boxes = detections["boxes"][shown].cpu()  # (K, 4)
    if len(boxes) == 0:
        return picture
    font, names = font_and_names(tuple(class_names))
    colors = [_PALETTE[i % len(_PALETTE)] for i in range(len(boxes))]
    rows = zip(detections["labels"][shown].tolist(), detections["scores"][shown].tolist(), strict=True)
    captions = [f"{names[label]} {score:.2f}" for label, score in rows]
    picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colors)
    size = None if font is None else FONT_SIZE
    return draw_bounding_boxes(picture, boxes, labels=captions, colors=colors, font=font, font_size=size)


def write_picture(path: Path, picture: Tensor) -> None:
    """Writes a picture (3, H, W) uint8 in the format that the file's ending names."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def picture_grid(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Arranges pictures (3, H_i, W_i) uint8 in rows of `columns`, as one picture (3, H, W) uint8."""
    height = max(picture.shape[1] for picture in pictures)
    width = max(picture.shape[2] for picture in pictures)
    padded = [
        F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]), value=255)
        for picture in pictures
    ]
    return make_grid(padded, nrow=columns, padding=4, pad_value=255)
