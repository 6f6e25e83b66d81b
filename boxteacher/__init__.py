"""Instance segmentation from boxes alone: an EMA teacher for any segmenter."""

from boxteacher.errors import InputError, ProtocolError
from boxteacher.multi_view import MultiViewTeacher
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
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.refinement import refine_detections, refine_masks
from boxteacher.supervision import BoxSupervised, MaskSupervised
from boxteacher.teacher import BoxTeacher

__version__ = "0.1.0"

__all__ = [
    "BoxSupervised",
    "BoxTeacher",
    "Candidates",
    "Detections",
    "EMATeacher",
    "InputError",
    "MaskPredictions",
    "MaskSupervised",
    "MultiViewTeacher",
    "ProtocolError",
    "PseudoMaskProvider",
    "PseudoMaskSource",
    "PseudoMasks",
    "StudentOutput",
    "Target",
    "refine_detections",
    "refine_masks",
]
