"""Says in one line what does not fit, before anything is computed."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor, nn

from boxteacher.errors import InputError, ProtocolError
from boxteacher.protocol import PseudoMasks, Target

_METHODS = ("forward_teacher", "forward_student")
_ATTRIBUTES = ("mask_stride", "size_divisor")
_GUIDE = "docs/write_an_adapter.md"


def check_provider_methods(model: nn.Module) -> None:
    """Raises ProtocolError if `model` lacks a part of `PseudoMaskProvider`, naming it."""
    missing = [f"the method {name}()" for name in _METHODS if not callable(getattr(model, name, None))]
    missing += [f"the attribute {name}" for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing:
        raise ProtocolError(
            f"{type(model).__name__} cannot be taught: it lacks {', '.join(missing)} of "
            f"PseudoMaskProvider, and no adapter is registered for its type in the entry-point group "
            f"boxteacher.adapters; {_GUIDE} shows how to add either"
        )
    stride, divisor = model.mask_stride, model.size_divisor
    if divisor % stride:  # type: ignore[operator]
        raise ProtocolError(
            f"{type(model).__name__}: size_divisor {divisor} is not a multiple of mask_stride {stride}; "
            f"see {_GUIDE}"
        )


def check_not_sharded(model: nn.Module) -> None:
    """Raises ProtocolError if FSDP holds the parameters of `model` in parts, of which no average is taken."""
    names = ("FSDPModule", "FullyShardedDataParallel")
    for module in model.modules():
        if any(base.__name__ in names for base in type(module).__mro__):
            raise ProtocolError(
                f"{type(module).__name__} is sharded by FSDP, which hides its weights from the teacher's "
                "average: train with DistributedDataParallel(BoxTeacher(model))"
            )


def check_mask_logits(model: nn.Module, method: str, logits: Tensor, expected: tuple[int, ...]) -> None:
    """Raises ProtocolError unless mask logits lie on the mask grid, one map per sample."""
    if logits.shape != expected:
        raise ProtocolError(
            f"{type(model).__name__}.{method} gave mask logits {tuple(logits.shape)} where {expected} is "
            f"expected: one map per sample, on the mask grid; see {_GUIDE}"
        )


def check_source(source: object, student: nn.Module) -> None:
    """Raises ProtocolError unless `source` may be a `PseudoMaskSource` of that student."""
    name = type(source).__name__
    if hasattr(source, "forward_teacher"):
        raise ProtocolError(
            f"teacher is a segmenter, {name}: give EMATeacher({name}(...)), a source of masks"
        )
    if not callable(source):
        raise ProtocolError(f"teacher is {source!r}: give a callable (images, targets, grid) → PseudoMasks")
    if isinstance(source, nn.Module):
        trained = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in trained for parameter in source.parameters()):
            raise ProtocolError(
                f"teacher, {name}, holds parameters of the student, which it would freeze: give it a copy"
            )


def check_pseudo_masks(source: object, pseudo: PseudoMasks, expected: tuple[int, ...]) -> None:
    """Raises ProtocolError unless a source returned one mask per target on the grid, and one confidence.

    Values are checked on the CPU only, so that no other device is synchronized with.
    """
    name = type(source).__name__
    if not isinstance(pseudo, PseudoMasks):
        raise ProtocolError(f"{name} returned a {type(pseudo).__name__}: return boxteacher.PseudoMasks")
    shapes = tuple(pseudo.masks.shape), tuple(pseudo.confidence.shape)
    if shapes != (expected, expected[:1]):
        raise ProtocolError(
            f"{name} gave pseudo masks {shapes[0]} and confidence {shapes[1]} where {expected} and "
            f"{expected[:1]} are expected: one mask per target on the mask grid, and one confidence"
        )
    for what, values in (("masks", pseudo.masks), ("confidence", pseudo.confidence)):
        if values.device.type == "cpu" and not ((values >= 0) & (values <= 1)).all():
            raise ProtocolError(f"{name} gave {what} outside [0, 1]: return probabilities, without NaN")


def check_range(
    name: str,
    value: float,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
) -> None:
    """Raises InputError unless `value` is finite, above `above`, and from `minimum` to `maximum`."""
    in_range = isinstance(value, Real) and math.isfinite(value) and minimum <= value <= maximum
    if not (in_range and value > above):
        lower = f"above {above:g}" if above > -math.inf else f"at least {minimum:g}"
        upper = f" and at most {maximum:g}" if maximum < math.inf else ""
        raise InputError(f"{name} is {value!r}: give a number {lower}{upper}")


def check_whole(name: str, value: object, *, minimum: int, maximum: float = math.inf) -> None:
    """Raises InputError unless `value` is a whole number from `minimum` to `maximum`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not minimum <= int(value) <= maximum:
        upper = f" and at most {maximum}" if maximum < math.inf else ""
        raise InputError(f"{name} is {value!r}: give a whole number, at least {minimum}{upper}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}: take one of {', '.join(map(repr, choices))}")


def check_batch_norms(model: nn.Module, images: Sequence[Tensor], size_divisor: int) -> None:
    """Raises InputError if batch norms train on one image whose coarsest feature map is a single cell."""
    if len(images) > 1 or max(images[0].shape[-2:]) > size_divisor:
        return
    if any(isinstance(module, nn.BatchNorm2d) and module.training for module in model.modules()):
        raise InputError(
            f"a batch of one image of {tuple(images[0].shape[-2:])} pixels leaves batch norms of "
            f"{type(model).__name__} one value to take a variance of: give two images, or one of more than "
            f"{size_divisor} pixels"
        )


def check_labels(targets: Sequence[Target], num_classes: int) -> None:
    """Raises InputError for a label outside 0 … C−1; only on the CPU, where looking costs nothing."""
    for i, target in enumerate(targets):
        labels = target["labels"]
        if labels.device.type != "cpu" or len(labels) == 0:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise InputError(
                f"target {i}: labels reach from {low} to {high}: with {num_classes} classes they are "
                f"0 to {num_classes - 1}, without one for background"
            )
