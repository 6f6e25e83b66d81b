"""Sources of pseudo masks by name, which packages register in the entry-point group `boxteacher.teachers`."""

from importlib.metadata import entry_points

import torch
from torch import nn

from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError
from boxteacher.multi_view import MultiViewTeacher
from boxteacher.protocol import PseudoMaskSource
from boxteacher.pseudo_masks import EMATeacher

GROUP = "boxteacher.teachers"


def build_source(name: str, weights: str, *, dtype: torch.dtype | None = None) -> PseudoMaskSource:
    """Builds the source of pseudo masks that a package registered under `name`.

    The registered function has this signature, because one function may be registered under several names.

    Args:
        name: name of the source.
        weights: folder or name of its weights; empty if none are given.
        dtype: type that the source computes in; None for its own choice.

    Raises:
        InputError: there is no such source, or the source cannot be built.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        names = ", ".join(sorted({"ema", *entry_points(group=GROUP).names}))
        raise InputError(f"no teacher {name!r}: take one of {names}")
    source: PseudoMaskSource = next(iter(found)).load()(name, weights, dtype=dtype)
    return source


def build_teacher(segmenter: nn.Module, settings: TrainSettings) -> PseudoMaskSource:
    """The source of pseudo masks of the settings, which may be the segmenter's moving average.

    Raises:
        InputError: the source cannot be built, or weights are given for the moving average.
    """
    dtype = torch.bfloat16 if settings.teacher_dtype == "bfloat16" else None
    if settings.teacher != "ema":
        return build_source(settings.teacher, settings.teacher_weights, dtype=dtype)
    if settings.teacher_weights:
        raise InputError(
            f"teacher_weights is {settings.teacher_weights!r}, but the teacher is the student's moving "
            "average: give --teacher too"
        )
    size = (settings.teacher_size[0], settings.teacher_size[1]) if settings.teacher_size else None
    if settings.rounds:
        evaluation_size = max(settings.shortest_side, default=settings.image_size), settings.image_size
        return MultiViewTeacher(
            segmenter,
            momentum=settings.momentum,
            image_size=size or evaluation_size,
            refine=settings.refinement == "color",
            dtype=dtype,
        )
    return EMATeacher(
        segmenter,
        momentum=settings.momentum,
        iou_threshold=settings.iou_threshold,
        score_threshold=settings.score_threshold,
        quality_at=settings.quality_at,
        image_size=size,
        mode=settings.teacher_mode,
        dtype=dtype,
    )
