"""The EMA teacher as a source of pseudo masks: candidates → assignment → decoded masks → confidence."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher.adaptation import as_provider
from boxteacher.assignment import assign_greedily, match_quality
from boxteacher.copying import copy_network
from boxteacher.ema import ema_momentum, update_ema
from boxteacher.grid import MaskGrid
from boxteacher.inputs import cast_batch
from boxteacher.precision import autocast_to
from boxteacher.protocol import PseudoMaskProvider, PseudoMasks, Target
from boxteacher.scoring import ConfidenceFormula, mask_confidence, mask_quality, ranking_score
from boxteacher.targets import cells_inside, flat_targets
from boxteacher.validation import (
    check_batch_norms,
    check_choice,
    check_mask_logits,
    check_not_sharded,
    check_range,
)
from boxteacher.value_checks import ValueChecks
from boxteacher.view import TeacherView, check_image_size

logger = logging.getLogger(__name__)

_MASK_THRESHOLD = 0.5


class EMATeacher(nn.Module):
    """A segmenter's exponential moving average, which proposes masks for known boxes (BoxTeacher, Sec. 3.2).

    It follows `PseudoMaskSource`. `BoxTeacher` makes one of its student unless it is given a source, and
    updates it once per optimizer step. By itself, or with a momentum of 1, it is a fixed copy of the
    segmenter, which may then be another network than the student.

    Example:
        >>> teacher = EMATeacher(segmenter, iou_threshold=0.8)  # doctest: +SKIP
        >>> model = BoxTeacher(segmenter, teacher=teacher)  # doctest: +SKIP

    Args:
        segmenter: model that follows `PseudoMaskProvider`, or whose type has a registered adapter; it is
            copied.
        momentum: limit of the average's momentum, in [0, 1]; 1 for a fixed teacher.
        iou_threshold: minimum IoU of a candidate's box with the box it is assigned to, in (0, 1].
        score_threshold: score that candidates must exceed, in [0, 1].
        confidence: formula of the mask-aware confidence, "released" or "paper" (see `mask_confidence`).
        quality_at: place where a mask's quality is measured: the mask "grid", or all pixels of the "image" as
            in the released code, which costs far more and changes little.
        image_size: shortest side and maximum longest side in pixels to which the images are resized, as in
            the released code; they are left as they are if not given.
        mode: mode of the network's layers while it labels. "eval" uses running statistics, which are averaged
            with the weights. "train", as in the released code, uses the batch's; running statistics are then
            the teacher's own, of the images that it sees, and only parameters are averaged.
        dtype: type that the teacher computes in, by autocast, such as `torch.bfloat16`; that of the rest of
            the step if not given.

    Attributes:
        model: the averaged segmenter, in evaluation mode whenever it does not label.

    Raises:
        ProtocolError: `segmenter` lacks a part of `PseudoMaskProvider`, or cannot be copied; the message
            names the reason.
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        *,
        momentum: float = 0.999,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.0,
        confidence: ConfidenceFormula = "released",
        quality_at: Literal["grid", "image"] = "grid",
        image_size: tuple[int, int] | None = None,
        mode: Literal["eval", "train"] = "eval",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_range("momentum", momentum, minimum=0, maximum=1)
        check_range("iou_threshold", iou_threshold, above=0, maximum=1)
        check_range("score_threshold", score_threshold, minimum=0, maximum=1)
        check_choice("confidence", confidence, ("released", "paper"))
        check_choice("quality_at", quality_at, ("grid", "image"))
        check_image_size(image_size)
        check_choice("mode", mode, ("eval", "train"))
        check_choice("dtype", dtype, (None, torch.bfloat16, torch.float16))
        check_not_sharded(segmenter)
        self.model = copy_network(as_provider(segmenter)).requires_grad_(False).eval()
        self.momentum = momentum
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.confidence: ConfidenceFormula = confidence
        self.quality_at: Literal["grid", "image"] = quality_at
        self.image_size = image_size
        self.mode: Literal["eval", "train"] = mode
        self.dtype = dtype
        self._warned = False

    @property
    def provider(self) -> PseudoMaskProvider:
        """The averaged segmenter, typed as the protocol that it follows."""
        return cast(PseudoMaskProvider, self.model)

    def train(self, mode: bool = True) -> "EMATeacher":
        """Leaves the model in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def follows_student(self) -> bool:
        """Whether the teacher is an average, and not fixed."""
        return self.momentum < 1

    def update(self, student: nn.Module, step: int) -> None:
        """Moves the average towards `student`, which has taken `step` optimizer steps (BoxTeacher, Eq. 1).

        Raises:
            InputError: `student` has other parameters or buffers than the average; the message names them.
        """
        if self.follows_student:
            momentum = ema_momentum(step, self.momentum)
            update_ema(self.model, student, momentum, buffers=self.mode == "eval")

    @contextmanager
    def _labeling(self, images: list[Tensor]) -> Iterator[None]:
        """Puts the network's layers in the teacher's mode for these images, and back."""
        if self.mode == "eval":
            yield
            return
        self.model.train()
        for module in self.model.modules():
            # What is made of layers stays in evaluation mode: torchvision's detectors would ask for targets.
            module.training = module.training and not list(module.children())
        try:
            check_batch_norms(self.model, images, self.provider.size_divisor)
            yield
        finally:
            self.model.eval()

    @torch.no_grad()
    def forward(self, images: list[Tensor], targets: list[Target], grid: MaskGrid) -> PseudoMasks:
        """Binary masks of the targets, not cut to their boxes, and their mask-aware confidence.

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
        most_boxes = max(len(each["boxes"]) for each in targets)
        self._warn_of_few_candidates(most_boxes)
        view = TeacherView(images, self.image_size)
        with autocast_to(self.dtype, boxes.device), self._labeling(view.images):
            candidates = self.provider.forward_teacher(view.images)

            # Box-based assignment (Alg. 1). Masks are decoded only for the P pairs of candidate and box that
            # overlap enough, which synchronizes with the device.
            candidate_boxes = view.boxes_of_images(candidates.boxes, candidates.image_index)  # (K, 4)
            iou = match_quality(
                candidate_boxes, candidates.image_index, boxes, box_image, self.iou_threshold
            )  # (K, T)
            iou = torch.where(candidates.scores[:, None] > self.score_threshold, iou, 0.0)
            candidate, target = (iou > 0).nonzero(as_tuple=True)  # (P,) each
            scores = candidates.scores[candidate].float()  # (P,)
            view_boxes = view.boxes_of_view(boxes, box_image)[target]  # (P, 4)
            logits = candidates.decode_masks(candidate, view_boxes, labels[target])  # (P, h', w')
            masks, quality = self._on_grid(logits, view, box_image[target], images, grid)  # (P, h, w), (P,)
            # Candidates, best √(score · quality) first, choose the free box of highest IoU. A candidate with
            # several boxes comes once, with the quality of its mask in the box that it overlaps most.
            best = iou[candidate].argmax(1) == target  # (P,)
            winner = assign_greedily(
                torch.where(best[:, None], iou[candidate], 0.0),
                ranking_score(scores, quality),
                most_boxes,
            )  # (T,)
            pair = _pair_of(candidate, target, winner, iou.shape)  # (T,)

            # Mask-aware confidence √(√score · quality) (Eq. 3); an entry of 0 is appended for pair −1, none.
            confidence = mask_confidence(scores, quality, self.confidence)  # (P,)
            return PseudoMasks(
                masks=F.pad(masks > _MASK_THRESHOLD, (0, 0, 0, 0, 0, 1))[pair],
                confidence=F.pad(confidence, (0, 1))[pair],
            )

    def _warn_of_few_candidates(self, boxes: int) -> None:
        limit = getattr(self.model, "max_detections", boxes)
        if boxes > limit and not self._warned:
            self._warned = True
            logger.warning(
                "an image has %d boxes, but the teacher proposes at most %d masks per image: set "
                "max_detections of the segmenter before it is wrapped",
                boxes,
                limit,
            )

    def _on_grid(
        self, logits: Tensor, view: TeacherView, image_index: Tensor, images: list[Tensor], grid: MaskGrid
    ) -> tuple[Tensor, Tensor]:
        """Mask probabilities (P, h, w) on the grid, 0 outside the image, and their quality (P,).

        Args:
            logits: (P, h', w') on the model's mask grid of the view.
            view: of the images.
            image_index: (P,) int64.
            images: (3, H_i, W_i) each.
            grid: of the result.
        """
        own_grid = view.mask_grid(self.provider.mask_stride, self.provider.size_divisor)
        check_mask_logits(self.model, "decode_masks", logits, (len(image_index), *own_grid.shape))
        probabilities = logits.float().sigmoid()
        if self.quality_at == "grid" and self.image_size is None and own_grid == grid:
            probabilities = probabilities.masked_fill_(~cells_inside(images, grid)[image_index], 0.0)
            return probabilities, mask_quality(probabilities, _MASK_THRESHOLD)
        pixels = view.masks_at_pixels(probabilities, image_index, own_grid.stride, grid.padded_size)
        probabilities = grid.sample(pixels)  # (P, h, w)
        measured = probabilities if self.quality_at == "grid" else pixels
        return probabilities, mask_quality(measured, _MASK_THRESHOLD)


def _pair_of(candidate: Tensor, target: Tensor, winner: Tensor, shape: torch.Size) -> Tensor:
    """The pair (T,) of each target and the candidate that owns it, −1 for none.

    Args:
        candidate: (P,) int64 of each pair.
        target: (P,) int64 of each pair.
        winner: (T,) int64, any pair of the owning candidate, −1 for none.
        shape: numbers of candidates and targets.
    """
    num_candidates, num_targets = shape
    table = candidate.new_full((num_candidates + 1, num_targets), -1)  # (K + 1, T); row K is a sentinel
    table[candidate, target] = torch.arange(len(candidate), device=candidate.device)
    owner = F.pad(candidate, (0, 1), value=num_candidates)[winner]  # (T,); K for none
    return table[owner, torch.arange(num_targets, device=table.device)]
