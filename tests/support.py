"""Shared by many tests: reference arrays, batches, and a segmenter with scripted candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import Candidates, MaskPredictions, StudentOutput
from boxteacher.grid import pad_images

DATA = Path(__file__).parent / "data"


def reference(name: str) -> Callable[[str], Tensor]:
    """The arrays of `tests/data/NAME.npz`, as a function from an array's name to a tensor."""
    arrays = np.load(DATA / f"{name}.npz")
    return lambda key: torch.from_numpy(np.array(arrays[key]))


def assert_relative(actual: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Compares entry by entry; tiny entries may differ by float32's rounding of the largest."""
    expected = expected.to(actual.dtype)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    assert_close(actual, expected, rtol=rtol, atol=1e-6 * largest)


def seeded_images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, height, width, generator=generator) for height, width in sizes]


def target(*boxes: Sequence[float], **more: Any) -> dict[str, Any]:
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, **more}


def filled(box: Sequence[int], height: int, width: int) -> Tensor:
    """A mask (height, width) bool of all pixels in a box of whole numbers."""
    x0, y0, x1, y1 = box
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


@dataclass
class Script:
    """Candidates of a `ScriptedSegmenter`; without `logits`, every mask is its predicted map."""

    boxes: Tensor
    scores: Tensor
    image_index: Tensor
    logits: Tensor | None = None


def script(
    *rows: tuple[int, Sequence[float], float], logits: Tensor | None = None, level: float | None = None
) -> Script:
    """Candidates from rows of image, box and score; with `level`, all mask logits have that value."""
    boxes = torch.tensor([row[1] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[2] for row in rows], dtype=torch.float32)
    image_index = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    if level is not None:
        logits = torch.full((len(rows), 1, 1), level)
    return Script(boxes, scores, image_index, logits)


class ScriptedSegmenter(nn.Module):
    """A small network that follows `PseudoMaskProvider`; each grid cell depends on its own pixels alone.

    It records its calls in `teacher_calls` (training mode, gradients enabled), `decoded`, `decoded_for`
    (boxes, labels) and `student_images`.
    """

    mask_stride = 4
    size_divisor = 16

    def __init__(self, plan: Script | None = None, *, samples: int = 1, layers: int = 1) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.logit = nn.Conv2d(8, 1, 1)
        self.plan = script() if plan is None else plan
        self.samples = samples
        self.layers = layers
        self.teacher_calls: list[tuple[bool, bool]] = []
        self.decoded: list[Tensor] = []
        self.decoded_for: list[tuple[Tensor, Tensor]] = []
        self.student_images: list[list[Tensor]] = []

    def maps(self, images: Sequence[Tensor]) -> Tensor:
        """Mask logits (B, h, w)."""
        batch = pad_images(images, self.size_divisor)
        return self.logit(self.norm(self.cells(batch)).relu())[:, 0] * 5

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        full = nn.functional.interpolate(self.maps(images)[:, None], scale_factor=4.0).sigmoid()
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]),
                "labels": torch.zeros(1, dtype=torch.int64),
                "scores": torch.ones(1),
                "masks": mask[None, :, : image.shape[1], : image.shape[2]],
            }
            for mask, image in zip(full, images, strict=True)
        ]

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        self.teacher_calls.append((self.training, torch.is_grad_enabled()))
        plan, maps = self.plan, self.maps(images)

        def decode_masks(index: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
            self.decoded.append(index)
            self.decoded_for.append((boxes, labels))
            if plan.logits is None:
                return maps[plan.image_index[index]]
            return plan.logits[index].expand(-1, *maps.shape[1:])

        labels = torch.zeros_like(plan.image_index)
        return Candidates(plan.boxes, plan.scores, labels, plan.image_index, decode_masks)

    def forward_student(self, images: list[Tensor], targets: list[dict[str, Any]]) -> StudentOutput:
        self.student_images.append(images)
        maps = self.maps(images)
        counts = torch.tensor([len(each["boxes"]) for each in targets])
        image_index = torch.repeat_interleave(torch.arange(len(images)), counts)
        index = torch.arange(len(image_index)).repeat(self.samples)
        masks = [MaskPredictions(maps[image_index[index]] + k, index) for k in range(self.layers)]
        return StudentOutput({"loss_class": maps.square().mean()}, masks)
