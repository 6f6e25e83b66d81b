"""BoxTeacher: one training step, read from top to bottom."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from boxteacher.augmentation import StrongAugmentation
from boxteacher.distributed import global_mean
from boxteacher.errors import InputError
from boxteacher.losses import (
    BoxRegions,
    affinity_relation,
    color_pairwise_loss,
    color_relation,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.protocol import Detections, PseudoMasks, PseudoMaskSource, Target
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.state_dicts import compare_states
from boxteacher.supervision import TrainingWrapper
from boxteacher.targets import color_similarity, grid_targets
from boxteacher.validation import check_choice, check_pseudo_masks, check_range, check_source, check_whole


class BoxTeacher(TrainingWrapper):
    """Trains a segmenter on masks from boxes alone (BoxTeacher, CVPR 2023).

    A teacher, by default the exponential moving average of the student, proposes a mask with a confidence for
    each box. The student sees the images strongly augmented and learns from boxes and colors (as in
    `BoxSupervised`) and from those pseudo masks. An annotated mask, with its own `mask_confidence`, takes the
    place of a pseudo mask.

    The teacher is updated once per optimizer step, whatever the training loop does in between (gradient
    accumulation, steps that a gradient scaler skips): by the next forward pass, `state_dict()`, `unwrap()` or
    copy. Call `synchronize()` before you save `segmenter` by itself. Keep the weights in float32 and use
    autocast: an average in half precision stalls.

    Example:
        >>> model = BoxTeacher(my_segmenter)  # doctest: +SKIP
        >>> losses = model(images, targets)  # doctest: +SKIP
        >>> sum(losses.values()).backward()  # doctest: +SKIP

    Args:
        student: segmenter to train; it follows `PseudoMaskProvider`, or its type has a registered adapter
            (see `boxteacher.adaptation`).
        teacher: source of pseudo masks, whose parameters are frozen; `EMATeacher(student)` if not given.
        augmentation: module that makes the student's images (3, H_i, W_i) from a list of images; photometric
            only. `StrongAugmentation()` if not given.
        pixel_weight: weight of the noise-aware pixel loss.
        affinity_weight: weight of the noise-reduced affinity loss.
        warmup_steps: optimizer steps until the color-pairwise loss has its full weight.
        pseudo_warmup_steps: optimizer steps until the two losses from pseudo masks have their full weight;
            `warmup_steps` if not given.
        teacher_interval: number of optimizer steps from one run of the teacher to the next; in between, masks
            learn from boxes, colors and annotated masks alone.
        inference: network that evaluation uses, "teacher" or "student"; always the student with a source that
            is not the student's average.

    Attributes:
        last_pseudo_masks: `PseudoMasks` of the last training step, annotated masks included.

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: PseudoMaskSource | None = None,
        augmentation: nn.Module | None = None,
        pixel_weight: float = 0.5,
        affinity_weight: float = 0.1,
        warmup_steps: int = 10_000,
        pseudo_warmup_steps: int | None = None,
        teacher_interval: int = 1,
        inference: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__(student)
        pseudo_warmup_steps = warmup_steps if pseudo_warmup_steps is None else pseudo_warmup_steps
        check_range("pixel_weight", pixel_weight, minimum=0)
        check_range("affinity_weight", affinity_weight, minimum=0)
        check_range("warmup_steps", warmup_steps, minimum=0)
        check_range("pseudo_warmup_steps", pseudo_warmup_steps, minimum=0)
        check_whole("teacher_interval", teacher_interval, minimum=1)
        check_choice("inference", inference, ("teacher", "student"))
        self.teacher: PseudoMaskSource = EMATeacher(self.student) if teacher is None else teacher
        check_source(self.teacher, self.student)
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.pixel_weight = pixel_weight
        self.affinity_weight = affinity_weight
        self.warmup_steps = warmup_steps
        self.pseudo_warmup_steps = pseudo_warmup_steps
        self.teacher_interval = teacher_interval
        self.inference = inference
        self.last_pseudo_masks: PseudoMasks | None = None
        if isinstance(self.teacher, EMATeacher) and self.teacher.follows_student:
            difference = compare_states(self.student.state_dict(), self.teacher.model.state_dict())
            if difference:
                raise InputError(
                    f"the teacher averages another network than the student; entries that differ: "
                    f"{difference}; give EMATeacher(student), or EMATeacher(other, momentum=1), a fixed one"
                )
        if isinstance(self.teacher, nn.Module):
            self.teacher.requires_grad_(False).eval()

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H_i, W_i) each, RGB in [0, 1].
            targets: one per image; needed in training mode.

        Raises:
            InputError: images and targets do not fit together, or leave a batch norm a single value.
            ProtocolError: the student or the source returns something else than its protocol says.
        """
        self.synchronize()  # the EMA update (Eq. 1), momentum min(0.999, 1 − 1/(step + 1))
        if not self.training:
            return self.detect(images)
        targets, grid = self.check_training_batch(images, targets)
        truth = grid_targets(images, targets, grid)  # T targets of B images on the grid (h, w)

        # The teacher sees the images as they are: a mask and a confidence for each box (Sec. 3.2). Annotated
        # masks take the place of pseudo masks.
        masks, confidence = truth.masks, truth.mask_confidence  # (T, h, w), (T,)
        if len(truth.boxes) and self.optimizer_steps % self.teacher_interval == 0:
            with torch.no_grad():
                pseudo = self.teacher(images, targets, grid)
                check_pseudo_masks(self.teacher, pseudo, tuple(masks.shape))
                is_annotated = truth.mask_confidence > 0  # (T,)
                inside = pseudo.masks.masked_fill(~truth.box_masks, 0)  # (T, h, w)
                masks = torch.where(is_annotated[:, None, None], truth.masks, inside)
                confidence = torch.where(is_annotated, truth.mask_confidence, pseudo.confidence)
        self.last_pseudo_masks = PseudoMasks(masks, confidence)

        # The student sees them strongly augmented (Sec. 3.4), and learns from boxes and colors …
        similarity = color_similarity(images, truth.valid, grid)  # (B, 8, h, w)
        output = self.provider.forward_student(self.augmentation(images), targets)
        color_weight = self.warmup(self.warmup_steps)
        pseudo_weight = self.warmup(self.pseudo_warmup_steps)
        mask_losses = []
        for predictions in self.mask_predictions(output, grid, truth):
            logits, index = predictions.logits, predictions.target_index  # (M, h, w), (M,)
            regions = BoxRegions(truth.extents[index], truth.image_index[index], truth.valid)
            pairs = [color_relation(similarity, regions.image_index), affinity_relation(masks, index)]
            (color_sums, affinity_sums), (color_counts, affinity_counts) = pair_sums(logits, regions, pairs)
            projection = global_mean(projection_loss(logits, truth.box_masks[index]) * predictions.weight)
            pairwise = color_pairwise_loss(color_sums * predictions.weight, color_counts)
            # … and from the pseudo masks, as far as each is to be trusted (Sec. 3.3).
            trust = confidence[index] * predictions.weight  # (M,)
            pixel = noise_aware_pixel_loss(logits, masks[index], trust)
            affinity = noise_reduced_affinity_loss(affinity_sums, affinity_counts, trust)
            mask_losses.append(
                {
                    "loss_projection": projection,
                    "loss_pairwise": pairwise * color_weight,
                    "loss_pixel": pixel * (self.pixel_weight * pseudo_weight),
                    "loss_affinity": affinity * (self.affinity_weight * pseudo_weight),
                }
            )
        return self.combine(output.losses, mask_losses)

    def synchronize(self) -> None:
        """Lets an EMA teacher follow the optimizer step since the last call; forward passes do it."""
        if self._counter.advance() and isinstance(self.teacher, EMATeacher):
            self.teacher.update(self.student, self._counter.steps - 1)

    @property
    def segmenter(self) -> nn.Module:
        """The network that evaluation uses, as of the last forward pass or `synchronize`."""
        if (
            self.inference == "teacher"
            and isinstance(self.teacher, EMATeacher)
            and self.teacher.follows_student
        ):
            return self.teacher.model
        return self.student

    def train(self, mode: bool = True) -> "BoxTeacher":
        """Leaves the teacher in evaluation mode."""
        super().train(mode)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_pseudo_masks": None}
