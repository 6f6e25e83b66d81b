"""Says in one line what does not fit, before anything is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boxteacher.errors import InputError, ProtocolError
from boxteacher.protocol import PseudoMasks, Target

_METHODS = ("forward_teacher", "forward_student")
_ATTRIBUTES = ("mask_stride", "size_divisor")
_GUIDE = "docs/write_an_adapter.md"
_RANGE_SLACK = 0.5  # interpolation may leave [0, 1], but not as far as normalization does


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
    if not (math.isfinite(value) and minimum <= value <= maximum and value > above):
        lower = f"above {above:g}" if above > -math.inf else f"at least {minimum:g}"
        upper = f" and at most {maximum:g}" if maximum < math.inf else ""
        raise InputError(f"{name} is {value}: give a number {lower}{upper}")


def check_whole(name: str, value: object, *, minimum: int) -> None:
    """Raises InputError unless `value` is a whole number, at least `minimum`."""
    if not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} is {value!r}: give a whole number, at least {minimum}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}: take one of {', '.join(map(repr, choices))}")


def check_images(images: Sequence[Tensor]) -> None:
    """Raises InputError unless `images` is a list of RGB images in [0, 1], naming the one that is not.

    Values are checked on the CPU only, so that no other device is synchronized with.
    """
    if isinstance(images, Tensor):
        raise InputError(f"images is one tensor {tuple(images.shape)}: give a list of (3, H, W)")
    if not images:
        raise InputError("images is an empty list: give at least one image (3, H, W)")
    for i, image in enumerate(images):
        _check_shape(f"image {i}", image, (3, None, None), "an RGB image in [0, 1]")
        if not image.is_floating_point():
            raise InputError(f"image {i} is {image.dtype}: give floating-point RGB in [0, 1]")
        if not image.numel():
            raise InputError(f"image {i} has shape {tuple(image.shape)}: give at least one pixel")
        if image.device.type == "cpu":
            low, high = (float(value) for value in image.aminmax())
            if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
                raise InputError(
                    f"image {i} has values from {low:g} to {high:g}: give RGB in [0, 1], neither normalized "
                    "nor scaled to 255"
                )


def check_batch(images: Sequence[Tensor], targets: Sequence[Target] | None) -> list[Target]:
    """The targets, if they fit the images.

    Shapes, types and devices are checked; values on the CPU only, so that no other device is synchronized
    with.

    Raises:
        InputError: naming the image's position in the batch, what is wrong with it and the remedy.
    """
    check_images(images)
    if targets is None:
        raise InputError("training needs targets: call model(images, targets), or model.eval() to detect")
    if len(images) != len(targets):
        raise InputError(f"{len(images)} images came with {len(targets)} targets: give one target per image")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        for key in ("boxes", "labels"):
            if key not in target:
                raise InputError(f"target {i} has no {key!r}: give 'boxes' (N, 4) and 'labels' (N,)")
        count = len(target["boxes"])
        _check_shape(f"target {i}: boxes", target["boxes"], (None, 4), "x0, y0, x1, y1 in pixels")
        _check_shape(f"target {i}: labels", target["labels"], (count,), "one label per box")
        if target["boxes"].dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"target {i}: boxes are {target['boxes'].dtype}: give float32: others round pixels"
            )
        if target["boxes"].device.type == "cpu" and not target["boxes"].isfinite().all():
            raise InputError(f"target {i}: a box has a NaN or infinite coordinate: correct or remove it")
        if target["labels"].dtype != torch.int64:
            raise InputError(f"target {i}: labels are {target['labels'].dtype}: give int64")
        for key, value in target.items():
            if isinstance(value, Tensor) and value.device != image.device:
                raise InputError(
                    f"target {i}: {key} is on {value.device}, its image on {image.device}: move both to one"
                )
        if "ignore_boxes" in target:
            regions = target["ignore_boxes"]
            _check_shape(f"target {i}: ignore_boxes", regions, (None, 4), "x0, y0, x1, y1 in pixels")
            if not regions.is_floating_point():
                raise InputError(f"target {i}: ignore_boxes are {regions.dtype}: give float32")
        if "masks" in target:
            shape = (count, *image.shape[-2:])
            masks = target["masks"]
            _check_shape(f"target {i}: masks", masks, shape, "one mask per box, of the image's size")
            if masks.is_floating_point() and masks.device.type == "cpu" and count:
                low, high = (float(value) for value in masks.aminmax())
                if not 0 <= low <= high <= 1:
                    raise InputError(f"target {i}: masks have values from {low:g} to {high:g}: give [0, 1]")
        if "has_mask" in target:
            _check_shape(f"target {i}: has_mask", target["has_mask"], (count,), "one flag per box")
            if target["has_mask"].dtype != torch.bool or "masks" not in target:
                raise InputError(
                    f"target {i}: has_mask says which of 'masks' are annotated: give both, has_mask as bool"
                )
        if "mask_confidence" in target:
            _check_mask_confidence(i, target, count)
    return list(targets)


def _check_mask_confidence(i: int, target: Target, count: int) -> None:
    confidence = target["mask_confidence"]
    _check_shape(f"target {i}: mask_confidence", confidence, (count,), "one value in [0, 1] per box")
    if not confidence.is_floating_point() or "masks" not in target:
        raise InputError(
            f"target {i}: mask_confidence weighs 'masks': give 'masks', and a floating-point mask_confidence"
        )
    if confidence.device.type == "cpu" and not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError(f"target {i}: mask_confidence is {confidence.tolist()}: give values in [0, 1]")


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


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    fits = tensor.ndim == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = "(" + ", ".join("any" if size is None else str(size) for size in expected) + ")"
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: give {meaning}, {shape}")


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
