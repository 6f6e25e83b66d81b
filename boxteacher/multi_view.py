"""A teacher that knows the box: it decodes each box's mask from several views, and fits it to the colors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from boxteacher.crops import cells_in_box, cells_in_image, crop_images, crop_masks, paste_crops
from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.inputs import cast_batch
from boxteacher.precision import autocast_to
from boxteacher.protocol import BoxDecoder, Candidates, PseudoMasks, Target
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.refinement import refine_crops
from boxteacher.scoring import mask_quality
from boxteacher.targets import flat_targets
from boxteacher.validation import check_mask_logits, check_range
from boxteacher.value_checks import ValueChecks

_CHUNK = 64  # masks that are refined at once
# Refinement makes masks surer than they are right. With this power of the quality the confidence was within
# 0.06 of the IoU, on the mean of bins, for four networks on rendered shapes and one on photographs.
_REFINED_EXPONENT = 4


class MultiViewTeacher(EMATeacher):
    """An EMA teacher whose pseudo masks are means over views, decoded for the annotated boxes themselves.

    `EMATeacher`, as released, takes what the network detects and assigns it to the boxes. Here nothing is
    detected: the box is known, so the network is asked for the mask of that box (`Candidates.decode_boxes`),
    at several scales and mirrored. The mean of the views is fitted to the colors of the image (see
    `boxteacher.refinement`). It costs several forward passes, so it is made for rounds, not for every step.

    Args:
        segmenter: model that follows `PseudoMaskProvider`, or whose type has a registered adapter; it is
            copied.
        momentum: limit of the average's momentum, in [0, 1]; 1 for a fixed teacher.
        image_size: shortest side and maximum longest side in pixels to which the images are resized at scale
            1; they are left as they are if not given.
        scales: scales of the views, above 0.
        mirror: whether each view is taken mirrored too.
        refine: whether masks are fitted to the colors.
        dtype: type that the teacher computes in, by autocast.

    Raises:
        ProtocolError: `segmenter` lacks a part of `PseudoMaskProvider`; the message names it.
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        *,
        momentum: float = 0.999,
        image_size: tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0, 1.5),
        mirror: bool = True,
        refine: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(segmenter, momentum=momentum, image_size=image_size, dtype=dtype)
        for scale in scales:
            check_range("scales", scale, above=0)
        self.scales = tuple(scales)
        self.mirror = mirror
        self.refine = refine

    @torch.no_grad()
    def forward(self, images: list[Tensor], targets: list[Target], grid: MaskGrid) -> PseudoMasks:
        """Binary masks of the targets, each inside its box, and their confidence.

        Args:
            images: (3, H_i, W_i) each, RGB in [0, 1].
            targets: one per image.
            grid: mask grid of the result; its stride may differ from the segmenter's.

        Raises:
            InputError: images and targets do not fit together.
            ProtocolError: the segmenter's masks do not lie on its own grid.
        """
        images, targets = cast_batch(images, targets, self.model, ValueChecks(cpu_only=True))
        boxes, labels, box_image = flat_targets(targets)  # (T, 4), (T,), (T,)
        if len(boxes) == 0:
            return PseudoMasks(boxes.new_zeros(0, *grid.shape), boxes.new_zeros(0))
        views = []
        with autocast_to(self.dtype, boxes.device):
            for scale in self.scales:
                for mirrored in (False, True) if self.mirror else (False,):
                    views.append(self._look(images, boxes, labels, box_image, scale, mirrored))
        crops = torch.stack(views).nanmean(0).nan_to_num(0.0)  # (T, S, S)
        sizes = boxes.new_tensor([image.shape[-2:] for image in images])[box_image]  # (T, 2)
        masks, confidences = [], []
        for some in torch.arange(len(boxes), device=boxes.device).split(_CHUNK):
            in_image = cells_in_image(boxes[some], sizes[some])  # (n, S, S)
            fitted = crops[some] * (cells_in_box(boxes.device) & in_image)
            if self.refine:
                colors = crop_images(images, boxes[some], box_image[some])  # (n, 3, S, S)
                fitted = refine_crops(colors, crops[some], in_image)
            masks.append(paste_crops(fitted, boxes[some], *grid.coordinates(boxes.device)) > 0.5)
            confidences.append(crop_confidence(fitted, _REFINED_EXPONENT if self.refine else 1))
        return PseudoMasks(torch.cat(masks), torch.cat(confidences))

    def _look(
        self,
        images: Sequence[Tensor],
        boxes: Tensor,
        labels: Tensor,
        box_image: Tensor,
        scale: float,
        mirrored: bool,
    ) -> Tensor:
        """Mask probabilities on crops (T, S, S) from one view of the images; NaN without a mask."""
        sizes = [_view_size(image.shape[-2:], self.image_size, scale) for image in images]
        resized = [_resized(image, size) for image, size in zip(images, sizes, strict=True)]
        factors = [
            (size[1] / image.shape[-1], size[0] / image.shape[-2])
            for image, size in zip(images, sizes, strict=True)
        ]
        boxes = boxes * boxes.new_tensor(factors).repeat(1, 2)[box_image]  # (T, 4)
        if mirrored:
            resized = [image.flip(-1) for image in resized]
            widths = boxes.new_tensor([size[1] for size in sizes])[box_image]  # (T,)
            x0, y0, x1, y1 = boxes.unbind(1)
            boxes = torch.stack([widths - x1, y0, widths - x0, y1], 1)
        candidates = self.provider.forward_teacher(resized)
        decode = candidates.decode_boxes or _decode_overlapping(candidates)
        logits = decode(boxes, labels, box_image)  # (T, h', w')
        own_grid = mask_grid(resized, self.provider.mask_stride, self.provider.size_divisor)
        check_mask_logits(self.model, "decode_boxes", logits, (len(boxes), *own_grid.shape))
        crops = crop_masks(logits.float().sigmoid(), boxes, own_grid.stride)  # (T, S, S)
        return crops.flip(-1) if mirrored else crops


def crop_confidence(masks: Tensor, exponent: int) -> Tensor:
    """Estimated IoU of masks on crops with the true ones: quality to some power, times the fit to the box.

    Args:
        masks: (N, S, S) probabilities, 0 outside their boxes.
        exponent: power of the quality.

    Returns:
        (N,) in [0, 1]; 0 for an empty mask.
    """
    return mask_quality(masks) ** exponent * box_fit(masks > 0.5)


def box_fit(masks: Tensor) -> Tensor:
    """Share (N,) of the box that the extent of a mask (N, S, S) bool on its crop fills."""
    rows, columns = masks.any(2), masks.any(1)  # (N, S) each
    box = cells_in_box(masks.device).any(0).sum()
    return _extent(rows) * _extent(columns) / box.square()


def _extent(occupied: Tensor) -> Tensor:
    """Cells (N,) from the first occupied one to the last, of (N, S)."""
    first, last = occupied.int().argmax(1), occupied.flip(1).int().argmax(1)
    return torch.where(occupied.any(1), occupied.shape[1] - first - last, 0)


def _view_size(size: Sequence[int], image_size: tuple[int, int] | None, scale: float) -> tuple[int, int]:
    """Height and width in pixels of the view of an image of that height and width."""
    height, width = size
    if image_size is not None:
        scale *= min(image_size[0] / min(height, width), image_size[1] / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _decode_overlapping(candidates: Candidates) -> BoxDecoder:
    """Decodes each box from the candidate of its image that overlaps it best, NaN if none does."""

    def decode(boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
        overlap = box_iou(boxes, candidates.boxes.float()) * candidates.scores.float().sqrt()  # (T, K)
        mine = image_index[:, None] == candidates.image_index
        # A sentinel column for images without a candidate.
        value, best = F.pad(torch.where(mine, overlap, 0.0), (0, 1)).max(1)  # (T,) each
        found = value > 0
        logits = candidates.decode_masks(best[found], boxes[found], labels[found])  # (F, h, w)
        table = logits.new_full((len(boxes), *logits.shape[1:]), torch.nan)
        table[found] = logits
        return table

    return decode
