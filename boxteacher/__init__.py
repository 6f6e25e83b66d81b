"""Instance segmentation from boxes alone: an EMA teacher for any segmenter."""

from boxteacher.errors import InputError, ProtocolError
from boxteacher.protocol import (
    Candidates,
    Detections,
    MaskPredictions,
    PseudoMaskProvider,
    StudentOutput,
    Target,
)
from boxteacher.supervision import BoxSupervised, MaskSupervised
from boxteacher.teacher import BoxTeacher, PseudoMasks

__version__ = "0.1.0"

__all__ = [
    "BoxSupervised",
    "BoxTeacher",
    "Candidates",
    "Detections",
    "InputError",
    "MaskPredictions",
    "MaskSupervised",
    "ProtocolError",
    "PseudoMaskProvider",
    "PseudoMasks",
    "StudentOutput",
    "Target",
]
