"""One training run, from a folder of data to a checkpoint."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from boxteacher import __version__
from boxteacher.data import CocoInstances, collate, find_split, training_transform
from boxteacher.engine.checkpoint import SegmenterInfo, save_checkpoint
from boxteacher.engine.devices import pick_device, to_device
from boxteacher.engine.files import write_atomically
from boxteacher.engine.progress import TrainingLog
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.errors import InputError
from boxteacher.supervision import BoxSupervised, MaskSupervised, Supervision
from boxteacher.teacher import BoxTeacher
from boxteacher.validation import check_choice, check_range

logger = logging.getLogger(__name__)

SupervisionName = Literal["teacher", "box", "mask"]
_COCO_IGNORED_BOTTOM_ROWS = 10
_CHECKPOINTS_PER_RUN = 10
_GRADIENT_CLIP = 10.0


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made with; `RUN/settings.json` keeps it.

    Raises:
        InputError: a number is out of range.

    Attributes:
        model: name that `build_segmenter` knows.
        backbone: see `boxteacher_adapters.parts.backbones.build_backbone`.
        data: folder of the data set.
        output: folder of the run.
        supervision: "teacher" (`BoxTeacher`), "box" (`BoxSupervised`) or "mask" (`MaskSupervised`).
        steps: optimizer steps.
        batch_size: images per step.
        image_size: longest side of the images in pixels; training draws it from 0.8 of that upwards.
        lr: highest learning rate of AdamW.
        weights: of the backbone: a file, "imagenet" or "none".
        seed: of everything random.
        device: "auto", "cpu", "cuda", "cuda:1", …
        workers: processes that load images.
        warmup_steps: of the colour-pairwise loss; by default 10 000, but at most a fifth of the run.
        pseudo_warmup_steps: of the losses from pseudo masks; by default 10 000, but at most the whole run.
        momentum: that the teacher's average approaches; by default 0.999, but no longer a memory than a
            tenth of the run.
    """

    model: str
    backbone: str
    data: Path
    output: Path
    supervision: SupervisionName = "teacher"
    steps: int = 5000
    batch_size: int = 4
    image_size: int = 512
    lr: float = 3e-4
    weights: Path | Literal["imagenet", "none"] = "imagenet"
    seed: int = 0
    device: str = "auto"
    workers: int = 2
    warmup_steps: int | None = None
    pseudo_warmup_steps: int | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        check_choice("supervision", self.supervision, ("teacher", "box", "mask"))
        check_range("lr", self.lr, above=0)
        check_range("momentum", _given(self.momentum, 0.0), least=0, most=1)
        for name in ("steps", "batch_size", "image_size"):
            check_range(name, getattr(self, name), least=1)
        for name in ("workers", "warmup_steps", "pseudo_warmup_steps"):
            check_range(name, _given(getattr(self, name), 0), least=0)

    def resolved(self) -> "TrainSettings":
        """The same with every default that depends on the run's length, or on the machine, filled in."""
        return replace(
            self,
            device=str(pick_device(self.device)),
            warmup_steps=_given(self.warmup_steps, min(10_000, self.steps // 5)),
            pseudo_warmup_steps=_given(self.pseudo_warmup_steps, min(10_000, self.steps)),
            momentum=_given(self.momentum, max(0.0, min(0.999, 1 - 10 / self.steps))),
        )


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
    segmenter = build_segmenter(
        settings.model,
        len(data.class_names),
        backbone=settings.backbone,
        weights=settings.weights,
        image_size=settings.image_size,
    )
    _check_validation_split(settings, data)
    model = supervise(segmenter, settings).to(device).train()
    optimizer, schedule = _optimizer(model.student, settings)
    info = SegmenterInfo(
        settings.model, settings.backbone, settings.image_size, data.class_names, data.category_ids
    )
    _write_settings(settings)
    every = math.ceil(settings.steps / _CHECKPOINTS_PER_RUN)
    names = dict(zip(data.image_ids, data.file_names, strict=True))
    saved = 0
    with TrainingLog(settings.output, settings.steps) as log:
        for step, (images, targets) in enumerate(_batches(data, settings), start=1):
            losses = model(*to_device(images, targets, device))
            total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(model.student.parameters(), _GRADIENT_CLIP)
            numbers = _numbers({**losses, "gradient_norm": norm, **_pseudo_masks(model)})
            _check_finite(numbers, step, saved, [names[target["image_id"]] for target in targets])
            optimizer.step()
            log.write(step, numbers, float(schedule.get_last_lr()[0]))
            schedule.step()
            if step % every == 0 or step == settings.steps:
                save_checkpoint(checkpoint, model.segmenter, info)
                saved = step
    return checkpoint


def training_data(settings: TrainSettings) -> CocoInstances:
    """The training split; masks are read for mask supervision alone.

    Raises:
        InputError: see `CocoInstances`.
    """
    split = find_split(settings.data, "train")
    return CocoInstances(
        split.images,
        split.annotations,
        read_masks=settings.supervision == "mask",
        transform=training_transform(settings.image_size),
        ignored_bottom_rows=_COCO_IGNORED_BOTTOM_ROWS if split.is_coco else 0,
    )


def _check_validation_split(settings: TrainSettings, data: CocoInstances) -> None:
    """Finds before the training what would stop the evaluation after it."""
    try:
        split = find_split(settings.data, "val")
    except InputError as error:
        logger.warning("there is nothing to evaluate this run on: %s", error)
        return
    CocoInstances(split.images, split.annotations, category_ids=data.category_ids)


def supervise(segmenter: nn.Module, settings: TrainSettings) -> Supervision:
    """Puts the segmenter under the supervision that the settings name, scaled to the run's length."""
    settings = settings.resolved()
    if settings.supervision == "mask":
        return MaskSupervised(segmenter)
    warmup: Any = settings.warmup_steps
    if settings.supervision == "box":
        return BoxSupervised(segmenter, warmup_steps=warmup)
    momentum: Any = settings.momentum
    return BoxTeacher(
        segmenter,
        momentum=momentum,
        warmup_steps=warmup,
        pseudo_warmup_steps=settings.pseudo_warmup_steps,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _optimizer(
    student: nn.Module, settings: TrainSettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without decay of norms and biases; linear warm-up, then a cosine down to nothing."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=trained[0].device.type in ("cpu", "cuda"))
    warmup = min(500, max(1, settings.steps // 20))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(
    data: CocoInstances, settings: TrainSettings
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
