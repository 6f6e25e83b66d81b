"""A training run, from a data set to a checkpoint."""

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
from boxteacher.engine.run import RunState, new_checkpoint, save_if_due, write_settings
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.step import take_step
from boxteacher.engine.weights import build_with_weights
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.supervision import BoxSupervised, MaskSupervised, TrainingWrapper
from boxteacher.teacher import BoxTeacher


def train(settings: TrainSettings) -> Path:
    """Trains a segmenter and returns the path of its checkpoint, `output/last.pt`.

    The folder of the run also gets `settings.json`, and `log.jsonl` with a line per step.

    Raises:
        InputError: the data, the weights or the settings cannot be used; nothing was trained.
        FloatingPointError: a loss or the gradient is infinite or NaN; `last.pt` is the last good checkpoint.
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
        max_detections=detections,
    )
    write_settings(settings)
    with TrainingLog(settings.output, settings.steps) as log:
        for images, targets in training_batches(data, settings, start=state.step):
            numbers = take_step(state, images, targets, settings.gradient_clip)
            log.write(state.step, numbers)
            save_if_due(state, checkpoint, info, settings.steps)
    return checkpoint


def supervise(segmenter: nn.Module, settings: TrainSettings) -> TrainingWrapper:
    """Wraps a segmenter for training with the supervision of the settings."""
    if settings.supervision == "mask":
        return MaskSupervised(segmenter)
    if settings.supervision == "box":
        return BoxSupervised(segmenter, warmup_steps=settings.warmup_steps)
    augmentations = {
        "none": nn.Identity(),
        "color": StrongAugmentation(blur=0.0),
        "color+blur": StrongAugmentation(),
    }
    teacher = EMATeacher(
        segmenter,
        momentum=settings.momentum,
        iou_threshold=settings.iou_threshold,
        quality_at=settings.quality_at,
        image_size=(settings.teacher_size[0], settings.teacher_size[1]) if settings.teacher_size else None,
        dtype=torch.bfloat16 if settings.teacher_dtype == "bfloat16" else None,
    )
    return BoxTeacher(
        segmenter,
        teacher=teacher,
        augmentation=augmentations[settings.augmentation],
        warmup_steps=settings.warmup_steps,
        pseudo_warmup_steps=settings.pseudo_warmup_steps,
        teacher_interval=settings.teacher_interval,
    )
