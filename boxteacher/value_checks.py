"""Values that cannot be meant, found without making a step wait for its device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from boxteacher.errors import InputError

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
                raise InputError(f"{name}: {what} reaches from {low:g} to {high:g}: give values in [0, 1]")

    checks.add([torch.stack(each.aminmax()) for each in values.values()], check)


def check_boxes(
    names: Sequence[str], boxes: Sequence[Tensor], sizes: Sequence[torch.Size], checks: ValueChecks
) -> None:
    """Has InputError raised for a box that cannot be meant.

    Args:
        names: words for each target.
        boxes: (N_i, 4) of each target, `x0, y0, x1, y1`.
        sizes: height and width of each target's image in pixels.
        checks: checks that this becomes one of.
    """
    counts = [len(each) for each in boxes]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (T,)

    def check(values: Tensor) -> None:  # (T, 4)
        def description(t: int) -> str:
            i, box = int(owner[t]), ", ".join(f"{value:g}" for value in values[t].tolist())
            (height, width), k = sizes[i], t - sum(counts[:i])
            return f"{names[i]}: box {k}, [{box}] in an image {width} wide and {height} high,"

        for (what, remedy), wrong in _box_faults(values, sizes, owner).items():
            if wrong.any():
                raise InputError(f"{description(int(wrong.int().argmax()))} {what}: {remedy}")

    checks.add(boxes, check)


def _box_faults(boxes: Tensor, sizes: Sequence[torch.Size], owner: Tensor) -> dict[tuple[str, str], Tensor]:
    """Faults, each in words with its remedy, and the boxes (T,) bool that have it.

    Args:
        boxes: (T, 4).
        sizes: height and width of each image.
        owner: (T,) int64, each box's image.
    """
    ends = torch.tensor([size[::-1] for size in sizes])[owner]  # (T, 2) width, height
    in_unit_square = (boxes <= 1).all() & (ends > 1).all()
    return {
        ("has a NaN or infinite coordinate", "correct or remove it"): ~boxes.isfinite().all(1),
        (
            "has no width or height",
            "give x0, y0, x1, y1 with x0 < x1 and y0 < y1; torchvision.ops.box_convert(boxes, 'xywh', "
            "'xyxy') converts x, y, width, height, and v2.SanitizeBoundingBoxes removes boxes that a crop "
            "left empty",
        ): (boxes[:, 2:] <= boxes[:, :2]).any(1),
        (
            "lies outside it",
            "give pixels of the image as it is given, resized and cropped with it, or remove the box",
        ): (boxes[:, :2] >= ends).any(1) | (boxes[:, 2:] <= 0).any(1),
        (
            "like all others of the batch does not reach beyond 1",
            "give pixels, not parts of the image's width and height",
        ): in_unit_square.expand(len(boxes)),
    }
