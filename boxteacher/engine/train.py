"""One training run, from a folder of data to a checkpoint."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from boxteacher import __version__
from boxteacher.augmentation import StrongAugmentation
from boxteacher.data import InstanceDataset, collate, find_split, read_split, training_transform
from boxteacher.data.transforms import min_longest_side
from boxteacher.engine.checkpoint import SegmenterInfo, save_checkpoint
from boxteacher.engine.devices import to_device
from boxteacher.engine.files import write_atomically
from boxteacher.engine.optimization import build_optimizer, build_schedule
from boxteacher.engine.progress import TrainingLog
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.weights import build_with_weights
from boxteacher.errors import InputError
from boxteacher.supervision import BoxSupervised, MaskSupervised, Supervision
from boxteacher.teacher import BoxTeacher

logger = logging.getLogger(__name__)

_COCO_IGNORED_BOTTOM_ROWS = 10
_CHECKPOINTS_PER_RUN = 10
_TEACHER_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
_AUGMENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "strong": partial(StrongAugmentation, blur=0.0),
    "stronger": StrongAugmentation,
}


def train(settings: TrainSettings) -> Path:
    """Trains a segmenter and returns the path of its checkpoint, `output/last.pt`.

    The run's folder also gets `settings.json` and `log.jsonl`, a line per step.

    Raises:
        InputError: the data, the weights or the settings cannot be used; nothing has been trained.
        FloatingPointError: a loss or the gradient is infinite or NaN; `last.pt` is the last good checkpoint.
    """
    checkpoint = settings.output / "last.pt"
    if checkpoint.exists():
        raise InputError(f"{checkpoint} exists: give another --output, or remove that run first")
    if settings.output.exists() and not settings.output.is_dir():
        raise InputError(f"{settings.output} is a file: give a folder as --output")
    settings = settings.resolved()
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    data = training_data(settings)
    model = _supervised_segmenter(settings, data).to(device).train()
    _check_batch_norms(model.student, settings)
    _check_queries(model.student, settings, data)
    optimizer = build_optimizer(model.student, settings)
    schedule = build_schedule(optimizer, settings)
    info = SegmenterInfo(
        settings.model,
        settings.backbone,
        settings.image_size,
        data.index.class_names,
        data.index.category_ids,
        shortest_side=max(settings.shortest_side, default=None),
    )
    _write_settings(settings)
    every = math.ceil(settings.steps / _CHECKPOINTS_PER_RUN)
    names = dict(zip(data.index.image_ids.tolist(), data.index.file_names, strict=True))
    saved = 0
    with TrainingLog(settings.output, settings.steps) as log:
        for step, (images, targets) in enumerate(_batches(data, settings), start=1):
            losses = model(*to_device(images, targets, device))
            total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(model.student.parameters(), settings.gradient_clip or math.inf)
            numbers = _numbers({**losses, "gradient_norm": norm, **_pseudo_masks(model)})
            _check_finite(numbers, step, saved, [names[target["image_id"]] for target in targets])
            optimizer.step()
            log.write(step, numbers, float(schedule.get_last_lr()[0]))
            schedule.step()
            if step % every == 0 or step == settings.steps:
                save_checkpoint(checkpoint, model.segmenter, info)
                saved = step
    return checkpoint


def _supervised_segmenter(settings: TrainSettings, data: InstanceDataset) -> Supervision:
    segmenter = build_with_weights(
        settings.model,
        len(data.index.class_names),
        backbone=settings.backbone,
        weights=settings.weights,
        image_size=settings.image_size,
        mask_samples=settings.mask_samples,
    )
    _check_validation_split(settings, data)
    # The order that convolutions are fastest in, on processors as on GPUs.
    return supervise(segmenter.to(memory_format=torch.channels_last), settings)


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


def _check_validation_split(settings: TrainSettings, data: InstanceDataset) -> None:
    """Finds before the training what would stop the evaluation after it."""
    try:
        find_split(settings.data, "val")
    except InputError as error:
        logger.warning("there is nothing to evaluate this run on: %s", error)
        return
    read_split(settings.data, "val", category_ids=data.index.category_ids)


def _check_batch_norms(student: nn.Module, settings: TrainSettings) -> None:
    """One image of one cell at the greatest stride leaves a batch norm nothing to take a variance of."""
    pixels = min_longest_side(settings.image_size, settings.shortest_side)
    divisor: Any = student.size_divisor
    trained = any(isinstance(module, nn.BatchNorm2d) and module.training for module in student.modules())
    if settings.batch_size == 1 and pixels <= divisor and trained:
        raise InputError(
            f"batch_size is 1, images may be as small as {pixels} pixels, and {settings.model}'s batch norms "
            f"need more than one image of {divisor}: give --batch-size 2 or larger images"
        )


def _check_queries(student: nn.Module, settings: TrainSettings, data: InstanceDataset) -> None:
    """Finds before the training what set prediction would refuse when it meets the image."""
    queries: Any = getattr(student, "num_queries", math.inf)
    boxes, image = data.index.max_boxes()
    if boxes > queries:
        raise InputError(
            f"{image} has {boxes} boxes, but {settings.model} finds {queries} objects at most, one a query: "
            "take such images out of the training split, or choose another --model"
        )


def supervise(segmenter: nn.Module, settings: TrainSettings) -> Supervision:
    """Puts the segmenter under the supervision that the settings name, scaled to the run's length."""
    settings = settings.resolved()
    if settings.supervision == "mask":
        return MaskSupervised(segmenter)
    warmup: Any = settings.warmup_steps
    if settings.supervision == "box":
        return BoxSupervised(segmenter, warmup_steps=warmup)
    momentum: Any = settings.momentum
    teacher_size: Any = settings.teacher_size
    return BoxTeacher(
        segmenter,
        momentum=momentum,
        iou_threshold=settings.iou_threshold,
        warmup_steps=warmup,
        pseudo_warmup_steps=settings.pseudo_warmup_steps,
        augmentation=_AUGMENTATIONS[settings.augmentation](),
        teacher_size=teacher_size or None,
        quality_at=settings.quality_at,
        teacher_dtype=_TEACHER_DTYPES[settings.teacher_dtype],
        teacher_interval=settings.teacher_interval,
    )


def _batches(
    data: InstanceDataset, settings: TrainSettings
) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    generator = torch.Generator().manual_seed(settings.seed)
    sampler = RandomSampler(data, num_samples=settings.steps * settings.batch_size, generator=generator)
    loader = DataLoader(
        data,
        batch_size=settings.batch_size,
        sampler=sampler,
        num_workers=settings.workers,
        collate_fn=collate,
        pin_memory=settings.device.startswith("cuda"),
        generator=generator,
    )
    return iter(loader)


def _numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """All of a step's scalars in one transfer: the loop's one wait for the device."""
    values = torch.stack([scalar.detach().float() for scalar in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def _check_finite(numbers: dict[str, float], step: int, saved: int, images: list[str]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            kept = f"last.pt, of step {saved}, is kept" if saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{name} is {value} at step {step}, images {', '.join(images)}; {kept}: "
                "try a lower --lr, or look at these images' boxes"
            )


def _pseudo_masks(model: Supervision) -> dict[str, Tensor]:
    if not isinstance(model, BoxTeacher) or model.last_pseudo_masks is None:
        return {}
    confidence = model.last_pseudo_masks.confidence  # (T,)
    number = (confidence > 0).sum()
    return {"pseudo_masks": number, "confidence": confidence.sum() / number.clamp(min=1)}


def _write_settings(settings: TrainSettings) -> None:
    settings.output.mkdir(parents=True, exist_ok=True)
    content = {
        **asdict(settings),
        "boxteacher": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(settings.output / "settings.json", lambda path: path.write_text(text))
