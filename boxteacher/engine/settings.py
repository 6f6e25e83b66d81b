"""What a training run is made with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from boxteacher.engine.devices import pick_device
from boxteacher.errors import InputError
from boxteacher.validation import check_choice, check_range, check_whole
from boxteacher.view import check_image_size


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made with; `RUN/settings.json` keeps it.

    Raises:
        InputError: a number is out of range, or a name is none of those to choose from.

    Attributes:
        model: name that `build_segmenter` knows.
        data: folder of the data set.
        output: folder of the run.
        backbone: see `boxteacher_adapters.parts.backbones.build_backbone`.
        supervision: "teacher" (`BoxTeacher`), "box" (`BoxSupervised`) or "mask" (`MaskSupervised`).
        steps: optimizer steps.
        batch_size: images per step.
        image_size: longest side of the images in pixels; training draws it from 0.8 of that upwards.
        shortest_side: if not empty, training draws the shortest side in pixels from these instead, and
            evaluation takes the greatest; `image_size` is then the most that the longest side may be.
        augmentation: of the student's view under the teacher: "none", "strong" (colours) or "stronger"
            (colours and blur).
        mask_samples: positive samples per image whose masks are drawn; by default the segmenter's own number.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: highest learning rate.
        backbone_lr_factor: the backbone's learning rate is `lr` times this.
        weight_decay: of the weights of linear and convolutional layers.
        gradient_clip: greatest norm of all gradients together; 0 leaves them as they are.
        lr_warmup_steps: over which the learning rate rises linearly; by default 500, but at most a
            twentieth of the run.
        lr_steps: steps after which the learning rate falls to a tenth, in rising order; if empty, it falls
            in a cosine down to nothing.
        weights: a file, of the backbone or of the whole model; or "imagenet" or "none", of the backbone.
        seed: of everything random.
        device: "auto", "cpu", "cuda", "cuda:1", …
        workers: processes that load images.
        warmup_steps: of the colour-pairwise loss; by default 10 000, but at most a fifth of the run.
        pseudo_warmup_steps: of the losses from pseudo masks; by default 10 000, but at most the whole run.
        momentum: that the teacher's average approaches; by default 0.999, but no longer a memory than a
            tenth of the run.
        iou_threshold: least IoU of a candidate's box with the box it is assigned to.
        teacher_size: shortest and greatest longest side of the teacher's images in pixels; it sees the
            student's if empty.
        teacher_dtype: what the teacher computes in.
        teacher_interval: optimizer steps from one question to the teacher to the next.
        quality_at: where a pseudo mask's quality is measured, on the mask "grid" or at the "image"'s pixels.
    """

    model: str
    data: Path
    output: Path
    backbone: str = "resnet50"
    supervision: Literal["teacher", "box", "mask"] = "teacher"
    steps: int = 5000
    batch_size: int = 4
    image_size: int = 512
    shortest_side: tuple[int, ...] = ()
    augmentation: Literal["none", "strong", "stronger"] = "stronger"
    mask_samples: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    backbone_lr_factor: float = 1.0
    weight_decay: float = 0.05
    gradient_clip: float = 10.0
    lr_warmup_steps: int | None = None
    lr_steps: tuple[int, ...] = ()
    weights: Path | Literal["imagenet", "none"] = "imagenet"
    seed: int = 0
    device: str = "auto"
    workers: int = 2
    warmup_steps: int | None = None
    pseudo_warmup_steps: int | None = None
    momentum: float | None = None
    iou_threshold: float = 0.5
    teacher_size: tuple[int, ...] = ()
    quality_at: Literal["grid", "image"] = "grid"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_interval: int = 1

    def __post_init__(self) -> None:
        check_choice("supervision", self.supervision, ("teacher", "box", "mask"))
        check_choice("augmentation", self.augmentation, ("none", "strong", "stronger"))
        check_range("iou_threshold", self.iou_threshold, above=0, maximum=1)
        check_choice("quality_at", self.quality_at, ("grid", "image"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        check_range("momentum", _given(self.momentum, 0.0), minimum=0, maximum=1)
        for name in ("lr", "backbone_lr_factor"):
            check_range(name, getattr(self, name), above=0)
        for name in ("steps", "batch_size", "image_size", "mask_samples"):
            check_range(name, _given(getattr(self, name), 1), minimum=1)
        for name in ("weight_decay", "gradient_clip", "workers"):
            check_range(name, getattr(self, name), minimum=0)
        for name in ("warmup_steps", "pseudo_warmup_steps", "lr_warmup_steps"):
            check_range(name, _given(getattr(self, name), 0), minimum=0)
        for name in ("shortest_side", "lr_steps"):
            for value in getattr(self, name):
                check_range(name, value, minimum=1)
        if list(self.lr_steps) != sorted(set(self.lr_steps)):
            raise InputError(f"lr_steps is {self.lr_steps}: give each step once, in rising order")

        check_image_size(self.teacher_size or None)
        check_choice("teacher_dtype", self.teacher_dtype, ("float32", "bfloat16"))
        check_whole("teacher_interval", self.teacher_interval, minimum=1)

    def resolved(self) -> "TrainSettings":
        """The same with every default that depends on the run's length, or on the machine, filled in."""
        return replace(
            self,
            device=str(pick_device(self.device)),
            lr_warmup_steps=_given(self.lr_warmup_steps, min(500, max(1, self.steps // 20))),
            warmup_steps=_given(self.warmup_steps, min(10_000, self.steps // 5)),
            pseudo_warmup_steps=_given(self.pseudo_warmup_steps, min(10_000, self.steps)),
            momentum=_given(self.momentum, max(0.0, min(0.999, 1 - 10 / self.steps))),
        )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
