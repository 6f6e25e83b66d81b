"""What every kind of supervision shares, and the two plain kinds: from boxes and colours, from masks."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.adaptation import adapted
from boxteacher.errors import ProtocolError
from boxteacher.losses import (
    BoxRegions,
    color_pairwise_loss,
    color_relation,
    noise_aware_pixel_loss,
    pair_sums,
    projection_loss,
)
from boxteacher.losses.pairs import PairRelation
from boxteacher.protocol import Detections, MaskPredictions, PseudoMaskProvider, Target
from boxteacher.steps import StepCounter
from boxteacher.targets import GridTargets, color_similarity, grid_targets
from boxteacher.validation import (
    check_batch,
    check_batch_norms,
    check_choice,
    check_images,
    check_mask_logits,
    check_provider_methods,
    check_range,
)

logger = logging.getLogger(__name__)


class Supervision(nn.Module):
    """A segmenter together with the losses that teach it masks; called like a torchvision detector.

    `model(images, targets)` in training mode returns a dict of scalar losses whose sum is to be minimised;
    `model(images)` in evaluation mode returns detections. A subclass says what the masks learn from.

    Args:
        student: the segmenter that is trained; it follows `PseudoMaskProvider`, or an adapter is registered
            for its type (see `boxteacher.adaptation`).

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = adapted(student)
        self._is_adapted = self.student is not student
        check_provider_methods(self.student)
        self._counter = StepCounter(self.student)

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H_i, W_i) each, RGB in [0, 1].
            targets: one per image; needed in training mode.

        Raises:
            InputError: images and targets do not fit together, or leave a batch norm a single value.
        """
        self._settle()
        if not self.training:
            check_images(images)
            return self.segmenter(images)
        targets = check_batch(images, targets)
        provider = self._provider
        check_batch_norms(self.student, images, provider.size_divisor)
        grid = grid_targets(images, targets, provider.mask_stride, provider.size_divisor)
        lessons = self._prepare(images, grid)
        output = provider.forward_student(self._student_view(images), targets)
        rounds = []
        for predictions in output.masks:
            expected = (len(predictions.target_index), *grid.valid.shape[1:])
            check_mask_logits(self.student, "forward_student", predictions.logits, expected)
            rounds.append(self._mask_losses(predictions, grid, lessons))
        mask_losses = _mean(rounds)
        if twice := output.losses.keys() & mask_losses.keys():
            raise ProtocolError(
                f"{type(self.student).__name__}.forward_student returns {', '.join(sorted(twice))}, "
                "which the core computes: rename it"
            )
        return {**output.losses, **mask_losses}

    @property
    def segmenter(self) -> nn.Module:
        """The network that evaluation uses."""
        return self.student

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the student has taken; what warm-ups are measured in."""
        self._settle()
        return self._counter.steps

    def export(self) -> nn.Module:
        """A copy of the plain segmenter, in evaluation mode and without anything of the training.

        A model that came without the protocol's methods is returned as it came, without its adapter.
        """
        self._settle()
        segmenter = copy.deepcopy(self.segmenter).eval()
        for ours, trained in zip(segmenter.parameters(), self.student.parameters(), strict=True):
            ours.requires_grad_(trained.requires_grad)
        return segmenter.model if self._is_adapted else segmenter  # type: ignore[return-value]

    @property
    def _provider(self) -> PseudoMaskProvider:
        return self.student  # type: ignore[return-value]

    def _prepare(self, images: list[Tensor], grid: GridTargets) -> Any:
        """What the masks of this batch are to learn from, whatever the student answers."""
        raise NotImplementedError

    def _mask_losses(
        self, predictions: MaskPredictions, grid: GridTargets, lessons: Any
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _student_view(self, images: list[Tensor]) -> list[Tensor]:
        return images

    def _settle(self) -> None:
        """Brings everything that follows the student's weights up to date."""
        self._counter.settle()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super().state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._counter.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self._counter.reset(int(state))

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_counter": self._counter.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        steps = state["_counter"]
        self._counter = StepCounter(self.student)
        self._counter.reset(steps)


class BoxSupervised(Supervision):
    """Masks from boxes and colours alone: BoxInst (CVPR 2021).

    A mask must cast its box's shadow on both axes (projection loss), and neighbours of like colour must
    bear the same label (colour-pairwise loss, with linear warm-up).

    Args:
        student: the segmenter that is trained.
        color_threshold: least colour similarity of a pair, in (0, 1].
        kernel_size: side of the window of neighbours on the mask grid, odd.
        dilation: cells between neighbours in the window.
        warmup_steps: optimizer steps over which the pairwise loss reaches its full weight.

    Raises:
        ProtocolError: `student` lacks a part of `PseudoMaskProvider`; the message names it.
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        color_threshold: float = 0.3,
        kernel_size: int = 3,
        dilation: int = 2,
        warmup_steps: int = 10_000,
    ) -> None:
        super().__init__(student)
        check_range("color_threshold", color_threshold, above=0, most=1)
        check_range("warmup_steps", warmup_steps, least=0)
        check_range("dilation", dilation, least=1)
        check_choice("kernel_size", kernel_size, (3, 5, 7, 9))
        self.color_threshold = color_threshold
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.warmup_steps = warmup_steps

    def _prepare(self, images: list[Tensor], grid: GridTargets) -> Any:
        return self._color_similarity(images, grid)

    def _mask_losses(
        self, predictions: MaskPredictions, grid: GridTargets, lessons: Any
    ) -> dict[str, Tensor]:
        colors = self._color_relation(predictions, grid, lessons)
        sums, counts = self._pair_sums(predictions, grid, [colors])
        return self._box_losses(predictions, grid, sums[0], counts[0])

    def _color_similarity(self, images: list[Tensor], grid: GridTargets) -> Tensor:
        provider = self._provider
        return color_similarity(
            images, grid.valid, provider.mask_stride, provider.size_divisor, self.kernel_size, self.dilation
        )

    def _color_relation(
        self, predictions: MaskPredictions, grid: GridTargets, similarity: Tensor
    ) -> PairRelation:
        image_index = grid.image_index[predictions.target_index]
        return color_relation(similarity, image_index, self.color_threshold, self.kernel_size, self.dilation)

    def _pair_sums(
        self, predictions: MaskPredictions, grid: GridTargets, relations: Sequence[PairRelation]
    ) -> tuple[Tensor, Tensor]:
        index = predictions.target_index  # (M,)
        regions = BoxRegions(grid.extents[index], grid.image_index[index], grid.valid)
        return pair_sums(predictions.logits, regions, relations, self.kernel_size, self.dilation)

    def _box_losses(
        self, predictions: MaskPredictions, grid: GridTargets, pair_sum: Tensor, pair_count: Tensor
    ) -> dict[str, Tensor]:
        boxes = grid.box_masks[predictions.target_index]  # (M, h, w)
        projection = projection_loss(predictions.logits, boxes)  # (M,)
        return {
            "loss_projection": projection.sum() / max(len(projection), 1),
            "loss_pairwise": color_pairwise_loss(pair_sum, pair_count) * self._warmup(self.warmup_steps),
        }

    def _warmup(self, steps: int) -> float:
        """Linear from nearly 0 to 1 over the given number of optimizer steps."""
        return min((self._counter.steps + 1) / max(steps, 1), 1.0)


class MaskSupervised(Supervision):
    """Masks from drawn masks: the fully supervised comparison, with the Dice loss on the mask grid.

    Targets without a mask teach boxes and classes only; the first batch that has boxes and no mask at all is
    logged as a warning.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self._warned = False

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        answer = super().forward(images, targets)
        if self.training and targets and not self._warned and _lacks_masks(targets):
            self._warned = True
            logger.warning(
                "no target of this batch has 'masks', so no mask is learnt from it: give drawn masks, or use "
                "BoxSupervised or BoxTeacher"
            )
        return answer

    def _prepare(self, images: list[Tensor], grid: GridTargets) -> None:
        return None

    def _mask_losses(
        self, predictions: MaskPredictions, grid: GridTargets, lessons: Any
    ) -> dict[str, Tensor]:
        drawn = grid.masks[predictions.target_index]  # (M, h, w)
        weight = grid.has_mask[predictions.target_index].float()  # (M,)
        return {"loss_mask": noise_aware_pixel_loss(predictions.logits, drawn, weight)}


def _lacks_masks(targets: Sequence[Target]) -> bool:
    """Whether there are boxes, and none of them came with a mask."""
    return any(len(target["boxes"]) for target in targets) and not any("masks" in t for t in targets)


def _mean(rounds: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = rounds[0] if rounds else ()
    return {name: torch.stack([losses[name] for losses in rounds]).mean() for name in names}
