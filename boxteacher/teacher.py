"""BoxTeacher: one training step, read from top to bottom."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher.assignment import assign_greedily, match_quality
from boxteacher.augmentation import StrongAugmentation
from boxteacher.ema import ema_momentum, update_ema
from boxteacher.losses import (
    affinity_relation,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
)
from boxteacher.precision import autocast_to
from boxteacher.protocol import Candidates, MaskPredictions
from boxteacher.scoring import ConfidenceFormula, mask_confidence, mask_quality, ranking_score
from boxteacher.supervision import BoxSupervised
from boxteacher.targets import GridTargets
from boxteacher.teacher_view import TeacherView, check_teacher_size
from boxteacher.validation import check_choice, check_mask_logits, check_range, check_whole


@dataclass(frozen=True)
class PseudoMasks:
    """What the teacher says of each target of a batch.

    Attributes:
        masks: (T, h, w) bool on the mask grid, inside the target's box; empty where there is none.
        confidence: (T,) in [0, 1]; 0 where there is none, 1 for a mask that was drawn.
    """

    masks: Tensor
    confidence: Tensor


class BoxTeacher(BoxSupervised):
    """Teaches a segmenter masks from boxes alone (BoxTeacher, CVPR 2023).

    A teacher, whose weights are the exponential moving average of the student's, proposes masks; each is
    assigned to a ground-truth box and given a mask-aware confidence. The student sees the images strongly
    augmented and learns from boxes and colours (as in `BoxSupervised`) and from those pseudo masks. A target
    with a drawn mask uses that one, with confidence 1.

    The teacher keeps itself up to date: it follows once per optimizer step, whatever the training loop does
    in between (gradient accumulation, steps that a gradient scaler skips). Keep the weights in float32 and
    use autocast: an average in half precision stalls.

    Example:
        >>> model = BoxTeacher(my_segmenter)  # doctest: +SKIP
        >>> losses = model(images, targets)  # doctest: +SKIP
        >>> sum(losses.values()).backward()  # doctest: +SKIP

    Args:
        student: the segmenter that is trained; it follows `PseudoMaskProvider`, or an adapter is registered
            for its type (see `boxteacher.adaptation`).
        momentum: that the teacher's average approaches, in [0, 1].
        iou_threshold: least IoU of a candidate's box with the box it is assigned to, in (0, 1].
        score_threshold: candidates must score above it, in [0, 1].
        mask_threshold: a cell belongs to a pseudo mask above this probability, in [0, 1].
        confidence: formula of the mask-aware confidence, "released" or "paper" (see `mask_confidence`).
        quality_at: where a mask's quality is measured: on the mask "grid", or at all pixels of the "image" as
            in the released code, which costs far more and changes little.
        teacher_size: shortest and greatest longest side in pixels to which the teacher's images are resized,
            as in the released code; it sees them as they are if not given.
        teacher_dtype: what the teacher computes in, by autocast, such as `torch.bfloat16`; as the rest of the
            step if not given.
        teacher_interval: optimizer steps from one question to the teacher to the next; in between, masks
            learn from boxes, colours and drawn masks alone.
        pixel_weight: of the noise-aware pixel loss.
        affinity_weight: of the noise-reduced affinity loss.
        affinity_threshold: least affinity of a pair, in (0, 1].
        color_threshold: least colour similarity of a pair, in (0, 1].
        kernel_size: side of the window of neighbours on the mask grid, odd.
        dilation: cells between neighbours in the window.
        warmup_steps: optimizer steps over which the colour-pairwise loss reaches its full weight.
        pseudo_warmup_steps: the same for the two losses from pseudo masks; `warmup_steps` if not given.
        augmentation: makes the student's view; photometric only. `StrongAugmentation()` if not given.
        inference: whose detections evaluation returns, "teacher" or "student".

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        momentum: float = 0.999,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.0,
        mask_threshold: float = 0.5,
        confidence: ConfidenceFormula = "released",
        quality_at: Literal["grid", "image"] = "grid",
        teacher_size: tuple[int, int] | None = None,
        teacher_dtype: torch.dtype | None = None,
        teacher_interval: int = 1,
        pixel_weight: float = 0.5,
        affinity_weight: float = 0.1,
        affinity_threshold: float = 0.5,
        color_threshold: float = 0.3,
        kernel_size: int = 3,
        dilation: int = 2,
        warmup_steps: int = 10_000,
        pseudo_warmup_steps: int | None = None,
        augmentation: nn.Module | None = None,
        inference: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__(
            student,
            color_threshold=color_threshold,
            kernel_size=kernel_size,
            dilation=dilation,
            warmup_steps=warmup_steps,
        )
        check_range("momentum", momentum, least=0, most=1)
        check_range("iou_threshold", iou_threshold, above=0, most=1)
        check_range("score_threshold", score_threshold, least=0, most=1)
        check_range("mask_threshold", mask_threshold, least=0, most=1)
        check_range("affinity_threshold", affinity_threshold, above=0, most=1)
        check_range("pixel_weight", pixel_weight, least=0)
        check_range("affinity_weight", affinity_weight, least=0)
        check_range("pseudo_warmup_steps", pseudo_warmup_steps or 0, least=0)
        check_whole("teacher_interval", teacher_interval, least=1)
        check_choice("quality_at", quality_at, ("grid", "image"))
        check_choice("teacher_dtype", teacher_dtype, (None, torch.bfloat16, torch.float16))
        check_teacher_size(teacher_size)
        check_choice("confidence", confidence, ("released", "paper"))
        check_choice("inference", inference, ("teacher", "student"))
        self.momentum = momentum
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.mask_threshold = mask_threshold
        self.confidence: ConfidenceFormula = confidence
        self.quality_at: Literal["grid", "image"] = quality_at
        self.teacher_size = teacher_size
        self.teacher_dtype = teacher_dtype
        self.teacher_interval = teacher_interval
        self.pixel_weight = pixel_weight
        self.affinity_weight = affinity_weight
        self.affinity_threshold = affinity_threshold
        self.pseudo_warmup_steps = warmup_steps if pseudo_warmup_steps is None else pseudo_warmup_steps
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.inference = inference
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.last_pseudo_masks: PseudoMasks | None = None

    @property
    def segmenter(self) -> nn.Module:
        return self.teacher if self.inference == "teacher" else self.student

    def __getattr__(self, name: str) -> Any:
        if name == "teacher":  # whoever looks at the teacher finds it up to date
            self._settle()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_pseudo_masks": None}

    def train(self, mode: bool = True) -> "BoxTeacher":
        super().train(mode)
        self.teacher.eval()
        return self

    def _settle(self) -> None:
        step = self._counter.steps
        if self._counter.settle():
            update_ema(self.teacher, self.student, ema_momentum(step, self.momentum))

    def _student_view(self, images: list[Tensor]) -> list[Tensor]:
        return self.augmentation(images)

    def _prepare(self, images: list[Tensor], grid: GridTargets) -> Any:
        asked = self._counter.steps % self.teacher_interval == 0
        if asked and len(grid.boxes) > 0:
            with torch.no_grad(), autocast_to(self.teacher_dtype, images[0].device):
                view = TeacherView(images, self.teacher_size)
                candidates = self.teacher.forward_teacher(view.images)  # type: ignore[operator]
                self.last_pseudo_masks = self._pseudo_masks(candidates, view, grid)
        else:
            self.last_pseudo_masks = PseudoMasks(grid.masks, grid.has_mask.float())
        return self._color_similarity(images, grid), self.last_pseudo_masks

    def _pseudo_masks(self, candidates: Candidates, view: TeacherView, grid: GridTargets) -> PseudoMasks:
        boxes = view.boxes_of_images(candidates.boxes, candidates.image_index)  # (K, 4)
        iou = match_quality(
            boxes, candidates.image_index, grid.boxes, grid.image_index, self.iou_threshold
        )  # (K, T)
        iou = torch.where(candidates.scores[:, None] > self.score_threshold, iou, 0.0)
        # Masks are decoded for these pairs alone, so their number must be known, and the device waited for.
        candidate, target = (iou > 0).nonzero(as_tuple=True)  # (P,) each
        scores = candidates.scores[candidate].float()  # (P,)
        probabilities, quality = self._decode(candidates, candidate, target, view, grid)  # (P, h, w), (P,)
        # A candidate is ranked by the mask that it draws for the box it overlaps most.
        wish = torch.where((iou[candidate].argmax(1) == target)[:, None], iou[candidate], 0.0)  # (P, T)
        winner = assign_greedily(wish, ranking_score(scores, quality), grid.most_boxes)  # (T,)
        chosen = _pair_of(candidate, target, winner, iou.shape)  # (T,)
        confidence = mask_confidence(scores, quality, self.confidence)  # (P,)

        # Index −1, a box that nobody won, finds the blank entry at the end.
        masks = torch.cat([probabilities > self.mask_threshold, torch.zeros_like(grid.box_masks[:1])])
        masks = masks[chosen] & grid.box_masks  # (T, h, w)
        confidence = torch.cat([confidence, confidence.new_zeros(1)])[chosen]  # (T,)
        return PseudoMasks(
            masks=torch.where(grid.has_mask[:, None, None], grid.masks, masks),
            confidence=torch.where(grid.has_mask, 1.0, confidence),
        )

    def _decode(
        self,
        candidates: Candidates,
        candidate: Tensor,
        target: Tensor,
        view: TeacherView,
        grid: GridTargets,
    ) -> tuple[Tensor, Tensor]:
        """Mask probabilities (P, h, w) on the grid, 0 outside the image, and mask quality (P,), of pairs."""
        provider = self._provider
        boxes = view.boxes_of_view(grid.boxes, grid.image_index)[target]  # (P, 4)
        # (P, h, w) on the grid of the teacher's view
        logits = candidates.decode_masks(candidate, boxes, grid.labels[target])
        expected = view.grid_size(provider.mask_stride, provider.size_divisor)
        check_mask_logits(self.teacher, "decode_masks", logits, (len(candidate), *expected))
        probabilities = logits.float().sigmoid()
        image_index = candidates.image_index[candidate]  # (P,)
        if self.quality_at == "grid" and self.teacher_size is None:
            probabilities = probabilities.masked_fill_(~grid.inside[image_index], 0.0)
            return probabilities, mask_quality(probabilities, self.mask_threshold)
        stride = provider.mask_stride
        height, width = (stride * cells for cells in grid.inside.shape[1:])
        pixels = view.masks_of_images(probabilities, image_index, stride, height, width)  # (P, H, W)
        probabilities = pixels[:, stride // 2 :: stride, stride // 2 :: stride]
        measured = probabilities if self.quality_at == "grid" else pixels
        return probabilities, mask_quality(measured, self.mask_threshold)

    def _mask_losses(
        self, predictions: MaskPredictions, grid: GridTargets, lessons: Any
    ) -> dict[str, Tensor]:
        similarity, pseudo = lessons
        index = predictions.target_index  # (M,)
        confidence = pseudo.confidence[index]  # (M,)
        relations = [
            self._color_relation(predictions, grid, similarity),
            affinity_relation(pseudo.masks, index, self.affinity_threshold),
        ]
        sums, counts = self._pair_sums(predictions, grid, relations)
        pixel = noise_aware_pixel_loss(predictions.logits, pseudo.masks[index], confidence)
        affinity = noise_reduced_affinity_loss(sums[1], counts[1], confidence)
        warmup = self._warmup(self.pseudo_warmup_steps)
        return {
            **self._box_losses(predictions, grid, sums[0], counts[0]),
            "loss_pixel": pixel * (self.pixel_weight * warmup),
            "loss_affinity": affinity * (self.affinity_weight * warmup),
        }


def _pair_of(candidate: Tensor, target: Tensor, winner: Tensor, shape: torch.Size) -> Tensor:
    """The pair (T,) of each target and the candidate that won it, −1 for none.

    Args:
        candidate: (P,) int64 of each pair.
        target: (P,) int64 likewise.
        winner: (T,) int64, any pair of the winning candidate, −1 for none.
        shape: numbers of candidates and targets.
    """
    table = candidate.new_full((shape[0] + 1, shape[1]), -1)  # (K + 1, T)
    table[candidate, target] = torch.arange(len(candidate), device=candidate.device)
    candidate = F.pad(candidate, (0, 1), value=shape[0])  # (P + 1,), so that −1 finds the row of blanks
    return table[candidate[winner], torch.arange(shape[1], device=table.device)]
