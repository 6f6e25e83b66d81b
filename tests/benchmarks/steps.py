"""Whole training steps: the teacher's share of one, and how near one comes to the processor's speed."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher
from boxteacher.ema import update_ema
from boxteacher.protocol import Candidates
from boxteacher.supervision import TrainingWrapper
from boxteacher_adapters.condinst import CondInst, build_condinst
from boxteacher_adapters.mask2former import build_mask2former
from boxteacher_adapters.mask_rcnn import MaskRCNNProvider, build_mask_rcnn
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.solov2 import build_solov2
from tests.benchmarks.measure import Row, in_turns

_CLASSES, _BOXES, _MATRIX = 80, 6, 2048
_SMALL = {
    "CondInst": build_condinst,
    "SOLOv2": build_solov2,
    "Mask R-CNN": build_mask_rcnn,
    "Mask2Former": build_mask2former,
}


def batch(size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two square images with six boxes each, of a sixth to a half of their side."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(2)]
    corners = torch.rand(2, _BOXES, 2, generator=generator) * 0.5 * size
    sides = (0.15 + 0.35 * torch.rand(2, _BOXES, 2, generator=generator)) * size
    targets = [
        {
            "boxes": torch.cat([corner, corner + side], 1),
            "labels": torch.randint(_CLASSES, (_BOXES,), generator=generator),
        }
        for corner, side in zip(corners, sides, strict=True)
    ]
    return images, targets


def condinst() -> nn.Module:
    """CondInst R-50 of the paper's size."""
    torch.manual_seed(0)
    return as_trained(talkative(CondInst(build_backbone("resnet50", "none"), num_classes=_CLASSES)))


def talkative(segmenter: nn.Module) -> nn.Module:
    """The same, finding something everywhere, though it has learnt nothing yet."""
    if isinstance(segmenter, CondInst):
        nn.init.constant_(segmenter.box_head.class_logits.bias, 0.0)
        nn.init.constant_(segmenter.box_head.distances.bias, 0.4)  # small boxes outlive one another
    if isinstance(segmenter, MaskRCNNProvider):
        segmenter.model.roi_heads.score_thresh = 0.0
    return segmenter


def finds_the_boxes(teacher: nn.Module, size: int) -> None:
    """Puts the first candidates of each image at its boxes, so that masks are decoded and assigned."""
    find: Any = teacher.forward_teacher
    _, targets = batch(size)

    def forward_teacher(images: list[Tensor]) -> Candidates:
        candidates: Candidates = find(images)
        boxes = candidates.boxes.clone()
        for i, target in enumerate(targets):
            mine = (candidates.image_index == i).nonzero()[:_BOXES, 0]
            boxes[mine] = target["boxes"][: len(mine)].to(boxes.dtype)
        return replace(candidates, boxes=boxes)

    teacher.forward_teacher = forward_teacher


def as_trained(segmenter: nn.Module) -> nn.Module:
    """In the order of channels that `boxteacher train` puts it in."""
    return segmenter.to(memory_format=torch.channels_last)


def training_step(model: TrainingWrapper, size: int) -> Callable[[], dict[str, Tensor]]:
    """Forward, backward and optimizer."""
    images, targets = batch(size)
    trained = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)
    model.train()

    def run() -> dict[str, Tensor]:
        losses: Any = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: the profiler does not see what is freed that it did not see made
        return losses

    return run


def step_row(
    name: str, student: nn.Module, size: int, rounds: int, aims: dict[str, float], **of_teacher: Any
) -> Row:
    """BoxTeacher's step over the same student's own step from boxes."""
    teacher = EMATeacher(student, **of_teacher)
    finds_the_boxes(teacher.model, size)
    model = BoxTeacher(student, teacher=teacher)
    with_teacher, alone = training_step(model, size), training_step(BoxSupervised(student), size)
    own, taught = alone(), with_teacher()
    assert set(taught) - set(own) == {"loss_pixel", "loss_affinity"}
    assert model.last_pseudo_masks is not None
    assert (model.last_pseudo_masks.confidence > 0).any()
    held = bytes_of(model), bytes_of(student)
    return in_turns(f"{name}, 2 images of {size} × {size}", with_teacher, alone, rounds, held, **aims)


def bytes_of(model: nn.Module) -> int:
    """Of its weights and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def step_rows(rounds: int, quick: bool) -> Iterator[Row]:
    size = 64 if quick else 320
    aims = {} if quick else {"most_time": 1.3, "most_memory": 1.25}
    yield step_row("step with teacher, CondInst R-50", condinst(), size, rounds, aims)
    if half_precision_pays():
        aims = {} if quick else {"most_time": 1.2}
        name = "step with bfloat16 teacher, CondInst R-50"
        yield step_row(name, condinst(), size, rounds, aims, dtype=torch.bfloat16)
    for name, build in _SMALL.items():
        if name == "Mask2Former" and importlib.util.find_spec("scipy") is None:
            continue
        torch.manual_seed(0)
        student = as_trained(talkative(build(_CLASSES, weights="none", image_size=size)))
        yield step_row(f"step with teacher, small {name} R-50", student, size, rounds, {})


def share_rows(rounds: int, quick: bool) -> Iterator[Row]:
    """The parts of a step that the teacher adds, over the student's own step from boxes."""
    size = 64 if quick else 320
    model = BoxTeacher(condinst())
    images, _ = batch(size)
    alone = training_step(BoxSupervised(model.student), size)
    teacher = model.segmenter
    parts: dict[str, Callable[[], Any]] = {
        "teacher's forward pass": lambda: teacher.forward_teacher(images),
        "strong augmentation": lambda: model.augmentation(images),
        "EMA": lambda: update_ema(teacher, model.student, 0.999),
    }
    for name, part in parts.items():
        yield in_turns(
            f"{name}, of the student's own step, CondInst R-50", torch.no_grad()(part), alone, rounds, None
        )


def half_precision_pays() -> bool:
    """Whether the processor multiplies bfloat16 by itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def flops_row(rounds: int, quick: bool) -> Row:
    """A whole step over the time that its floating-point operations take in a large matrix product."""
    size = 96 if quick else 800
    step = training_step(BoxTeacher(condinst()), size)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    matrix = torch.rand(_MATRIX, _MATRIX)
    products = counter.get_total_flops() / (2 * _MATRIX**3)

    def multiply() -> None:
        # As long as a step would take whole minutes: a tenth of it is measured.
        for _ in range(max(1, round(products / 10))):
            matrix @ matrix

    scale = products / max(1, round(products / 10))
    name = f"step with teacher, CondInst R-50, 2 images of {size} × {size}, over its FLOPs in a product"
    row = in_turns(name, step, multiply, rounds, None, most_time=None if quick else 1.6)
    row.theirs = [scale * seconds for seconds in row.theirs]
    return row
