"""The base of the training wrappers, and the two plain ones: supervision by boxes, supervision by masks."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from boxteacher.adaptation import as_provider
from boxteacher.copying import copy_network
from boxteacher.distributed import global_mean
from boxteacher.ema import StepCounter
from boxteacher.errors import ProtocolError
from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.inputs import cast_batch, cast_images
from boxteacher.losses import (
    BoxRegions,
    color_pairwise_loss,
    color_relation,
    ellipse_loss,
    noise_aware_pixel_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.protocol import Detections, MaskPredictions, PseudoMaskProvider, StudentOutput, Target
from boxteacher.targets import GridTargets, color_similarity, grid_targets
from boxteacher.validation import check_batch_norms, check_mask_logits, check_range
from boxteacher.value_checks import ValueChecks

logger = logging.getLogger(__name__)

_BATCHES_WITHOUT_STEP = 100  # before a warning; gradients are rarely accumulated over more


class TrainingWrapper(nn.Module):
    """A segmenter with the losses that train it; called like a torchvision detector.

    `model(images, targets)` in training mode returns a dict of scalar losses whose sum is to be minimized;
    `model(images)` in evaluation mode returns detections. Each subclass writes its whole step in `forward`;
    what is here counts steps, checks batches, copies and unwraps.

    Args:
        student: segmenter to train; it follows `PseudoMaskProvider`, or its type has a registered adapter
            (see `boxteacher.adaptation`).

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
    """

    step_count: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = as_provider(student)
        self._is_adapter = self.student is not student
        self._counter = StepCounter(self.student)
        # A buffer, which DistributedDataParallel copies from its first process to the others.
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        self._known_steps: int | None = None  # the buffer's value, once training has read it
        self._batches_since_step = 0

    @property
    def provider(self) -> PseudoMaskProvider:
        """The student, typed as the protocol that it follows."""
        return cast(PseudoMaskProvider, self.student)

    @property
    def segmenter(self) -> nn.Module:
        """The network that evaluation uses, as of the last forward pass or `synchronize`."""
        return self.student

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the student has taken; the unit of warm-ups. Reading it changes nothing.

        It is the buffer `step_count`, with a step that is not yet counted. On another device than the CPU
        training reads the buffer at its first batch, and again after `load_state_dict`: set it before.
        """
        if self._known_steps is None or self.step_count.device.type == "cpu":
            return int(self.step_count) + self._counter.has_stepped
        return self._known_steps + self._counter.has_stepped

    def optimizer_stepped(self) -> None:
        """Says that the student's weights have moved; call it after a step of an optimizer that is not seen.

        Steps of every `torch.optim.Optimizer` over the student's own parameters are seen, and calling this as
        well changes nothing directly after the step; after a forward pass, `state_dict()`, `unwrap()` or a
        copy it counts as another step. An optimizer of another kind is not seen, and neither is one that
        moves master weights, of which the student's are copies (DeepSpeed, apex O2).
        """
        self._counter.notice()

    def synchronize(self) -> None:
        """Counts the optimizer step since the last call; forward passes, `state_dict` and copies do it."""
        self.count_step()

    def count_step(self) -> bool:
        """Whether there was an optimizer step since the last call, which is then counted."""
        if not self._counter.advance():
            return False
        self._batches_since_step = 0
        self.step_count.add_(1)
        if self._known_steps is not None:
            self._known_steps += 1
        return True

    def unwrap(self) -> nn.Module:
        """A copy of the plain segmenter, in evaluation mode and without anything of the training.

        A model that came without the protocol's methods is returned as it came, without its adapter.

        Raises:
            ProtocolError: the segmenter cannot be copied; the message names the attribute.
        """
        self.synchronize()
        segmenter = copy_network(self.segmenter).eval()
        trained = {name for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        for name, parameter in segmenter.named_parameters():
            parameter.requires_grad_(name in trained)
        return cast(nn.Module, segmenter.model) if self._is_adapter else segmenter

    def detect(self, images: Sequence[Any]) -> list[Detections]:
        """Detections of images by the network that evaluation uses.

        Args:
            images: tensors (3, H_i, W_i) or others that `cast_images` takes.

        Raises:
            InputError: `images` is not a list of such images.
        """
        segmenter = self.segmenter
        return cast("list[Detections]", segmenter(cast_images(images, segmenter, ValueChecks(cpu_only=True))))

    def training_batch(
        self, images: Sequence[Any], targets: Sequence[Target] | None
    ) -> tuple[list[Tensor], list[Target], MaskGrid, ValueChecks]:
        """Images and targets as `cast_batch` returns them, the mask grid, and checks to `finish` in the end.

        Raises:
            InputError: images and targets do not fit together, or leave a batch norm a single value.
            ProtocolError: the student was replaced after it was wrapped.
        """
        self.watch_student()
        checks = ValueChecks()
        images, targets = cast_batch(images, targets, self.student, checks)
        provider = self.provider
        check_batch_norms(self.student, images, provider.size_divisor)
        return images, targets, mask_grid(images, provider.mask_stride, provider.size_divisor), checks

    def watch_student(self) -> None:
        """Checks that the student's steps are those that are counted, and warns if there are none."""
        if self._known_steps is None:
            self._known_steps = int(self.step_count)  # synchronizes, once
        if self._counter.module is not self.student:
            raise ProtocolError(
                f"{type(self).__name__}.student was replaced after it was wrapped: wrap the new one, "
                f"{type(self).__name__}(student)"
            )
        self._batches_since_step += torch.is_grad_enabled()
        if self._batches_since_step == _BATCHES_WITHOUT_STEP:
            logger.warning(
                "no optimizer step was seen in %d batches, so warm-ups and the teacher stand still: call "
                "optimizer_stepped() of the %s after each step of an optimizer that holds copies of the "
                "weights or is no torch.optim.Optimizer",
                _BATCHES_WITHOUT_STEP,
                type(self).__name__,
            )

    def mask_predictions(
        self, output: StudentOutput, grid: MaskGrid, truth: GridTargets
    ) -> Iterator[MaskPredictions]:
        """A student's masks, one entry per decoder layer, without gradient in ignore boxes.

        Raises:
            ProtocolError: mask logits do not lie on the grid.
        """
        for predictions in output.masks:
            shape = (len(predictions.target_index), *grid.shape)
            check_mask_logits(self.student, "forward_student", predictions.logits, shape)
            if truth.ignored is not None:
                ignored = truth.ignored[truth.image_index[predictions.target_index]]  # (M, h, w)
                logits = torch.where(ignored, predictions.logits.detach(), predictions.logits)
                predictions = replace(predictions, logits=logits)
            yield predictions

    def combine(self, losses: dict[str, Tensor], mask_losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The student's own losses together with the mask losses, averaged over decoder layers.

        Raises:
            ProtocolError: the student's losses have names of the mask losses.
        """
        names = mask_losses[0] if mask_losses else ()
        means = {name: torch.stack([layer[name] for layer in mask_losses]).mean() for name in names}
        if twice := losses.keys() & means.keys():
            raise ProtocolError(
                f"{type(self.student).__name__}.forward_student returns {', '.join(sorted(twice))}, "
                "which the core computes: rename it"
            )
        return {**losses, **means}

    def warmup(self, steps: int) -> float:
        """A weight that grows linearly, by optimizer steps, from nearly 0 to 1 over the given number."""
        return min((self.optimizer_steps + 1) / max(steps, 1), 1.0)

    def cooldown(self, steps: int) -> float:
        """A weight that falls linearly, by optimizer steps, from 1 to 0 over the given number."""
        return max(1 - self.optimizer_steps / steps, 0.0) if steps else 0.0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.synchronize()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        old_key = f"{prefix}_extra_state"  # of the count, before it was a buffer
        if old_key in state_dict:
            state_dict[f"{prefix}step_count"] = state_dict.pop(old_key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._counter, self._known_steps = StepCounter(self.student), None

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return {**self.__dict__, "_counter": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._counter = StepCounter(self.student)


class BoxSupervised(TrainingWrapper):
    """Masks from boxes and colors alone (BoxInst, CVPR 2021).

    A mask must have its box's projections onto both axes (projection loss), and neighbors of similar color
    must have the same label (color-pairwise loss, with linear warm-up).

    Args:
        student: segmenter to train.
        warmup_steps: optimizer steps until the pairwise loss has its full weight.
        ellipse_steps: optimizer steps during which masks also learn to fill the ellipse in their box, with a
            weight that falls from 1 to 0; 0 for none, as in BoxInst.

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
        InputError: a setting is out of range.
    """

    def __init__(self, student: nn.Module, *, warmup_steps: int = 10_000, ellipse_steps: int = 0) -> None:
        super().__init__(student)
        check_range("warmup_steps", warmup_steps, minimum=0)
        check_range("ellipse_steps", ellipse_steps, minimum=0)
        self.warmup_steps = warmup_steps
        self.ellipse_steps = ellipse_steps

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
            ProtocolError: the student returns something else than its protocol says.
        """
        self.synchronize()
        if not self.training:
            return self.detect(images)
        images, targets, grid, checks = self.training_batch(images, targets)
        truth = grid_targets(images, targets, grid)
        similarity = color_similarity(images, truth.valid, grid)  # (B, 8, h, w)

        output = self.provider.forward_student(images, targets)
        mask_losses = []
        for predictions in self.mask_predictions(output, grid, truth):
            logits, index = predictions.logits, predictions.target_index  # (M, h, w), (M,)
            regions = BoxRegions(truth.extents[index], truth.image_index[index], truth.valid)
            colors = color_relation(similarity, regions.image_index)
            (color_sums,), (color_counts,) = pair_sums(logits, regions, [colors])  # (M,) each
            pairwise = color_pairwise_loss(color_sums * predictions.weight, color_counts)
            projection = projection_loss(logits, truth.box_masks[index]) * predictions.weight  # (M,)
            losses = {
                "loss_projection": global_mean(projection),
                "loss_pairwise": pairwise * self.warmup(self.warmup_steps),
            }
            if ellipse_weight := self.cooldown(self.ellipse_steps):
                ellipse = ellipse_loss(logits, truth.boxes[index], grid) * predictions.weight  # (M,)
                losses["loss_ellipse"] = global_mean(ellipse) * ellipse_weight
            mask_losses.append(losses)
        checks.finish()
        return self.combine(output.losses, mask_losses)


class MaskSupervised(TrainingWrapper):
    """Masks from the targets' masks: the fully supervised comparison, with the Dice loss on the mask grid.

    Targets without a mask teach boxes and classes only; the first batch that has boxes and no mask at all is
    logged as a warning. A mask's `mask_confidence` weighs its loss, annotated or not.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self._warned = False

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode; see `BoxSupervised.forward`."""
        self.synchronize()
        if not self.training:
            return self.detect(images)
        images, targets, grid, checks = self.training_batch(images, targets)
        self._warn_without_masks(targets)
        truth = grid_targets(images, targets, grid)

        output = self.provider.forward_student(images, targets)
        mask_losses = []
        for predictions in self.mask_predictions(output, grid, truth):
            index = predictions.target_index  # (M,)
            masks, trust = truth.masks[index], truth.mask_confidence[index] * predictions.weight
            mask_losses.append({"loss_mask": noise_aware_pixel_loss(predictions.logits, masks, trust)})
        checks.finish()
        return self.combine(output.losses, mask_losses)

    def _warn_without_masks(self, targets: Sequence[Target]) -> None:
        has_boxes = any(len(target["boxes"]) for target in targets)
        if not self._warned and has_boxes and not any("masks" in target for target in targets):
            self._warned = True
            logger.warning(
                "no target of this batch has 'masks', so no mask is learned from it: give annotated masks, "
                "or use BoxSupervised or BoxTeacher"
            )
