"""Checks that a change of code does not change training: 20 steps of every network and supervision.

    python -m tests.benchmarks.same_losses record FILE     # before the change
    python -m tests.benchmarks.same_losses compare FILE    # after it; exits 1 if a number differs

Batches, initial weights (stored in FILE) and random numbers are the same, on one thread. All losses, the norm
of the gradient and the number of pseudo masks of each step are compared, relative to the largest value of
each.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher, MaskSupervised
from boxteacher.engine.segmenters import build_segmenter

_STEPS = 20
_TOLERANCE = 1e-6
_NETWORKS = ("condinst", "solov2", "mask2former", "mask_rcnn")
_CLASSES = 3
_SIZES = ((128, 112), (96, 128))  # height, width
_IOU_THRESHOLD = 0.1  # an untrained network's boxes are far off


def _teacher(segmenter: nn.Module, **options: Any) -> nn.Module:
    teacher = EMATeacher(segmenter, iou_threshold=_IOU_THRESHOLD, **options)
    return BoxTeacher(segmenter, teacher=teacher, warmup_steps=10)


_SUPERVISIONS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "box": (lambda segmenter: BoxSupervised(segmenter, warmup_steps=10), "none"),
    "mask": (MaskSupervised, "all"),
    "teacher": (_teacher, "none"),
    "teacher, some masks": (_teacher, "some"),
    "teacher, released view": (
        lambda segmenter: _teacher(segmenter, image_size=(120, 160), quality_at="image"),
        "none",
    ),
}


def _batch(step: int, masks: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with three colored ellipses each on a gray background."""
    generator = torch.Generator().manual_seed(step)
    images, targets = [], []
    for height, width in _SIZES:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        image = 0.4 + 0.1 * torch.rand(3, height, width, generator=generator)  # (3, H, W)
        inside, boxes = [], []
        for _ in range(3):
            u, v, a, b = torch.rand(4, generator=generator)
            half_width, half_height = 10 + 20 * a, 10 + 20 * b
            center_x, center_y = (
                half_width + u * (width - 2 * half_width),
                half_height + v * (height - 2 * half_height),
            )
            mask = ((x - center_x) / half_width) ** 2 + ((y - center_y) / half_height) ** 2 < 1  # (H, W)
            color = torch.rand(3, 1, 1, generator=generator)
            image = torch.where(mask, color + 0.1 * torch.rand(3, height, width, generator=generator), image)
            inside.append(mask)
            boxes.append(
                [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height]
            )
        target = {"boxes": torch.tensor(boxes), "labels": torch.randint(_CLASSES, (3,), generator=generator)}
        if masks != "none":
            target["masks"] = torch.stack(inside)
        if masks == "some":
            target["has_mask"] = torch.tensor([True, False, False])
        images.append(image.clamp(0, 1))
        targets.append(target)
    return images, targets


def _segmenter(name: str) -> nn.Module:
    torch.manual_seed(0)
    segmenter = build_segmenter(
        name, _CLASSES, backbone="efficientnet_lite0", weights="imagenet", image_size=128
    )
    if name == "condinst":  # its untrained head detects nothing
        with torch.no_grad():
            segmenter.box_head.class_logits.bias.fill_(0.0)
            segmenter.box_head.distances.bias.fill_(2.0)
    return segmenter


def _run(segmenter: nn.Module, wrap: Callable[[nn.Module], nn.Module], masks: str) -> list[dict[str, float]]:
    torch.manual_seed(1)
    model = wrap(segmenter).train()
    parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    rows = []
    for step in range(_STEPS):
        losses = model(*_batch(step, masks))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        row = {name: loss.item() for name, loss in losses.items()}
        row["gradient_norm"] = norm.item()
        if isinstance(model, BoxTeacher):
            row["pseudo_masks"] = float((model.last_pseudo_masks.confidence > 0).sum())
        rows.append(row)
    return rows


def _all_runs(weights: dict[str, dict[str, Tensor]]) -> dict[str, list[dict[str, float]]]:
    """All runs, from the given initial weights of each network; missing ones are added."""
    runs = {}
    for network in _NETWORKS:
        segmenter = _segmenter(network)
        segmenter.load_state_dict(weights.setdefault(network, segmenter.state_dict()))
        for supervision, (wrap, masks) in _SUPERVISIONS.items():
            name = f"{network}, {supervision}"
            runs[name] = _run(copy.deepcopy(segmenter), wrap, masks)
            last = ", ".join(f"{key} {value:.4g}" for key, value in runs[name][-1].items())
            print(f"{name}: {last}", flush=True)
    return runs


def _differences(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each number over the steps, relative to its largest value."""
    if before[0].keys() != after[0].keys():
        return dict.fromkeys(before[0].keys() ^ after[0].keys(), float("inf"))
    return {
        name: max(abs(a[name] - b[name]) for a, b in zip(before, after, strict=True))
        / max(1e-12, *(abs(row[name]) for row in before))
        for name in before[0]
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.action == "record":
        weights: dict[str, dict[str, Tensor]] = {}
        runs = _all_runs(weights)
        torch.save({"runs": runs, "weights": weights}, arguments.file)
        return 0
    recorded = torch.load(arguments.file, weights_only=True)
    runs = _all_runs(recorded["weights"])
    differs = False
    for name, before in recorded["runs"].items():
        differences = _differences(before, runs[name])
        worst = max(differences, key=differences.__getitem__)
        differs |= differences[worst] > _TOLERANCE
        print(f"{name}: largest difference {differences[worst]:.1e} ({worst})")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
