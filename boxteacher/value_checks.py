"""Values that cannot be meant, found without making a step wait for its device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

_FAR_BEYOND = 1.5  # of the image's size; crops may leave boxes that end a little beyond
_warned = False  # of boxes that are hardly pixels
_RANGE_SLACK = 0.5  # interpolation may leave [0, 1], but not as far as normalization does


class ValueChecks:
    """Checks of values, none of which makes a step wait for its device.

    Values on the CPU are checked at once. Values on another device are copied meanwhile, and checked by
    `finish` at the end of the step, when they have long arrived.

    Args:
        cpu_only: whether values on another device are not checked at all.
    """

    def __init__(self, *, cpu_only: bool = False) -> None:
        self._cpu_only = cpu_only
        self._copies: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._arrival: Any = None

    def add(self, values: Sequence[Tensor], check: Callable[[Tensor], None]) -> None:
        """Has `check` look at values (N_i, …), laid end to end on the CPU."""
        if not values or (self._cpu_only and values[0].device.type != "cpu"):
            return
        together = torch.cat([each.detach() for each in values])  # (N, …)
        if together.device.type == "cpu":
            check(together)
            return
        self._copies.append((together.to("cpu", non_blocking=True), check))
        event = getattr(getattr(torch, together.device.type, None), "Event", None)
        if event is not None:
            self._arrival = event()
            self._arrival.record()

    def finish(self) -> None:
        """Checks what has arrived from another device."""
        if self._arrival is not None:
            self._arrival.synchronize()
        for values, check in self._copies:
            check(values)


def check_image_ranges(images: Sequence[Tensor], checks: ValueChecks) -> None:
    """Has InputError raised for an image that is not in [0, 1]."""

    def check(ranges: Tensor) -> None:  # (2 · B,)
        for i, (low, high) in enumerate(ranges.view(-1, 2).tolist()):
            if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
                raise InputError(
                    f"image {i} has values from {low:g} to {high:g}: give RGB in [0, 1], neither normalized "
                    "nor scaled to 255"
                )

    checks.add([torch.stack(image.aminmax()) for image in images], check)


def check_unit_ranges(what: str, values: Mapping[str, Tensor], checks: ValueChecks) -> None:
    """Has InputError raised for a target's values outside [0, 1], or NaN.

    Args:
        what: key of the values in a target.
        values: values by the name of their target, not empty and of floating point.
        checks: checks that this becomes one of.
    """

    def check(ranges: Tensor) -> None:  # (2 · targets,)
        for name, (low, high) in zip(values, ranges.view(-1, 2).tolist(), strict=True):
            if not 0 <= low <= high <= 1:
                wrong = high if low >= 0 else low  # also if it is NaN
                raise InputError(f"{name}: a value of {what} is {wrong:g}: give values in [0, 1]")

    checks.add([torch.stack(each.aminmax()) for each in values.values()], check)


def check_boxes(
    names: Sequence[str],
    boxes: Sequence[Tensor],
    sizes: Sequence[torch.Size],
    checks: ValueChecks,
    *,
    kind: str = "box",
    may_lie_outside: bool = False,
) -> None:
    """Has InputError raised for a box that cannot be meant.

    Args:
        names: words for each target.
        boxes: (N_i, 4) of each target, `x0, y0, x1, y1`.
        sizes: height and width of each target's image in pixels.
        checks: checks that this becomes one of.
        kind: word for one of the boxes.
        may_lie_outside: whether a box may lie wholly outside its image.
    """
    describe, owner = _descriptions(names, boxes, sizes, kind)

    def check(values: Tensor) -> None:  # (T, 4)
        ends = _ends(sizes, owner)  # (T, 2)
        faults = {
            ("has a NaN or infinite coordinate", "correct or remove it"): ~values.isfinite().all(1),
            (
                "has no width or height",
                "give x0, y0, x1, y1 with x0 < x1 and y0 < y1; torchvision.ops.box_convert(boxes, 'xywh', "
                "'xyxy') converts x, y, width, height, and v2.SanitizeBoundingBoxes removes boxes that a "
                "crop left empty",
            ): (values[:, 2:] <= values[:, :2]).any(1),
            (
                "lies outside it",
                "give pixels of the image as it is given, resized and cropped with it, or remove the box",
            ): ((values[:, :2] >= ends).any(1) | (values[:, 2:] <= 0).any(1)) & (not may_lie_outside),
        }
        for (what, remedy), wrong in faults.items():  # (T,) bool
            if wrong.any():
                raise InputError(f"{describe(int(wrong.int().argmax()), values)} {what}: {remedy}")

    checks.add(boxes, check)


def check_box_units(
    names: Sequence[str], boxes: Sequence[Tensor], sizes: Sequence[torch.Size], checks: ValueChecks
) -> None:
    """Has boxes reported that are hardly pixels of their images; arguments as for `check_boxes`.

    InputError is raised if all boxes lie in the first pixel of their image, as shares of its size do, and are
    several of several images. Fewer are logged as a warning, and so are batches of which most boxes end far
    beyond their images; the first such batch only.
    """
    describe, owner = _descriptions(names, boxes, sizes, "box")

    def check(values: Tensor) -> None:  # (T, 4)
        ends = _ends(sizes, owner)  # (T, 2)
        in_first_pixel = bool((values <= 1).all() and (ends > 1).all())
        if in_first_pixel and (values != values.round()).any():
            what = f"{describe(0, values)} like all others of the batch does not reach beyond 1"
            remedy = "give pixels, not parts of the image's width and height"
            if len(owner.unique()) > 1 and len(values.unique(dim=0)) > 1:
                raise InputError(f"{what}: {remedy}")
            _warn_once(f"{what}: if it is not that small, {remedy}")
        is_beyond = (values[:, 2:] > _FAR_BEYOND * ends).any(1)  # (T,)
        if 2 * int(is_beyond.sum()) > len(values):
            _warn_once(
                f"{describe(int(is_beyond.int().argmax()), values)} ends far beyond it, as most of the batch "
                "do: give x0, y0, x1, y1 in pixels of the image as it is given, resized and cropped with it"
            )

    checks.add(boxes, check)


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(message)


def _descriptions(
    names: Sequence[str], boxes: Sequence[Tensor], sizes: Sequence[torch.Size], kind: str
) -> tuple[Callable[[int, Tensor], str], Tensor]:
    """Words for a box, given its position and all boxes (T, 4), and each box's image (T,) int64."""
    counts = [len(each) for each in boxes]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (T,)

    def describe(t: int, values: Tensor) -> str:
        i, box = int(owner[t]), ", ".join(f"{value:g}" for value in values[t].tolist())
        (height, width), k = sizes[i], t - sum(counts[:i])
        return f"{names[i]}: {kind} {k}, [{box}] in an image {width} wide and {height} high,"

    return describe, owner


def _ends(sizes: Sequence[torch.Size], owner: Tensor) -> Tensor:
    """Width and height (T, 2) of the image of each box."""
    return torch.tensor([size[::-1] for size in sizes])[owner]
