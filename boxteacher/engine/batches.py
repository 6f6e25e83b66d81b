"""The training split, and its batches, which depend on the run's seed and the position in the run alone."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from boxteacher.data import (
    DataIndex,
    InstanceDataset,
    collate,
    find_split,
    read_split,
    training_transform,
)
from boxteacher.engine.devices import to_device
from boxteacher.engine.evaluate import read_truth
from boxteacher.engine.segmenters import COCO_MAX_DETECTIONS
from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

_COCO_IGNORED_BOTTOM_ROWS = 10


def training_data(settings: TrainSettings) -> InstanceDataset:
    """The training split; masks are read for mask supervision alone.

    Raises:
        InputError: see `read_split` and `InstanceDataset`.
    """
    index = read_split(settings.data, "train", read_masks=settings.supervision == "mask")
    return InstanceDataset(
        index,
        transform=training_transform(settings.image_size, settings.shortest_side),
        ignored_bottom_rows=_COCO_IGNORED_BOTTOM_ROWS if index.is_coco else 0,
    )


def check_validation_split(settings: TrainSettings, data: InstanceDataset) -> DataIndex | None:
    """The validation split, read as the evaluation will read it; None with a warning if there is none.

    Raises:
        InputError: the evaluation could not use it.
    """
    try:
        find_split(settings.data, "val")
    except InputError as error:
        logger.warning("there is nothing to evaluate this run on: %s", error)
        return None
    return read_truth(settings.data, data.index.class_names, data.index.category_ids)


def max_detections(settings: TrainSettings, *splits: DataIndex | None) -> int:
    """Maximum number of detections per image: that of the settings, or else COCO's 100, or as many as needed.

    An image with more boxes than the maximum is logged as a warning, a maximum above 100 as information.
    """
    boxes, image = max((split.max_boxes() for split in splits if split is not None), key=lambda pair: pair[0])
    maximum = settings.max_detections or max(COCO_MAX_DETECTIONS, boxes)
    if boxes > maximum:
        logger.warning(
            "%s has %d boxes, but at most %d objects are detected in an image: raise --max-detections",
            image,
            boxes,
            maximum,
        )
    elif maximum > COCO_MAX_DETECTIONS:
        logger.info("%s has %d boxes: up to %d objects are detected in an image", image, boxes, maximum)
    return maximum


def check_queries(student: nn.Module, settings: TrainSettings, data: InstanceDataset) -> None:
    """Raises InputError if an image has more boxes than the student has queries."""
    queries: Any = getattr(student, "num_queries", math.inf)
    boxes, image = data.index.max_boxes()
    if boxes > queries:
        raise InputError(
            f"{image} has {boxes} boxes, but {settings.model} detects at most {queries} objects, one per "
            "query: raise --max-detections, remove such images from the training split, or choose another "
            "--model"
        )


def training_batches(
    data: InstanceDataset, settings: TrainSettings, *, start: int, end: int | None = None
) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Images and targets of each step, on the run's device.

    They are the same for any number of workers and for any `start`.

    Args:
        data: training split.
        settings: settings of the run.
        start: number of steps already taken.
        end: step after which to stop; that of the run if not given.
    """
    positions = range(start * settings.batch_size, (end or settings.steps) * settings.batch_size)
    loader = DataLoader(
        SeededSamples(data, settings.seed),
        batch_size=settings.batch_size,
        sampler=sample_order(len(data), settings.seed, positions),
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=settings.device.startswith("cuda"),
        generator=torch.Generator(),  # otherwise the loader takes a seed from the global one
    )
    device = torch.device(settings.device)
    return (to_device(images, targets, device) for images, targets in loader)


def sample_order(size: int, seed: int, positions: range) -> Iterator[tuple[int, int]]:
    """Positions in a run, each with the index of its image; every epoch is another permutation of the images.

    Args:
        size: number of images.
        seed: seed of the run.
        positions: positions in ascending order; position 0 is the run's first sample.
    """
    epoch, order = -1, torch.empty(0)
    for position in positions:
        if position // size != epoch:
            epoch = position // size
            generator = torch.Generator().manual_seed(_seed_of(seed, epoch))
            order = torch.randperm(size, generator=generator)
        yield position, int(order[position % size])


class SeededSamples(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Samples by position and index; the random transform of each depends on seed and position alone.

    Targets get the image's `file_name`, for error messages.
    """

    def __init__(self, data: InstanceDataset, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        position, index = place
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPU's generator too.
            torch.default_generator.manual_seed(_seed_of(self.seed, position))
            image, target = self.data[index]
        return image, {**target, "file_name": self.data.index.file_names[index]}


def _seed_of(*numbers: int) -> int:
    """One seed of 32 bits, as many as torch's generator uses."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
