"""A training run, from a data set to a checkpoint."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from boxteacher.augmentation import StrongAugmentation
from boxteacher.engine.batches import (
    check_queries,
    check_validation_split,
    max_detections,
    training_batches,
    training_data,
)
from boxteacher.engine.checkpoint import SegmenterInfo
from boxteacher.engine.optimization import build_optimizer, build_schedule
from boxteacher.engine.progress import TrainingLog
from boxteacher.engine.rounds import round_starts, start_round
from boxteacher.engine.run import RunState, new_checkpoint, noting_what_is_kept, run_folder, save_if_due
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.step import take_step
from boxteacher.engine.teachers import build_teacher
from boxteacher.engine.weights import build_with_weights
from boxteacher.errors import InputError
from boxteacher.supervision import BoxSupervised, MaskSupervised, TrainingWrapper
from boxteacher.teacher import BoxTeacher

_PIXEL_WEIGHT = 0.5  # BoxTeacher, Sec. 4.1
_ROUNDS_PIXEL_WEIGHT = 1.0  # masks of rounds are better than those of a step


def train(settings: TrainSettings) -> Path:
    """Trains a segmenter and returns the path of its checkpoint, `output/last.pt`.

    The folder of the run also gets `settings.json`, `log.jsonl` with a line per step, and the file of its
    lock. Whatever stops the run carries a note (`__notes__`) with its last step and the checkpoint that is
    kept.

    Raises:
        InputError: the data, the weights or the settings cannot be used, or another run is writing to the
            folder; nothing was trained.
        FloatingPointError: a loss or the gradient is infinite or NaN; `last.pt` is the last good checkpoint.
        OSError: the folder cannot be written to.
    """
    checkpoint = new_checkpoint(settings.output)
    torch.manual_seed(settings.seed)

    data = training_data(settings)
    detections = max_detections(settings, data.index, check_validation_split(settings, data))
    segmenter = build_with_weights(
        settings.model,
        len(data.index.class_names),
        backbone=settings.backbone,
        weights=settings.weights,
        image_size=settings.image_size,
        mask_samples=settings.mask_samples,
        max_detections=detections,
    )
    # Convolutions are fastest in this memory format, on CPUs and on GPUs.
    segmenter = segmenter.to(memory_format=torch.channels_last)
    model = supervise(segmenter, settings).to(settings.device).train()
    check_queries(model.student, settings, data)

    optimizer = build_optimizer(model.student, settings)
    state = RunState(model, optimizer, build_schedule(optimizer, settings))
    info = SegmenterInfo(
        settings.model,
        settings.backbone,
        settings.image_size,
        data.index.class_names,
        data.index.category_ids,
        shortest_side=max(settings.shortest_side, default=None),
        refinement=settings.refinement,
        max_detections=detections,
    )
    rounds = round_starts(settings)
    with (
        run_folder(settings),
        noting_what_is_kept(state, checkpoint),
        TrainingLog(settings.output, settings.steps) as log,
    ):
        for start, end in pairwise(sorted({0, *rounds, settings.steps})):
            if start in rounds:
                data = start_round(state, data, settings)
            for images, targets in training_batches(data, settings, start=start, end=end):
                numbers = take_step(state, images, targets, settings.gradient_clip)
                log.write(state.step, numbers)
                save_if_due(state, checkpoint, info, settings.steps)
    return checkpoint


def supervise(segmenter: nn.Module, settings: TrainSettings) -> TrainingWrapper:
    """Wraps a segmenter for training with the supervision of the settings.

    Raises:
        InputError: the teacher cannot be built, or the settings name one that nothing would use.
    """
    if settings.teacher != "ema" and settings.supervision != "teacher":
        raise InputError(
            f"teacher is {settings.teacher!r}, but supervision is {settings.supervision!r}: leave one of "
            "them out"
        )
    if settings.supervision == "mask":
        return MaskSupervised(segmenter)
    if settings.supervision == "box":
        return BoxSupervised(
            segmenter, warmup_steps=settings.warmup_steps, ellipse_steps=settings.ellipse_steps
        )
    augmentations = {
        "none": nn.Identity(),
        "color": StrongAugmentation(blur=0.0),
        "color+blur": StrongAugmentation(),
    }
    return BoxTeacher(
        segmenter,
        teacher=build_teacher(segmenter, settings),
        augmentation=augmentations[settings.augmentation],
        pixel_weight=_ROUNDS_PIXEL_WEIGHT if settings.rounds else _PIXEL_WEIGHT,
        warmup_steps=settings.warmup_steps,
        pseudo_warmup_steps=settings.pseudo_warmup_steps,
        ellipse_steps=settings.ellipse_steps,
        teacher_interval=0 if settings.rounds else settings.teacher_interval,
    )
