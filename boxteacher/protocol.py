"""The two seams: what a segmenter offers, what a source of pseudo masks offers, and the records that cross.

Both speak of one geometry, that of `boxteacher.grid`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor
from typing_extensions import NotRequired

from boxteacher.grid import MaskGrid


class Target(TypedDict):
    """What is known of one training image. Boxes are `x0, y0, x1, y1` in pixels; labels are 0 … C−1."""

    boxes: Tensor  # (N, 4) float
    labels: Tensor  # (N,) int64
    masks: NotRequired[Tensor]  # (N, H, W) bool, or in [0, 1]; they may exceed their boxes
    has_mask: NotRequired[Tensor]  # (N,) bool, which of `masks` there are; all of them if absent
    mask_confidence: NotRequired[Tensor]  # (N,) 1: annotated, also if absent; in (0, 1): pseudo mask; 0: none
    ignored_bottom_rows: NotRequired[int]  # rows at the image's bottom whose colors the losses ignore
    ignore_boxes: NotRequired[Tensor]  # (K, 4) float, regions such as crowds where no mask is learned
    image_id: NotRequired[int]
    annotation_ids: NotRequired[Tensor]  # (N,) int64


Detections = dict[str, Tensor]
"""torchvision's: boxes (K, 4), labels (K,), scores (K,), masks (K, 1, H, W) with probabilities."""


MaskDecoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Decodes mask logits (M, h, w) on the mask grid: of candidates (M,) int64, for boxes (M, 4) and labels (M,).

Box and label are those of a target that the candidate may be assigned to; a candidate with two such targets
comes twice. A head whose masks are aligned with a box decodes into that box, from the channel of that class,
so that the mask is not cut off where the candidate's own box ends; a network whose masks need no box ignores
both. Labels are as the targets have them, unchecked.
"""


BoxDecoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Decodes mask logits (T, h, w) on the mask grid for known boxes (T, 4), labels (T,) and image index (T,).

Every box gets a mask, whatever the network detects.
"""


@dataclass(frozen=True)
class Candidates:
    """What a teacher proposes for a batch, all images' candidates in one list.

    Attributes:
        boxes: (K, 4) `x0, y0, x1, y1` in pixels of the candidate's image.
        scores: (K,) in [0, 1].
        labels: (K,) int64, 0 … C−1.
        image_index: (K,) int64, position of the candidate's image in the batch.
        decode_masks: decoder of some of the candidates' masks. A training step calls it at most once,
            `own_masks` calls it any number of times, so it must not change any state.
        decode_boxes: decoder of the masks of known boxes, from wherever the network would predict them
            (CondInst: the best positive location); optional. Without it `MultiViewTeacher` decodes the
            candidate that overlaps a box best.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_index: Tensor
    decode_masks: MaskDecoder
    decode_boxes: BoxDecoder | None = None

    def own_masks(self, indices: Tensor) -> Tensor:
        """Mask logits (M, h, w) of candidates (M,) int64, each in its own box and for its own label."""
        return self.decode_masks(indices, self.boxes[indices], self.labels[indices])


@dataclass(frozen=True)
class MaskPredictions:
    """Mask logits of a student's positive samples.

    Attributes:
        logits: (M, h, w) on the mask grid, with gradient.
        target_index: (M,) int64, the target of each sample, as an index into all targets of the batch laid
            end to end (image 0's first). Several samples may share a target.
        weight: factor of each sample's mask losses, above 0: (M,), or one number for all, such as the weight
            of a decoder layer or a stage.
    """

    logits: Tensor
    target_index: Tensor
    weight: Tensor | float = 1.0


@dataclass(frozen=True)
class StudentOutput:
    """What a student returns in training.

    Attributes:
        losses: scalar losses that need no mask (classification, boxes, …).
        masks: predictions of the positive samples' masks: one entry per decoder layer of a network with
            auxiliary outputs, else a single entry. Mask losses are averaged over the entries.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    masks: Sequence[MaskPredictions] = ()


@runtime_checkable
class PseudoMaskProvider(Protocol):
    """What a segmenter offers: an `nn.Module` with two methods more than usual.

    Images are torchvision's: a list of (3, H, W) float tensors, RGB in [0, 1], whose sizes may differ.
    In evaluation mode the module's ordinary call, `model(images)`, returns one `Detections` per image.
    `boxteacher.adapter.Segmenter` is an optional base class.
    """

    mask_stride: int
    """Pixels per cell of the mask grid."""
    size_divisor: int
    """Divisor of the padded batch's sides; a multiple of `mask_stride`."""

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """Candidates for pseudo masks. Called without gradients, usually in evaluation mode."""
        ...

    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """Losses that need no mask, and the mask logits of the positive samples. Called in training mode."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class PseudoMasks:
    """A mask for each of a batch's T targets, laid end to end, on the mask grid.

    Attributes:
        masks: (T, h, w) bool, or in [0, 1]; 0 where there is none.
        confidence: (T,) in [0, 1]; 0 where there is none.
    """

    masks: Tensor
    confidence: Tensor


@runtime_checkable
class PseudoMaskSource(Protocol):
    """What a teacher offers: masks for known boxes.

    `boxteacher.EMATeacher`, the student's own moving average, is one; any callable with this signature,
    such as a promptable segmenter that is prompted with the boxes, is another.
    """

    def __call__(self, images: list[Tensor], targets: list[Target], grid: MaskGrid) -> PseudoMasks:
        """Pseudo masks of the targets. Called without gradients, and only if there are targets.

        Args:
            images: (3, H_i, W_i) each, RGB in [0, 1], not augmented.
            targets: one per image, with `image_id` and `annotation_ids` where the data set has them.
            grid: the mask grid of the student; `grid.sample` takes masks at an image's pixels onto it.

        Returns:
            Masks on the grid. `BoxTeacher` cuts them to their boxes.
        """
        ...
