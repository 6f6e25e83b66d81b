"""Whole training steps: the teacher's share, and the time over that of its FLOPs."""

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
from tests.benchmarks.measure import Row, alternate

_CLASSES, _BOXES, _MATRIX = 80, 6, 2048
_SMALL = {
    "CondInst": build_condinst,
    "SOLOv2": build_solov2,
    "Mask R-CNN": build_mask_rcnn,
    "Mask2Former": build_mask2former,
}


def batch(size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two square images with six boxes each, with sides of 15 % to 50 % of the image's."""
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
    return as_trained(with_detections(CondInst(build_backbone("resnet50", "none"), num_classes=_CLASSES)))


def with_detections(segmenter: nn.Module) -> nn.Module:
    """Makes an untrained segmenter detect many objects in any image."""
    if isinstance(segmenter, CondInst):
        nn.init.constant_(segmenter.box_head.class_logits.bias, 0.0)
        nn.init.constant_(segmenter.box_head.distances.bias, 0.4)  # small boxes, which NMS keeps
    if isinstance(segmenter, MaskRCNNProvider):
        segmenter.model.roi_heads.score_thresh = 0.0
    return segmenter


def move_candidates_to_boxes(teacher: nn.Module, size: int) -> None:
    """Moves the first candidates of each image to its boxes, so that masks are decoded and assigned."""
    forward: Any = teacher.forward_teacher
    _, targets = batch(size)

    def forward_teacher(images: list[Tensor]) -> Candidates:
        candidates: Candidates = forward(images)
        boxes = candidates.boxes.clone()
        for i, target in enumerate(targets):
            mine = (candidates.image_index == i).nonzero()[:_BOXES, 0]
            boxes[mine] = target["boxes"][: len(mine)].to(boxes.dtype)
        return replace(candidates, boxes=boxes)

    teacher.forward_teacher = forward_teacher


def as_trained(segmenter: nn.Module) -> nn.Module:
    """In the memory format of `boxteacher train`."""
    return segmenter.to(memory_format=torch.channels_last)


def training_step(model: TrainingWrapper, size: int) -> Callable[[], dict[str, Tensor]]:
    """Forward pass, backward pass and optimizer step."""
    images, targets = batch(size)
    trained = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)
    model.train()

    def run() -> dict[str, Tensor]:
        losses: Any = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: the profiler misses frees of what was allocated before
        return losses

    return run


def step_row(
    name: str, student: nn.Module, size: int, repetitions: int, limits: dict[str, float], **options: Any
) -> Row:
    """A step of BoxTeacher over a step of the same student with BoxSupervised; options are EMATeacher's."""
    teacher = EMATeacher(student, **options)
    move_candidates_to_boxes(teacher.model, size)
    model = BoxTeacher(student, teacher=teacher)
    with_teacher, alone = training_step(model, size), training_step(BoxSupervised(student), size)
    box_losses, losses = alone(), with_teacher()
    assert set(losses) - set(box_losses) == {"loss_pixel", "loss_affinity"}
    assert model.last_pseudo_masks is not None
    assert (model.last_pseudo_masks.confidence > 0).any()
    held = bytes_of(model), bytes_of(student)
    name = f"{name}, 2 images of {size} × {size}"
    return alternate(name, with_teacher, alone, repetitions, held, **limits)


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def step_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    size = 64 if quick else 320
    limits = {} if quick else {"max_time": 1.3, "max_memory": 1.25}
    yield step_row("step with teacher, CondInst R-50", condinst(), size, repetitions, limits)
    if has_bfloat16_products():
        limits = {} if quick else {"max_time": 1.2}
        name = "step with bfloat16 teacher, CondInst R-50"
        yield step_row(name, condinst(), size, repetitions, limits, dtype=torch.bfloat16)
    for name, build in _SMALL.items():
        if name == "Mask2Former" and importlib.util.find_spec("scipy") is None:
            continue
        torch.manual_seed(0)
        student = as_trained(with_detections(build(_CLASSES, weights="none", image_size=size)))
        yield step_row(f"step with teacher, small {name} R-50", student, size, repetitions, {})


def share_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    """The parts of a step that the teacher adds, over the student's step with BoxSupervised."""
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
        name = f"{name}, of the student's own step, CondInst R-50"
        yield alternate(name, torch.no_grad()(part), alone, repetitions, None)


def has_bfloat16_products() -> bool:
    """Whether the processor has bfloat16 products."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def flops_row(repetitions: int, quick: bool) -> Row:
    """A whole step over the time that its FLOPs take in products of large matrices."""
    size = 96 if quick else 800
    step = training_step(BoxTeacher(condinst()), size)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    matrix = torch.rand(_MATRIX, _MATRIX)
    products = counter.get_total_flops() / (2 * _MATRIX**3)

    def multiply() -> None:
        # A tenth of the products is measured and scaled up, to save time.
        for _ in range(max(1, round(products / 10))):
            matrix @ matrix

    scale = products / max(1, round(products / 10))
    name = f"step with teacher, CondInst R-50, 2 images of {size} × {size}, over its FLOPs in a product"
    row = alternate(name, step, multiply, repetitions, None, max_time=None if quick else 1.6)
    row.baseline = [scale * seconds for seconds in row.baseline]
    return row
