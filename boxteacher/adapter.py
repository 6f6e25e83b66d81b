"""All that an adapter needs from the library, in one import; docs/write_an_adapter.md is the guide."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from boxteacher.distributed import global_count, num_processes
from boxteacher.errors import InputError, ProtocolError
from boxteacher.grid import (
    MaskGrid,
    grid_coordinates,
    mask_grid,
    pad_images,
    upsample_aligned,
)
from boxteacher.precision import autocast_to, full_precision
from boxteacher.protocol import (
    Candidates,
    Detections,
    MaskPredictions,
    PseudoMaskProvider,
    PseudoMasks,
    PseudoMaskSource,
    StudentOutput,
    Target,
)
from boxteacher.scoring import mask_quality, ranking_score
from boxteacher.state_dicts import SegmenterWeights, compare_states
from boxteacher.targets import GridTargets, box_masks, flat_targets, grid_targets
from boxteacher.torch_files import read_torch_file
from boxteacher.validation import check_labels

__all__ = [
    "Candidates",
    "Detections",
    "GridTargets",
    "InputError",
    "MaskGrid",
    "MaskPredictions",
    "ProtocolError",
    "PseudoMaskProvider",
    "PseudoMaskSource",
    "PseudoMasks",
    "Segmenter",
    "SegmenterWeights",
    "StudentOutput",
    "Target",
    "autocast_to",
    "box_masks",
    "check_labels",
    "compare_states",
    "flat_targets",
    "full_precision",
    "global_count",
    "grid_coordinates",
    "grid_targets",
    "mask_grid",
    "mask_quality",
    "num_processes",
    "pad_images",
    "ranking_score",
    "read_torch_file",
    "upsample_aligned",
]


class Segmenter(nn.Module, ABC):
    """An optional base of segmenters that follow `PseudoMaskProvider`.

    A subclass sets `mask_stride`, `size_divisor` and `num_classes`, and defines the three methods below.

    Attributes:
        mask_stride: pixels per cell of the mask grid.
        size_divisor: the sides of the padded batch are multiples of this; a multiple of `mask_stride`.
        num_classes: C; labels are 0 … C−1.

    A network that detects a limited number of objects per image has this number as `max_detections`, which
    limits its candidates too: `boxteacher train` and `evaluate` set it to what the data needs. One with a
    query per object has `num_queries`.
    """

    mask_stride: int
    size_divisor: int
    num_classes: int

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), in evaluation mode.

        Raises:
            InputError: the segmenter is in training mode.
        """
        if self.training:
            raise InputError(
                f"{type(self).__name__} is trained through BoxTeacher, BoxSupervised or MaskSupervised: wrap "
                "it, or call eval() to detect"
            )
        return self.detect(images)

    @abstractmethod
    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections of images (3, H_i, W_i), with mask probabilities (K, 1, H_i, W_i)."""

    @abstractmethod
    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        """See `PseudoMaskProvider.forward_teacher`."""

    @abstractmethod
    def forward_student(self, images: list[Tensor], targets: list[Target]) -> StudentOutput:
        """See `PseudoMaskProvider.forward_student`."""
