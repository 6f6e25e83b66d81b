"""Differences between the released networks' numbers here and the original's, for the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from boxteacher import BoxTeacher, EMATeacher
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.weights import fill
from boxteacher.grid import pad_images
from boxteacher_adapters.checkpoints import SCALES, condinst_name, recognize
from tests.released_support import Shapes, only, released_shapes, rendered_images, stand_in_checkpoint

LOSSES = {
    "loss_classification": "fcos_cls",
    "loss_box": "fcos_loc",
    "loss_centerness": "fcos_ctr",
    "loss_projection": "prj",
    "loss_pairwise": "pairwise",
    "loss_pixel": "mask",
    "loss_affinity": "mask_affinity",
}


@dataclass
class Released:
    """The original's numbers, and the two networks with the weights that they were computed from."""

    numbers: dict[str, Tensor]
    images: list[Tensor]
    student: nn.Module
    teacher: nn.Module


def load_released(name: str, folder: Path, noise: float = 0.0, image_seed: int = 0) -> Released:
    """The numbers and networks of r50, r101, r101_dcn or swin-base; `folder` holds `forward_NAME.npz`.

    With `noise`, the pixels differ randomly by that part of their value. The numbers are those of the images
    of `image_seed`.
    """
    with np.load(folder / f"forward_{name}.npz") as arrays:
        numbers = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "adjust"}
    shapes = released_shapes(name)
    return Released(
        numbers,
        noisy_images(image_seed, noise),
        released_network(only("student", shapes)),
        released_network(only("teacher", shapes)),
    )


def released_network(shapes: Shapes) -> nn.Module:
    path = Path("released.pth")
    whole = recognize(stand_in_checkpoint(shapes), path)
    segmenter = build_segmenter(
        whole.model, whole.num_classes, backbone=whole.backbone, weights="none", image_size=1333
    )
    assert fill(segmenter, whole.num_classes, whole, path) == []
    segmenter.backbone.freeze()
    return segmenter.eval()


def noisy_images(seed: int, noise: float) -> list[Tensor]:
    """The images of a seed, whose pixels differ randomly by `noise` of their value."""
    generator = torch.Generator().manual_seed(0)
    return [
        each * (1 + noise * torch.randn(each.shape, generator=generator)) for each in rendered_images(seed)
    ]


def difference(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference of entries, each relative to the sum of the entry and 1 % of the largest."""
    scale = wanted.abs() + wanted.abs().max() / 100
    return float(((actual - wanted).abs() / scale.clamp(min=1e-12)).max())


@torch.no_grad()
def feature_differences(released: Released) -> dict[str, float]:
    """Differences of the student's mask features and of the means and standard deviations of its pyramid."""
    student, numbers = released.student, released.numbers
    pyramid = _pyramid(released)
    found = {"mask_features": student.mask_branch(list(pyramid.values())[:3])}
    for level, maps in pyramid.items():
        found[f"{level}_mean"], found[f"{level}_std"] = maps.mean((2, 3)), maps.std((2, 3))
    return {name: difference(value, numbers[f"student_{name}"]) for name, value in found.items()}


@torch.no_grad()
def head_differences(released: Released) -> dict[str, float]:
    """Differences of the student's head outputs on each level."""
    student, numbers = released.student, released.numbers
    levels = list(_pyramid(released).values())
    outputs = student.box_head(levels)
    found, first = {}, 0
    for level, maps in enumerate(levels):
        height, width = maps.shape[-2:]
        for name, every in (
            ("class_logits", outputs.class_logits),
            ("box_regression", outputs.distances),
            ("centerness", outputs.centerness[..., None]),
            ("controller", outputs.controllers),
        ):
            wanted = numbers[f"student_{name}_{level}"]
            mine = every[:, first : first + height * width].transpose(1, 2).unflatten(2, (height, width))
            rows, columns = -(-height // wanted.shape[2]), -(-width // wanted.shape[3])  # not all were kept
            found[f"{name}_{level}"] = difference(mine[:, :, ::rows, ::columns], wanted)
        first += height * width
    return found


def _pyramid(released: Released) -> dict[str, Tensor]:
    student = released.student
    batch = pad_images([student.backbone.normalize(image) for image in released.images], 32)
    return student.fpn(dict(zip(("p3", "p4", "p5"), student.backbone(batch), strict=True)))


@dataclass
class DetectionDifferences:
    """Differences of 30 detections: other labels, relative scores, boxes in pixels, masks' minimum IoU."""

    labels: int
    scores: float
    boxes: float
    mask_iou: float


def detection_differences(released: Released) -> Iterator[DetectionDifferences]:
    """Differences of the 30 highest-scoring detections of each network and image."""
    for network in ("student", "teacher"):
        with torch.no_grad():
            detections = getattr(released, network)(released.images)
        for i, found in enumerate(detections):
            wanted = {
                key.removeprefix(f"{network}_{i}_"): value
                for key, value in released.numbers.items()
                if key.startswith(f"{network}_{i}_")
            }
            masks = found["masks"][:30, 0] > 0.5  # (30, H, W)
            packed = np.unpackbits(wanted["masks_packed"].numpy(), axis=-1)
            expected = torch.from_numpy(packed)[..., : masks.shape[-1]].bool()
            iou = (masks & expected).sum((1, 2)) / (masks | expected).sum((1, 2))
            yield DetectionDifferences(
                labels=int((found["labels"][:30] != wanted["labels"]).sum()),
                scores=difference(found["scores"][:30], wanted["scores"]),
                boxes=float((found["boxes"][:30] - wanted["boxes"]).abs().max()),
                mask_iou=float(iou.min()),
            )


def step_differences(released: Released) -> tuple[dict[str, float], dict[str, float]]:
    """Differences of a training step's losses and confidences, and of its gradients' norms."""
    numbers = released.numbers
    teacher = EMATeacher(released.student, quality_at="image", image_size=(128, 160))
    model = BoxTeacher(released.student, teacher=teacher, warmup_steps=1, augmentation=nn.Identity())
    teacher.model.load_state_dict(released.teacher.state_dict())
    for module in model.student.modules():
        if isinstance(module, StochasticDepth):  # Swin's; the original's numbers are without it
            module.p = 0.0
    targets = [
        {
            "boxes": numbers[f"train_{i}_gt_boxes"],
            "labels": numbers[f"train_{i}_gt_labels"],
            "ignored_bottom_rows": 10,
        }
        for i in range(2)
    ]
    losses = model.train()(released.images, targets)
    found = {
        ours: difference(losses[ours].detach(), numbers[f"train_loss_{theirs}"])
        for ours, theirs in LOSSES.items()
    }
    confidence = torch.cat([numbers[f"train_{i}_pseudo_mask_confidence"] for i in range(2)])
    found["confidence"] = difference(model.last_pseudo_masks.confidence, confidence)
    sum(losses.values()).backward()
    return found, _gradient_differences(released)


def _gradient_differences(released: Released) -> dict[str, float]:
    gradients = {name: p.grad for name, p in released.student.named_parameters() if p.requires_grad}
    scales = gradients.pop(SCALES)
    gradients.update({f"{SCALES}.{level}.scale": value for level, value in enumerate(scales)})
    wanted = {
        condinst_name(key.removeprefix("grad_norm_")): value
        for key, value in released.numbers.items()
        if key.startswith("grad_norm_")
    }
    assert gradients.keys() == wanted.keys()
    return {name: difference(gradient.norm(), wanted[name]) for name, gradient in gradients.items()}
