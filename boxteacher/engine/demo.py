"""The demo: renders a data set, trains on its boxes alone, evaluates, and shows masks, in a few minutes."""

from pathlib import Path

import torch

from boxteacher.data import InstanceDataset, evaluation_transform, read_split, write_shapes
from boxteacher.engine.average_precision import Evaluation
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.drawing import draw_detections, picture_grid, write_picture
from boxteacher.engine.evaluate import evaluate
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.train import train

_PICTURES = 12
_SHOWN_SCORE = 0.6


def run_demo(output: str | Path, *, steps: int) -> tuple[Evaluation, Path]:
    """Renders `output/data`, trains CondInst on its boxes in `output/run`, evaluates, and draws masks.

    The extra `timm` brings the backbone and its weights; nothing is downloaded.

    Returns:
        The evaluation, and the path of the picture.

    Raises:
        InputError: `output` holds something else, or the extra `timm` is not installed.
    """
    output = Path(output)
    data = output / "data"
    settings = TrainSettings(
        model="condinst",
        backbone="efficientnet_lite0",
        data=data,
        output=output / "run",
        steps=steps,
        batch_size=8,
        image_size=128,
        lr=1e-3,
        workers=0,
    )
    # Built before anything is written, as its extra may not be installed.
    build_segmenter(settings.model, 1, backbone=settings.backbone, weights="imagenet", image_size=128)
    write_shapes(data)
    checkpoint = train(settings)
    evaluation = evaluate(checkpoint, data, workers=0)
    picture = output / "masks.png"
    write_picture(picture, _predictions(checkpoint, data))
    return evaluation, picture


@torch.inference_mode()
def _predictions(checkpoint: Path, data: Path) -> torch.Tensor:
    """Validation images at twice their size, overlaid with detections, in rows of four."""
    segmenter, info = load_checkpoint(checkpoint)
    images = InstanceDataset(read_split(data, "val"), transform=evaluation_transform(2 * info.image_size))
    pictures = []
    for index in range(min(_PICTURES, len(images))):
        large, _ = images[index]
        small = torch.nn.functional.avg_pool2d(large, 2)
        (detections,) = segmenter([small])
        enlarged = torch.nn.functional.interpolate(detections["masks"], large.shape[-2:], mode="bilinear")
        detections = {**detections, "boxes": detections["boxes"] * 2, "masks": enlarged}
        pictures.append(draw_detections(large, detections, info.class_names, _SHOWN_SCORE))
    return picture_grid(pictures, columns=4)
