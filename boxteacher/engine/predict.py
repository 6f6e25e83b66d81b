"""Prediction: masks of images, overlaid on them and as COCO results."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from boxteacher.data import evaluation_transform
from boxteacher.data.images import find_images, read_and_check_image, read_image
from boxteacher.data.masks import decode_masks
from boxteacher.data.problems import log_warnings
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint
from boxteacher.engine.devices import pick_device
from boxteacher.engine.drawing import draw_detections, write_picture
from boxteacher.engine.evaluate import Refinement, coco_results
from boxteacher.engine.files import write_atomically
from boxteacher.engine.segmenters import limit_detections
from boxteacher.errors import InputError
from boxteacher.protocol import Detections


def predict(
    checkpoint: str | Path,
    images: str | Path | Iterable[str | Path],
    output: str | Path,
    *,
    score_threshold: float = 0.6,
    refinement: Refinement | None = None,
    device: str = "auto",
    max_detections: int | None = None,
) -> Path:
    """Writes images overlaid with their masks to `output/NAME.png`, and `output/results.json`.

    NAME is an image's without its suffix, or with it for all images if two differ in the suffix alone.
    `results.json` holds COCO results, whose `image_id` counts the images from 0 and whose `file_name` is the
    image's path. Masks and boxes are those of the upright view (see `read_image`).

    Args:
        checkpoint: checkpoint that `train` wrote.
        images: image file or files, and folders that stand for the images in them (see `find_images`), no two
            of the same name.
        output: folder to write to, created if missing.
        score_threshold: minimum score, in [0, 1], of the detections that are shown and written.
        refinement: "color" or "none"; what the run was made with if not given.
        device: name of the device (see `pick_device`).
        max_detections: maximum number of detections per image; the checkpoint's if not given.

    Returns:
        Path of `results.json`.

    Raises:
        InputError: the checkpoint, an image or the threshold cannot be used; nothing is written.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"score_threshold={score_threshold} is not in 0…1, where scores are; change it")
    paths, output = find_images(images), Path(output)
    pictures = [output / f"{name}.png" for name in _picture_names(paths)]
    _check_images(paths, pictures)
    segmenter, info = load_checkpoint(checkpoint)
    refinement = refinement or info.refinement
    if max_detections is not None:
        limit_detections(segmenter, max_detections)
    segmenter.to(pick_device(device))
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for image_id, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        image = read_image(path)
        detections = _detect(segmenter, image, info)
        kept = detections["scores"] >= score_threshold
        detections = {key: value[kept] for key, value in detections.items()}
        size = (image.shape[-2], image.shape[-1])
        refine_to = image.to(detections["masks"].device) if refinement == "color" else None
        rows = coco_results(detections, image_id, size, info.category_ids, refine_to=refine_to)
        full_size = {**detections, **_boxes_and_masks(rows, size)}
        write_picture(picture, draw_detections(image, full_size, info.class_names, score_threshold))
        results += [{"file_name": str(path), **row} for row in rows]
    file = output / "results.json"
    write_atomically(file, lambda temporary: temporary.write_text(json.dumps(results) + "\n"))
    return file


def _picture_names(paths: list[Path]) -> list[str]:
    """Names of the images without their suffixes, or all with them if two would be the same."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [path.name for path in paths]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        first, second, *_ = (path for path in paths if path.name == twice)
        raise InputError(
            f"{first} and {second} have one name, as would their pictures: use two calls with two --output"
        )
    return names


def _check_images(paths: list[Path], pictures: list[Path]) -> None:
    """Raises InputError if an image cannot be read or would be overwritten, and logs guesses of white."""
    warnings = []
    for path, picture in zip(paths, pictures, strict=True):
        if picture.resolve() == path.resolve():
            raise InputError(f"{path}: its picture would overwrite it: give another --output")
        warnings.append(read_and_check_image(path)[1])
    log_warnings(filter(None, warnings))


@torch.inference_mode()
def _detect(segmenter: nn.Module, image: Tensor, info: SegmenterInfo) -> Detections:
    """Detections of an image (3, H, W) at the size that the segmenter was trained with."""
    small, _ = evaluation_transform(info.image_size, info.shortest_side)(image, {})
    device = next(segmenter.parameters()).device
    (detections,) = segmenter([small.as_subclass(Tensor).to(device)])
    return detections


def _boxes_and_masks(rows: list[dict[str, Any]], size: tuple[int, int]) -> Detections:
    """Boxes (K, 4) and masks (K, 1, H, W) of COCO results, in pixels of the image."""
    counts = [row["segmentation"]["counts"].encode() for row in rows]
    boxes = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
    return {"boxes": box_convert(boxes, "xywh", "xyxy"), "masks": decode_masks(counts, *size)[:, None]}
