"""SAM, SAM 2 and SAM-HQ, prompted with the boxes, as a source of pseudo masks."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from boxteacher.adapter import (
    InputError,
    MaskGrid,
    PseudoMasks,
    Target,
    autocast_to,
    box_masks,
    full_precision,
    grid_coordinates,
)
from boxteacher_adapters.parts.pretrained import IMAGENET

_NETWORKS = {"sam": "SamModel", "sam2": "Sam2Model", "sam-hq": "SamHQModel"}
_TEACHERS = {"sam": "sam", "sam2": "sam2", "sam2_video": "sam2", "sam_hq": "sam-hq"}  # by a file's model type
_BOXES_PER_PASS = 32  # the decoder takes tens of megabytes for each


class SamTeacher:
    """A promptable segmenter of `transformers`, prompted with the boxes of the targets.

    It follows `PseudoMaskSource`. For each box the network predicts four masks: the one that is meant for an
    unambiguous prompt, and three that are meant for an ambiguous one. The best of them is cut to the box. Its
    confidence is √(fit · predicted IoU), where the fit is the IoU of the box with the bounding box of the
    mask before it is cut, and the predicted IoU is the network's own estimate (SAM, ICCV 2023, Sec. 3).

    It is no module, so that its weights are neither the student's nor in a state dict. The network follows
    the images to their device.

    Example:
        >>> teacher = SamTeacher.from_pretrained("sam2", "facebook/sam2.1-hiera-small")  # doctest: +SKIP
        >>> model = BoxTeacher(segmenter, teacher=teacher)  # doctest: +SKIP

    Args:
        network: `SamModel`, `Sam2Model` or `SamHQModel`; it is frozen, taken to float32 and put in evaluation
            mode.
        dtype: type that the image encoder computes in, by autocast, such as `torch.bfloat16`; that of the
            rest of the step if not given. Prompts and masks are always computed in float32.

    Raises:
        InputError: `network` is another one.
    """

    def __init__(self, network: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        kind = type(network).__name__
        if kind not in _NETWORKS.values():
            raise InputError(f"network is a {kind}: give a {', '.join(_NETWORKS.values())}")
        self.network = cast(Any, network.requires_grad_(False).float().eval())
        self.dtype = dtype
        self._image_size = int(self.network.config.prompt_encoder_config.image_size)
        self._keeps_aspect_ratio = kind != "Sam2Model"

    @classmethod
    def from_pretrained(cls, name: str, weights: str, *, dtype: torch.dtype | None = None) -> "SamTeacher":
        """The teacher with weights that `transformers` wrote.

        Args:
            name: "sam", "sam2" or "sam-hq".
            weights: folder that `save_pretrained` wrote, or name on the Hugging Face hub.
            dtype: see `SamTeacher`.

        Raises:
            InputError: `transformers` is missing or too old, or the weights cannot be had, are incomplete or
                another network's.
        """
        if name not in _NETWORKS:
            raise InputError(f"no teacher {name!r}: take one of {', '.join(_NETWORKS)}")
        try:
            transformers = import_module("transformers")
            network_type = getattr(transformers, _NETWORKS[name])
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"the teacher {name} needs transformers 4.56 or newer: pip install 'boxteacher[sam]'"
            ) from error
        if not weights:
            raise InputError(
                f"the teacher {name} needs weights: give a folder or a name on the Hugging Face hub with "
                "--teacher-weights"
            )
        try:
            model_type = transformers.AutoConfig.from_pretrained(weights).model_type
            if (given := _TEACHERS.get(model_type)) == name:
                network, report = network_type.from_pretrained(weights, output_loading_info=True)
        except Exception as error:  # broken files raise whatever their bytes lead to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"weights {weights} of the teacher {name} cannot be had ({reason}): give a folder that "
                "save_pretrained wrote, or a name on the Hugging Face hub"
            ) from error
        if given != name:
            remedy = f"give --teacher {given}" if given else f"give those of {', '.join(_NETWORKS)}"
            raise InputError(f"weights {weights} are those of a {model_type}, not of {name}: {remedy}")
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"weights {weights} lack {len(missing)} entries of {name}, such as {missing[0]}: copy the "
                "folder again"
            )
        return cls(network, dtype=dtype)

    @torch.no_grad()
    def __call__(self, images: list[Tensor], targets: Sequence[Target], grid: MaskGrid) -> PseudoMasks:
        """Mask probabilities of the targets, cut to their boxes, and their confidence.

        Images are encoded one by one, those without boxes not at all.

        Args:
            images: (3, H_i, W_i) each, RGB in [0, 1].
            targets: one per image.
            grid: mask grid of the result.
        """
        device = images[0].device
        self.network.to(device)
        masks, confidences = [torch.zeros(0, *grid.shape, device=device)], [torch.zeros(0, device=device)]
        for image, target in zip(images, targets, strict=True):
            height, width = image.shape[-2:]
            boxes = clip_boxes_to_image(target["boxes"].float(), (height, width))  # (N, 4)
            if len(boxes) == 0:
                continue
            rows, columns = grid_coordinates(height, width, grid.stride, device)  # (h_i,), (w_i,)
            embeddings = self._encode(image)
            for prompts in boxes.split(_BOXES_PER_PASS):
                logits, confidence = self._decode(embeddings, prompts, image)  # (n, l, l), (n,)
                inside = box_masks(prompts, rows, columns)  # (n, h_i, w_i)
                found = self._at_pixels(logits, rows, columns, image).sigmoid() * inside
                padding = (0, grid.width - len(columns), 0, grid.height - len(rows))
                masks.append(F.pad(found, padding))
                confidences.append(confidence)
        return PseudoMasks(torch.cat(masks), torch.cat(confidences))

    def _encode(self, image: Tensor) -> dict[str, Any]:
        """Embeddings of an image (3, H, W), as the network's `forward` takes them."""
        height, width = self._resized(image)
        resized = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
        colors = torch.tensor([IMAGENET.mean, IMAGENET.std]).to(image.device, non_blocking=True)  # (2, 3)
        mean, std = colors[:, :, None, None].unbind(0)  # (3, 1, 1) each
        padding = (0, self._image_size - width, 0, self._image_size - height)
        pixels = F.pad((resized - mean) / std, padding)  # (1, 3, s, s)
        with autocast_to(self.dtype, image.device):
            found = self.network.get_image_embeddings(pixels)
        if type(self.network).__name__ == "SamHQModel":
            return {"image_embeddings": found[0].float(), "intermediate_embeddings": _to_float(found[1])}
        return {"image_embeddings": found.float() if isinstance(found, Tensor) else _to_float(found)}

    def _decode(self, embeddings: dict[str, Any], boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, l, l) of each box's best mask on the network's input, and their confidence (n,).

        Args:
            embeddings: of the image.
            boxes: (n, 4) in pixels of the image, n at least 1.
            image: (3, H, W); only its size counts.
        """
        down, right = self._scale(image)
        scale = torch.tensor([right, down, right, down]).to(boxes.device, non_blocking=True)
        with full_precision(boxes.device):  # half precision would move the boxes by pixels
            outputs = [
                self.network(**embeddings, input_boxes=(boxes * scale)[None], multimask_output=ambiguous)
                for ambiguous in (False, True)
            ]
            logits = torch.cat([output.pred_masks[0] for output in outputs], 1)  # (n, 4, l, l)
            predicted_iou = torch.cat([output.iou_scores[0] for output in outputs], 1)  # (n, 4)
            own_boxes = mask_boxes(logits) * (self._image_size / logits.shape[-1]) / scale  # (n, 4, 4)
            own_boxes = clip_boxes_to_image(own_boxes, image.shape[-2:])
            fit = torch.stack(
                [box_iou(boxes, own).diagonal() for own in own_boxes.unbind(1)], 1
            ).nan_to_num()  # (n, 4); NaN where both are empty
            confidence, best = (fit * predicted_iou.clamp(0, 1)).sqrt().max(1)  # (n,) each
        return logits[torch.arange(len(boxes), device=boxes.device), best], confidence

    def _at_pixels(self, logits: Tensor, rows: Tensor, columns: Tensor, image: Tensor) -> Tensor:
        """Logits (n, l, l) on the network's input, at the pixels of an image (3, H, W): (n, h, w)."""
        down, right = self._scale(image)
        y = (rows + 0.5) * (2 * down / self._image_size) - 1  # (h,), the input's sides at −1 and 1
        x = (columns + 0.5) * (2 * right / self._image_size) - 1  # (w,)
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (h, w, 2)
        return F.grid_sample(logits[None], points[None], padding_mode="border", align_corners=False)[0]

    def _resized(self, image: Tensor) -> tuple[int, int]:
        """Height and width of an image in the network's square input."""
        if not self._keeps_aspect_ratio:
            return self._image_size, self._image_size
        scale = self._image_size / max(image.shape[-2:])
        return max(1, int(image.shape[-2] * scale + 0.5)), max(1, int(image.shape[-1] * scale + 0.5))

    def _scale(self, image: Tensor) -> tuple[float, float]:
        """Pixels of the network's input per pixel of the image, down and right."""
        height, width = self._resized(image)
        return height / image.shape[-2], width / image.shape[-1]


def mask_boxes(logits: Tensor) -> Tensor:
    """Bounding boxes of masks, to fractions of a cell: where the logits, linear between cells, are 0.

    Args:
        logits: (…, h, w).

    Returns:
        (…, 4) `x0, y0, x1, y1` in cells, from the outer sides of the first; all 0 for an empty mask.
    """
    x0, x1 = _extent(logits.amax(-2))
    y0, y1 = _extent(logits.amax(-1))
    return torch.stack([x0, y0, x1, y1], -1)


def _extent(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Where a profile (…, n) of logits first rises and last falls through 0, in cells from its beginning."""
    length = profile.shape[-1]
    inside = profile > 0
    before = F.pad(profile, (1, 0))[..., :-1]
    after = F.pad(profile, (0, 1))[..., 1:]
    cell = torch.arange(length, device=profile.device)  # (n,)
    rise = cell + 0.5 - profile / (profile - before.clamp(max=0)).clamp(min=1e-12)
    fall = cell + 0.5 + profile / (profile - after.clamp(max=0)).clamp(min=1e-12)
    # Beyond the first and the last cell there is none to interpolate to.
    rise = torch.where(cell > 0, rise, 0.0)
    fall = torch.where(cell < length - 1, fall, float(length))
    start = torch.where(inside, rise, float(length)).amin(-1)
    end = torch.where(inside, fall, 0.0).amax(-1)
    return start.minimum(end), end


def _to_float(maps: Sequence[Tensor]) -> list[Tensor]:
    return [each.float() for each in maps]
