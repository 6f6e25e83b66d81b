"""Rounds: the teacher predicts pseudo masks of all training images, which are kept until the next round."""

import logging
from dataclasses import replace

import numpy as np

from boxteacher.data import DataIndex, InstanceDataset
from boxteacher.data.masks import mask_area
from boxteacher.engine.pseudo_masks import PredictedMasks, predict_pseudo_masks, with_pseudo_masks
from boxteacher.engine.run import RunState
from boxteacher.engine.settings import TrainSettings
from boxteacher.teacher import BoxTeacher

_OUTLINE_SHARE = 0.35  # a disc fills 0.79 of its box, a thin diagonal object perhaps 0.3

logger = logging.getLogger(__name__)


def round_starts(settings: TrainSettings) -> list[int]:
    """The steps before which pseudo masks are predicted; a teacher that does not learn predicts them once."""
    if settings.supervision != "teacher" or settings.rounds == 0:
        return []
    if settings.teacher != "ema":
        return [0]
    parts = settings.rounds + 1
    return sorted({settings.steps * part // parts for part in range(1, parts)} - {0})


def filled_share(predicted: PredictedMasks, index: DataIndex) -> float:
    """Mean share of its box that a pseudo mask fills; 0 without any."""
    sizes = np.repeat(index.sizes, np.diff(index.starts), 0).tolist()  # (M, 2)
    boxes = (index.boxes[:, 2:] - index.boxes[:, :2]).prod(1)  # (M,)
    shares = [
        mask_area(mask, *size) / box
        for mask, size, box in zip(predicted.masks, sizes, boxes, strict=True)
        if mask is not None
    ]
    return float(np.mean(shares)) if shares else 0.0


def start_round(state: RunState, data: InstanceDataset, settings: TrainSettings) -> InstanceDataset:
    """The training split with new pseudo masks of the teacher, also kept in `RUN/pseudo_masks_STEP.npz`."""
    model = state.model
    assert isinstance(model, BoxTeacher)  # only it has rounds
    model.synchronize()
    predicted = predict_pseudo_masks(
        model.teacher,
        data.index,
        image_size=settings.image_size,
        shortest_side=max(settings.shortest_side, default=None),
        device=settings.device,
        workers=settings.workers,
    )
    predicted.save(settings.output / f"pseudo_masks_{state.step:06d}.npz", state.step)
    found = predicted.confidence > 0  # (M,)
    filled = filled_share(predicted, data.index)
    logger.info(
        "step %d: pseudo masks of %d of %d objects, mean confidence %.2f, which fill %.2f of their boxes",
        state.step,
        found.sum(),
        (~data.index.crowd).sum(),
        predicted.confidence[found].mean() if found.any() else 0.0,
        filled,
    )
    if found.any() and filled < _OUTLINE_SHARE:
        logger.warning(
            "masks fill only %.2f of their boxes, so they may have become outlines: lower --lr, or raise "
            "--ellipse-steps",
            filled,
        )
    index = with_pseudo_masks(replace(data.index, masks=None), predicted)
    return InstanceDataset(index, transform=data.transform, ignored_bottom_rows=data.ignored_bottom_rows)
