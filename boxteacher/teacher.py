"""BoxTeacher: one training step, read from top to bottom."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from boxteacher.augmentation import StrongAugmentation
from boxteacher.distributed import global_mean, num_processes
from boxteacher.errors import InputError
from boxteacher.losses import (
    BoxRegions,
    affinity_relation,
    color_pairwise_loss,
    color_relation,
    ellipse_loss,
    noise_aware_pixel_loss,
    noise_reduced_affinity_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.protocol import Detections, PseudoMasks, PseudoMaskSource, Target
from boxteacher.pseudo_masks import EMATeacher
from boxteacher.state_dicts import compare_states
from boxteacher.supervision import TrainingWrapper
from boxteacher.targets import color_similarity, grid_targets, may_lack_masks
from boxteacher.validation import (
    check_choice,
    check_not_sharded,
    check_pseudo_masks,
    check_range,
    check_source,
    check_whole,
)


class BoxTeacher(TrainingWrapper):
    """Trains a segmenter on masks from boxes alone (BoxTeacher, CVPR 2023).

    A teacher, by default the exponential moving average of the student, proposes a mask with a confidence for
    each box. The student sees the images strongly augmented and learns from boxes and colors (as in
    `BoxSupervised`) and from those pseudo masks. A target's own mask takes the place of a pseudo mask. With
    a `mask_confidence` below 1 it is a pseudo mask of that confidence; else it is annotated, and has a Dice
    loss and a weight of its own, without warm-up, in place of the losses from pseudo masks.

    The teacher is updated once per optimizer step, whatever the training loop does in between (gradient
    accumulation, steps that a gradient scaler skips): by the next forward pass, `state_dict()`, `unwrap()` or
    copy. An optimizer of another kind than `torch.optim.Optimizer`, or over copies of the weights, needs
    `optimizer_stepped()`. Call `synchronize()` before you save `segmenter` by itself. Keep the weights in
    float32 and use autocast: an average in half precision stalls.

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
        mask_weight: weight of the Dice loss with annotated masks.
        warmup_steps: optimizer steps until the color-pairwise loss has its full weight.
        pseudo_warmup_steps: optimizer steps until the two losses from pseudo masks have their full weight;
            `warmup_steps` if not given.
        ellipse_steps: optimizer steps during which masks also learn to fill the ellipse in their box, with a
            weight that falls from 1 to 0; 0 for none, as in the paper.
        teacher_interval: number of optimizer steps from one run of the teacher to the next; in between, masks
            learn from boxes, colors and the masks of the targets alone. 0 for never: pseudo masks are
            predicted between steps, and come as masks of the targets with their `mask_confidence`.
        inference: network that evaluation uses, "teacher" or "student"; always the student with a source that
            is not the student's average.

    Attributes:
        last_pseudo_masks: `PseudoMasks` of the last training step, the targets' own masks included.

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
        mask_weight: float = 1.0,
        warmup_steps: int = 10_000,
        pseudo_warmup_steps: int | None = None,
        ellipse_steps: int = 0,
        teacher_interval: int = 1,
        inference: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__(student)
        pseudo_warmup_steps = warmup_steps if pseudo_warmup_steps is None else pseudo_warmup_steps
        check_range("pixel_weight", pixel_weight, minimum=0)
        check_range("affinity_weight", affinity_weight, minimum=0)
        check_range("mask_weight", mask_weight, minimum=0)
        check_range("warmup_steps", warmup_steps, minimum=0)
        check_range("pseudo_warmup_steps", pseudo_warmup_steps, minimum=0)
        check_range("ellipse_steps", ellipse_steps, minimum=0)
        check_whole("teacher_interval", teacher_interval, minimum=0)
        check_choice("inference", inference, ("teacher", "student"))
        self.teacher: PseudoMaskSource = EMATeacher(self.student) if teacher is None else teacher
        check_source(self.teacher, self.student)
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.pixel_weight = pixel_weight
        self.affinity_weight = affinity_weight
        self.mask_weight = mask_weight
        self.warmup_steps = warmup_steps
        self.pseudo_warmup_steps = pseudo_warmup_steps
        self.ellipse_steps = ellipse_steps
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
            images: tensors (3, H_i, W_i), RGB in [0, 1], or others that `cast_images` takes.
            targets: one per image; needed in training mode. Lists and arrays count as tensors.

        Raises:
            InputError: images and targets do not fit together, or leave a batch norm a single value; the
                message names the image, the box and the remedy.
            ProtocolError: the student or the source returns something else than its protocol says.
        """
        self.synchronize()  # the EMA update (Eq. 1), momentum min(0.999, 1 − 1/(step + 1))
        if not self.training:
            return self.detect(images)
        images, targets, grid, checks = self.training_batch(images, targets)
        truth = grid_targets(images, targets, grid)  # T targets of B images on the grid (h, w)

        # The teacher sees the images as they are: a mask and a confidence for each box (Sec. 3.2). Masks of
        # the targets' own take the place of pseudo masks.
        masks, confidence = truth.masks, truth.mask_confidence  # (T, h, w), (T,)
        speaks = self.teacher_interval and self.optimizer_steps % self.teacher_interval == 0
        if speaks and may_lack_masks(targets):
            with torch.no_grad():
                pseudo = self.teacher(images, targets, grid)
                check_pseudo_masks(self.teacher, pseudo, tuple(masks.shape))
                is_own = truth.mask_confidence > 0  # (T,)
                inside = pseudo.masks.masked_fill(~truth.box_masks, 0)  # (T, h, w)
                masks = torch.where(is_own[:, None, None], truth.masks, inside)
                confidence = torch.where(is_own, truth.mask_confidence, pseudo.confidence)
        self.last_pseudo_masks = PseudoMasks(masks, confidence)
        is_annotated = truth.mask_confidence == 1  # (T,)
        pseudo_confidence = confidence.masked_fill(is_annotated, 0)  # (T,)

        # The student sees them strongly augmented (Sec. 3.4), and learns from boxes and colors …
        similarity = color_similarity(images, truth.valid, grid)  # (B, 8, h, w)
        output = self.provider.forward_student(self.augmentation(images), targets)
        color_weight = self.warmup(self.warmup_steps)
        pseudo_weight = self.warmup(self.pseudo_warmup_steps)
        # Several processes must all count annotated masks, or none of them. Looking costs nothing on the CPU.
        may_be_annotated = is_annotated.device.type != "cpu" or bool(is_annotated.any())
        has_masks = may_be_annotated and any("masks" in target for target in targets)
        with_masks = num_processes() > 1 or has_masks
        mask_losses = []
        for predictions in self.mask_predictions(output, grid, truth):
            logits, index = predictions.logits, predictions.target_index  # (M, h, w), (M,)
            regions = BoxRegions(truth.extents[index], truth.image_index[index], truth.valid)
            pairs = [color_relation(similarity, regions.image_index), affinity_relation(masks, index)]
            (color_sums, affinity_sums), (color_counts, affinity_counts) = pair_sums(logits, regions, pairs)
            projection = global_mean(projection_loss(logits, truth.box_masks[index]) * predictions.weight)
            pairwise = color_pairwise_loss(color_sums * predictions.weight, color_counts)
            # … and from the pseudo masks, as far as each is to be trusted (Sec. 3.3).
            trust = pseudo_confidence[index] * predictions.weight  # (M,)
            pixel = noise_aware_pixel_loss(logits, masks[index], trust)
            affinity = noise_reduced_affinity_loss(affinity_sums, affinity_counts, trust)
            losses = {
                "loss_projection": projection,
                "loss_pairwise": pairwise * color_weight,
                "loss_pixel": pixel * (self.pixel_weight * pseudo_weight),
                "loss_affinity": affinity * (self.affinity_weight * pseudo_weight),
            }
            if ellipse_weight := self.cooldown(self.ellipse_steps):
                ellipse = ellipse_loss(logits, truth.boxes[index], grid) * predictions.weight  # (M,)
                losses["loss_ellipse"] = global_mean(ellipse) * ellipse_weight
            if with_masks:
                trust = is_annotated[index] * predictions.weight
                annotated = noise_aware_pixel_loss(logits, truth.masks[index], trust)
                losses["loss_mask"] = annotated * self.mask_weight
            mask_losses.append(losses)
        checks.finish()
        return self.combine(output.losses, mask_losses)

    def synchronize(self) -> None:
        """Lets an EMA teacher follow the optimizer step since the last call; forward passes do it.

        Raises:
            InputError: the student's weights have other names or shapes than when it was wrapped (LoRA, a
                head of more classes).
        """
        # The step counts only after the update, so that a student that was changed is refused by every call.
        if isinstance(self.teacher, EMATeacher) and self._counter.has_stepped:
            self.teacher.update(self.student, self.optimizer_steps)
        self.count_step()

    def watch_student(self) -> None:
        """Also checks that an EMA teacher can see the student's weights."""
        if self._known_steps is None and isinstance(self.teacher, EMATeacher):
            check_not_sharded(self)
        super().watch_student()

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
