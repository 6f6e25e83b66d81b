"""Settings of a training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boxteacher.engine.devices import pick_device
from boxteacher.engine.options import option, resolve_options
from boxteacher.errors import InputError


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run: the options of `boxteacher train`, which `RUN/settings.json` keeps.

    Defaults that depend on the run's length and the device "auto" are resolved in construction, where None
    stands for such a default.

    Raises:
        InputError: a value is of another type or out of range; the message names option, value and range.
    """

    model: str = option(help="segmenter: condinst, solov2, mask2former, mask_rcnn, or another package's")
    data: Path = option(help="folder with annotations/ (COCO format) and the images")
    output: Path = option(help="folder of the run", default_text="runs/RECIPE with --recipe")
    backbone: str = option("resnet50", help="name of the backbone")
    weights: Path | Literal["imagenet", "none"] = option(
        "imagenet",
        help="initial weights: a file of the backbone's or the whole model's; ImageNet's; or random ones",
        metavar="FILE|imagenet|none",
    )
    supervision: Literal["teacher", "box", "mask"] = option(
        "teacher",
        help="source of masks: boxes, colors and pseudo masks; boxes and colors; or annotated masks",
    )
    steps: int = option(5000, help="optimizer steps", minimum=1)
    seed: int = option(0, help="seed of everything random", minimum=0)
    device: str = option("auto", help="device: cpu, cuda, cuda:1, …, or auto, CUDA where there is one")
    workers: int = option(2, help="processes that load images", minimum=0)

    batch_size: int = option(4, help="images per step", minimum=1, group="images")
    image_size: int = option(
        512, help="longest side in pixels; training samples it from 0.8 of that upwards", minimum=1
    )
    shortest_side: tuple[int, ...] = option(
        (),
        help="shortest sides in pixels that training samples from instead, and evaluation takes the largest "
        "of; the longest is then at most --image-size",
        metavar="PIXELS",
        default_text="off",
        minimum=1,
    )
    mask_samples: int = option(
        0, help="positive samples per image that get a mask; 0: the segmenter's own number", minimum=0
    )

    optimizer: Literal["adamw", "sgd"] = option(
        "adamw", help="optimizer; sgd has momentum 0.9", group="optimization"
    )
    lr: float = option(3e-4, help="highest learning rate", above=0)
    backbone_lr_factor: float = option(1.0, help="factor of the backbone's learning rate", above=0)
    lr_warmup_steps: int = option(
        lambda run: min(500, max(1, run.steps // 20)),
        help="steps over which the learning rate rises linearly",
        default_text="a twentieth of the run, at most 500",
        minimum=0,
    )
    lr_steps: tuple[int, ...] = option(
        (),
        help="steps in rising order, after each of which the learning rate falls to a tenth",
        metavar="STEP",
        default_text="none: it falls to 0 in a cosine",
        minimum=1,
    )
    weight_decay: float = option(
        0.05, help="weight decay of linear and convolutional layers' weights", minimum=0
    )
    gradient_clip: float = option(10.0, help="maximum norm of the gradient; 0: no clipping", minimum=0)

    warmup_steps: int = option(
        lambda run: min(10_000, run.steps // 5),
        help="steps over which the color-pairwise loss reaches its full weight",
        default_text="a fifth of the run, at most 10000",
        minimum=0,
        group="supervision",
    )
    pseudo_warmup_steps: int = option(
        lambda run: min(10_000, run.steps),
        help="steps over which the two losses from pseudo masks reach their full weight",
        default_text="the whole run, at most 10000",
        minimum=0,
    )
    augmentation: Literal["none", "color", "color+blur"] = option(
        "color+blur",
        help="augmentation of the student's images under the teacher: none, color jitter, or that and blur",
    )
    momentum: float = option(
        lambda run: max(0.0, min(0.999, 1 - 10 / run.steps)),
        help="momentum that the teacher's moving average approaches",
        default_text="0.999, but a memory of at most a tenth of the run",
        minimum=0,
        maximum=1,
    )
    iou_threshold: float = option(
        0.5, help="minimum IoU of the teacher's box with the box that its mask is for", above=0, maximum=1
    )
    quality_at: Literal["grid", "image"] = option(
        "grid", help="place where a pseudo mask's quality is measured: the mask grid or the image's pixels"
    )
    teacher_size: tuple[int, ...] = option(
        (),
        help="shortest side and maximum longest side of the teacher's images in pixels",
        metavar="PIXELS",
        default_text="as the student's",
        minimum=1,
    )
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", help="dtype of the teacher's forward pass"
    )
    teacher_interval: int = option(1, help="number N: run the teacher every N optimizer steps", minimum=1)

    def __post_init__(self) -> None:
        resolve_options(self)
        object.__setattr__(self, "device", str(pick_device(self.device)))
        if list(self.lr_steps) != sorted(set(self.lr_steps)):
            raise InputError(f"lr_steps is {self.lr_steps}: give each step once, in rising order")
        if self.teacher_size and (len(self.teacher_size) != 2 or self.teacher_size[0] > self.teacher_size[1]):
            raise InputError(f"teacher_size is {self.teacher_size}: give the shortest side, then the longest")
