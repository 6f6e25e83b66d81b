"""What a segmenter must offer to be taught, and the records that cross between it and the core.

One geometry holds for all of it. A batch of images is padded at the right and bottom to a common canvas
whose sides are multiples of `size_divisor`; the mask grid is that canvas at `mask_stride`, and cell
(row, column) stands for the pixel (row · stride + stride // 2, column · stride + stride // 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor
from typing_extensions import NotRequired


class Target(TypedDict):
    """What is known of one training image. Boxes are `x0, y0, x1, y1` in pixels; labels are 0 … C−1."""

    boxes: Tensor  # (N, 4) float
    labels: Tensor  # (N,) int64
    masks: NotRequired[Tensor]  # (N, H, W) bool or {0, 1}, used as they are, not cut to their boxes
    has_mask: NotRequired[Tensor]  # (N,) bool: which of `masks` were drawn; all of them if absent
    ignored_bottom_rows: NotRequired[int]  # rows at the image's bottom whose pixels teach no colours
    image_id: NotRequired[int]


Detections = dict[str, Tensor]
"""torchvision's: boxes (K, 4), labels (K,), scores (K,), masks (K, 1, H, W) with probabilities."""


@dataclass(frozen=True)
class Candidates:
    """What a teacher proposes for a batch, all images' candidates in one list.

    Attributes:
        boxes: (K, 4) `x0, y0, x1, y1` in pixels of the candidate's image.
        scores: (K,) in [0, 1].
        labels: (K,) int64, 0 … C−1.
        image_index: (K,) int64, position of the candidate's image in the batch.
        decode_masks: draws masks of the candidates that can win a ground-truth box; a training step calls it
            once at most, `own_masks` as often as it likes, so it changes nothing.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_index: Tensor
    decode_masks: "MaskDecoder"

    def own_masks(self, indices: Tensor) -> Tensor:
        """Mask logits (M, h, w) of candidates (M,) int64, each in its own box and for its own label."""
        return self.decode_masks(indices, self.boxes[indices], self.labels[indices])


MaskDecoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mask logits (M, h, w) on the mask grid of candidates (M,) int64, each for a box (M, 4) and a label (M,).

Box and label are those of a target that the candidate can win; one that can win two comes twice. A head
whose masks are aligned with a box draws in that one, and in that class's channel, so that the mask ends
where the object does and not where the candidate's own box does; a network whose masks need no box leaves
them unused. Labels are as the targets have them, and not yet looked at.
"""


@dataclass(frozen=True)
class MaskPredictions:
    """Mask logits of a student's positive samples.

    Attributes:
        logits: (M, h, w) on the mask grid, with gradient.
        target_index: (M,) int64, which target each is to reproduce: an index into all targets of the batch
            laid end to end (image 0's first). Several samples may share a target.
    """

    logits: Tensor
    target_index: Tensor


@dataclass(frozen=True)
class StudentOutput:
    """What a student answers in training.

    Attributes:
        losses: scalar losses that need no mask (classification, boxes, …).
        masks: the positive samples' masks; one entry per round for a network that supervises each of
            several decoder layers, else a single entry. Losses are averaged over the rounds.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    masks: Sequence[MaskPredictions] = ()


@runtime_checkable
class PseudoMaskProvider(Protocol):
    """A segmenter that can be taught by `BoxTeacher`: an `nn.Module` with two methods more than usual.

    Images are torchvision's: a list of (3, H, W) float tensors, RGB in [0, 1], whose sizes may differ.
    In evaluation mode the module's ordinary call, `model(images)`, returns one `Detections` per image.
    """

    mask_stride: int
    """Pixels per cell of the mask grid."""
    size_divisor: int
    """The canvas's sides are multiples of this; itself a multiple of `mask_stride`."""

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Candidates for pseudo masks. Called in evaluation mode and without gradients."""
        ...

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """Mask-free losses, and the mask logits of the positive samples. Called in training mode."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
