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

    Construction resolves the device "auto" and None, which stands for a default that depends on the run's
    length.

    Raises:
        InputError: a value is of another type or out of range; the message names option, value and range.
    """

    model: str = option(
        help="segmenter: condinst, solov2, mask2former, mask_rcnn, mask_rcnn_v2, or another package's"
    )
    data: Path = option(help="folder with annotations/ (COCO format) and the images")
    output: Path = option(help="folder of the run", default_text="runs/RECIPE with --recipe")
    backbone: str = option("resnet50", help="name of the backbone")
    weights: Path | Literal["imagenet", "coco", "none"] = option(
        "imagenet",
        help="initial weights: a file of the backbone or the whole model, ImageNet weights of the backbone, "
        "those of a detector trained on COCO, or none",
        metavar="FILE|imagenet|coco|none",
    )
    supervision: Literal["teacher", "box", "mask"] = option(
        "teacher",
        help="supervision: boxes, colors and pseudo masks; boxes and colors; or annotated masks",
    )
    steps: int = option(5000, help="optimizer steps", minimum=1)
    seed: int = option(0, help="seed of all random numbers", minimum=0)
    device: str = option("auto", help="device: cpu, cuda, cuda:1, …; auto is CUDA if available, else the CPU")
    workers: int = option(2, help="number of processes that load images", minimum=0)

    batch_size: int = option(4, help="images per step", minimum=1, group="images")
    image_size: int = option(
        512, help="longest side in pixels; in training sampled from 80 % to 100 % of it", minimum=1
    )
    shortest_side: tuple[int, ...] = option(
        (),
        help="shortest sides in pixels that training samples from instead; evaluation uses the largest, and "
        "the longest side is at most --image-size",
        metavar="PIXELS",
        default_text="off",
        minimum=1,
    )
    mask_samples: int = option(
        0, help="maximum number of masks per image in training; 0: the segmenter's default", minimum=0
    )
    max_detections: int = option(
        0,
        help="maximum number of detections per image; 0: 100, or as many as an image has boxes if more",
        minimum=0,
    )

    optimizer: Literal["adamw", "sgd"] = option(
        "adamw", help="optimizer; sgd has momentum 0.9", group="optimization"
    )
    lr: float = option(3e-4, help="peak learning rate", above=0)
    backbone_lr_factor: float = option(1.0, help="learning rate of the backbone, relative to --lr", above=0)
    lr_warmup_steps: int = option(
        lambda run: min(500, max(1, run.steps // 20)),
        help="steps of linear learning rate warm-up",
        default_text="5 % of the steps, at most 500",
        minimum=0,
    )
    lr_steps: tuple[int, ...] = option(
        (),
        help="steps, in ascending order, after each of which the learning rate is divided by 10",
        metavar="STEP",
        default_text="none: cosine decay to 0",
        minimum=1,
    )
    weight_decay: float = option(0.05, help="weight decay", minimum=0)
    decayed: Literal["weights", "all"] = option(
        "weights",
        help="parameters that decay: weights of linear and convolutional layers, or all",
    )
    gradient_clip: float = option(10.0, help="maximum norm of the gradient; 0: no clipping", minimum=0)

    warmup_steps: int = option(
        lambda run: min(10_000, run.steps // 5),
        help="steps until the color-pairwise loss has its full weight",
        default_text="20 % of the steps, at most 10000",
        minimum=0,
        group="supervision",
    )
    ellipse_steps: int = option(
        lambda run: min(10_000, run.steps),
        help="steps during which masks also learn to fill the ellipse in their box, which keeps them from "
        "becoming outlines; 0: none, as in the paper",
        default_text="all steps, at most 10000",
        minimum=0,
    )
    rounds: int = option(
        2,
        help="number of times, evenly spread over the run, that the teacher predicts pseudo masks of all "
        "training images, which are kept until the next time; 0: in every step, as in the paper",
        minimum=0,
    )
    pseudo_warmup_steps: int = option(
        lambda run: 0 if run.rounds else min(10_000, run.steps),
        help="steps until the two losses from pseudo masks have their full weight",
        default_text="0 with rounds, else all steps, at most 10000",
        minimum=0,
    )
    augmentation: Literal["none", "color", "color+blur"] = option(
        lambda run: "none" if run.rounds else "color+blur",
        help="strong augmentation of the student's images: none, color jitter, or color jitter and blur",
        default_text="none with rounds, else color+blur",
    )
    teacher: str = option(
        "ema",
        help="source of pseudo masks: ema, the student's moving average; sam, sam2, sam-hq, or another "
        "package's",
    )
    teacher_weights: str = option(
        "",
        help="weights of a teacher other than ema: folder, or name on the Hugging Face hub",
        metavar="DIR|NAME",
        default_text="none",
    )
    momentum: float = option(
        lambda run: max(0.0, min(0.999, 1 - 10 / run.steps)),
        help="limit of the momentum of the teacher's moving average",
        default_text="1 − 10 / steps, at most 0.999",
        minimum=0,
        maximum=1,
    )
    iou_threshold: float = option(
        0.5,
        help="minimum IoU of a candidate's box with the box it is assigned to (without rounds)",
        above=0,
        maximum=1,
    )
    score_threshold: float = option(
        0.0, help="score that the teacher's candidates must exceed (without rounds)", minimum=0, maximum=1
    )
    quality_at: Literal["grid", "image"] = option(
        "grid",
        help="place where the quality of pseudo masks is measured (without rounds): mask grid or image's "
        "pixels",
    )
    teacher_size: tuple[int, ...] = option(
        (),
        help="shortest side and maximum longest side of the teacher's images in pixels",
        metavar="PIXELS",
        default_text="as the student's",
        minimum=1,
    )
    teacher_mode: Literal["eval", "train"] = option(
        "eval",
        help="mode of the teacher's network (without rounds): eval, or train, which labels with the batch's "
        "statistics and averages parameters only",
    )
    teacher_dtype: Literal["float32", "bfloat16"] = option(
        "float32", help="dtype of the teacher's forward pass"
    )
    teacher_interval: int = option(
        1, help="interval N: the teacher runs every N optimizer steps (without rounds)", minimum=1
    )
    refinement: Literal["color", "none"] = option(
        "color", help="refinement of masks in rounds, evaluation and prediction: by colors, or none"
    )

    def __post_init__(self) -> None:
        resolve_options(self)
        object.__setattr__(self, "device", str(pick_device(self.device)))
        if list(self.lr_steps) != sorted(set(self.lr_steps)):
            raise InputError(f"lr_steps is {self.lr_steps}: give each step once, in rising order")
        if self.teacher_size and (len(self.teacher_size) != 2 or self.teacher_size[0] > self.teacher_size[1]):
            raise InputError(f"teacher_size is {self.teacher_size}: give the shortest side, then the longest")
