"""Images and targets as users give them: cast where the meaning is plain, else refused in one line.

Everything behind the wrappers (segmenters, teachers, losses) receives plain tensors of one type each: images
in the type of the network's weights, boxes in float32, labels in int64.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

from boxteacher.errors import InputError
from boxteacher.protocol import Target
from boxteacher.validation import check_whole
from boxteacher.value_checks import (
    ValueChecks,
    check_box_units,
    check_boxes,
    check_image_ranges,
    check_unit_ranges,
)

_CONVERTIBLE = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)


def cast_images(images: Sequence[Any], network: nn.Module, checks: ValueChecks) -> list[Tensor]:
    """Images as tensors (3, H_i, W_i), RGB in [0, 1], in the type of the network's weights.

    Args:
        images: tensors (3, H, W), arrays (H, W, 3) or PIL images; floating point in [0, 1], or bytes.
        network: network that they are for; arrays and PIL images are moved to its device.
        checks: checks of their values.

    Raises:
        InputError: `images` is not a list of such images; the message names the one that is not.
    """
    weights = (parameter for parameter in network.parameters() if parameter.is_floating_point())
    return cast_images_like(next(weights, torch.zeros(())), images, checks)


def cast_images_like(like: Tensor, images: Sequence[Any], checks: ValueChecks) -> list[Tensor]:
    """Images as `cast_images` returns them, in the type of `like`; arrays and PIL images on its device."""
    if isinstance(images, Tensor):
        raise InputError(f"images is one tensor {tuple(images.shape)}: give a list of (3, H, W)")
    if not isinstance(images, list | tuple):
        raise InputError(f"images is a {type(images).__name__}: give a list of tensors (3, H, W)")
    if not images:
        raise InputError("images is an empty list: give at least one image (3, H, W)")
    found = [_image(f"image {i}", image, like) for i, image in enumerate(images)]
    check_image_ranges(found, checks)
    return found


def _image(name: str, image: Any, like: Tensor) -> Tensor:
    if hasattr(image, "mode") and hasattr(image, "convert"):  # PIL's
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{name} is a PIL image of mode {image.mode!r}, whose range is unknown: scale it to [0, 1] "
                "and give a tensor (3, H, W)"
            )
        tensor = F.to_image(image.convert("RGB")).as_subclass(Tensor).to(like.device)
    elif not isinstance(image, Tensor) and hasattr(image, "__array__"):
        tensor = _tensor(name, image, like.device)
        if tensor.ndim == 3 and tensor.shape[-1] == 3:
            if tensor.shape[0] == 3:
                raise InputError(
                    f"{name} is an array {tuple(tensor.shape)}, whose channels may come first or last: give "
                    "a tensor (3, H, W)"
                )
            tensor = tensor.permute(2, 0, 1).contiguous()
    elif isinstance(image, Tensor):
        tensor = _tensor(name, image, image.device)
    else:
        raise InputError(
            f"{name} is a {type(image).__name__}: give a tensor (3, H, W), an array (H, W, 3) or a PIL image"
        )
    _check_shape(name, tensor, (3, None, None), "an RGB image in [0, 1]")
    if not tensor.numel():
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: give at least one pixel")
    if tensor.dtype == torch.uint8:
        return tensor.to(like.dtype) / 255
    if not tensor.is_floating_point():
        raise InputError(f"{name} is {tensor.dtype}: give floating-point RGB in [0, 1], or bytes (uint8)")
    return tensor.to(like.dtype)


def cast_batch(
    images: Sequence[Any], targets: Sequence[Any] | None, network: nn.Module, checks: ValueChecks
) -> tuple[list[Tensor], list[Target]]:
    """Images as `cast_images` returns them, and targets that fit them, as plain tensors.

    Boxes and confidences become float32, labels int64, `has_mask` and masks of whole numbers bool, other
    masks float32. `BoundingBoxes` are converted to `x0, y0, x1, y1`. What was given is not changed.

    Args:
        images: as for `cast_images`.
        targets: dicts as described in `Target`; lists and arrays count as tensors.
        network: network that they are for.
        checks: checks of their values.

    Raises:
        InputError: naming the target and the box, what is wrong with it and the remedy.
    """
    if targets is None:
        raise InputError("training needs targets: call model(images, targets), or model.eval() to detect")
    if not isinstance(targets, list | tuple):
        raise InputError(f"targets is a {type(targets).__name__}: give a list, one dict per image")
    tensors = cast_images(images, network, checks)
    if len(tensors) != len(targets):
        raise InputError(f"{len(tensors)} images came with {len(targets)} targets: give one target per image")
    names = [_name(i, target) for i, target in enumerate(targets)]
    found = [_target(*each) for each in zip(names, targets, tensors, strict=True)]
    boxes, sizes = [target["boxes"] for target in found], [image.shape[-2:] for image in tensors]
    check_boxes(names, boxes, sizes, checks)
    # Only targets of a data set have annotation ids, and its reader has looked at all boxes of its file.
    if not all("annotation_ids" in target for target in found):
        check_box_units(names, boxes, sizes, checks)
    regions = [target.get("ignore_boxes", target["boxes"][:0]) for target in found]
    if any(map(len, regions)):
        check_boxes(names, regions, sizes, checks, kind="ignore box", may_lie_outside=True)
    for key in ("masks", "mask_confidence"):
        given = {name: target[key] for name, target in zip(names, found, strict=True) if key in target}
        soft = {name: each for name, each in given.items() if each.is_floating_point() and each.numel()}
        check_unit_ranges(key, soft, checks)
    return tensors, found


def _name(i: int, target: Any) -> str:
    """A target's position in the batch, and its file or id if it has one."""
    if not isinstance(target, Mapping):
        raise InputError(f"target {i} is a {type(target).__name__}: give a dict with 'boxes' and 'labels'")
    for key in ("boxes", "labels"):
        if target.get(key) is None:
            raise InputError(f"target {i} has no {key!r}: give 'boxes' (N, 4) and 'labels' (N,)")
    if isinstance(target.get("file_name"), str):
        return f"target {i} ({target['file_name']})"
    image_id = target.get("image_id")
    return f"target {i} (image_id {image_id})" if isinstance(image_id, int) else f"target {i}"


def _target(name: str, given: Mapping[str, Any], image: Tensor) -> Target:
    device, size = image.device, (image.shape[-2], image.shape[-1])
    target: dict[str, Any] = {**given, "boxes": _boxes(f"{name}: boxes", given["boxes"], size, device)}
    if "ignore_boxes" in given:
        target["ignore_boxes"] = _boxes(f"{name}: ignore_boxes", given["ignore_boxes"], size, device)
    if "ignored_bottom_rows" in given:
        rows = given["ignored_bottom_rows"]
        check_whole(f"{name}: ignored_bottom_rows", rows, minimum=0, maximum=size[0] - 1)
    count = len(target["boxes"])
    for key, kind, meaning in (
        ("labels", torch.int64, "one label per box"),
        ("has_mask", torch.bool, "one flag per box"),
        ("mask_confidence", torch.float32, "one value in [0, 1] per box"),
        ("annotation_ids", torch.int64, "one id per box"),
    ):
        if key in given:
            values = _tensor(f"{name}: {key}", given[key], device)
            _check_shape(f"{name}: {key}", values, (count,), meaning)
            target[key] = _cast(f"{name}: {key}", values, kind)
    if "masks" in given:
        masks = _tensor(f"{name}: masks", given["masks"], device)
        masks = masks.reshape(0, *size) if masks.shape == (0,) else masks
        _check_shape(f"{name}: masks", masks, (count, *size), "one mask per box, of the image's size")
        target["masks"] = masks.float() if masks.is_floating_point() else masks.bool()
    for key in ("has_mask", "mask_confidence"):
        if key in given and "masks" not in given:
            raise InputError(f"{name}: {key} is about 'masks', which it lacks: give 'masks' too")
    for key, value in target.items():
        if isinstance(value, Tensor) and value.device != device:
            raise InputError(f"{name}: {key} is on {value.device}, its image on {device}: move both to one")
    return cast(Target, target)


def _boxes(name: str, given: Any, size: tuple[int, int], device: torch.device) -> Tensor:
    """Boxes (N, 4) float32, `x0, y0, x1, y1`."""
    if isinstance(given, BoundingBoxes):
        if given.format not in _CONVERTIBLE:
            raise InputError(f"{name} are of format {given.format.name}: give boxes without rotation, XYXY")
        if tuple(given.canvas_size) != size:
            raise InputError(
                f"{name} lie on a canvas of {tuple(given.canvas_size)}, their image has {size} pixels "
                "(height, width): transform both together"
            )
        given = F.convert_bounding_box_format(given, new_format=BoundingBoxFormat.XYXY)
    boxes = _tensor(name, given, device)
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    _check_shape(name, boxes, (None, 4), "x0, y0, x1, y1 in pixels")
    if boxes.dtype in (torch.float16, torch.bfloat16):
        raise InputError(f"{name} are {boxes.dtype}, which rounds pixels: give float32")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise InputError(f"{name} are {boxes.dtype}: give float32")
    return boxes.float()


def _tensor(name: str, value: Any, device: torch.device) -> Tensor:
    """A plain tensor of a tensor, which stays on its device, an array, or a list of numbers or of such."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor) if isinstance(value, TVTensor) else value
    if value is None:
        raise InputError(f"{name} is None: give a tensor, an array or a list of numbers, or leave it out")
    try:
        if isinstance(value, list | tuple) and not all(isinstance(each, int | float) for each in value):
            return torch.stack([_tensor(name, each, device) for each in value])
        if hasattr(value, "__array__"):
            value = value.__array__().copy()  # which torch may write to, and whose strides are positive
        return torch.as_tensor(value, device=device)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{name} cannot be read as a tensor ({reason}): give a tensor, an array or a list of numbers"
        ) from error


def _cast(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor of that type: whole numbers become any type, floating-point numbers stay such."""
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    fits = tensor.dtype == kind or whole or (kind.is_floating_point and tensor.is_floating_point())
    if not fits and tensor.numel():
        raise InputError(f"{name} are {tensor.dtype}: give {kind}")
    return tensor.to(kind)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    fits = tensor.ndim == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        shape = f"({sizes},)" if len(expected) == 1 else f"({sizes})"
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: give {meaning}, {shape}")
