"""The mask losses against straightforward baselines: whole tensors and autograd."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from boxteacher.grid import NEIGHBOR_DILATION, mask_grid
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
from boxteacher.targets import GridTargets, color_similarity, grid_targets
from tests.benchmarks.measure import Row, alternate

_STRIDE, _DILATION, _COLOR, _AFFINITY = 4, NEIGHBOR_DILATION, 0.3, 0.5
_MEDIAN_SHARE = 0.08
_MAX_CELLS = 2**22  # masks × grid in the sweep: unfolding them takes 2 GiB


@dataclass
class Scene:
    """Masks of a batch of two images with the inputs of their losses."""

    logits: Tensor  # (M, h, w), with gradient
    grid: GridTargets
    similarity: Tensor  # (2, 8, h, w)
    pseudo_masks: Tensor  # (M, h, w) bool
    confidence: Tensor  # (M,)


def scene(masks: int, height: int, width: int, share: float | None = None) -> Scene:
    """Random logits on a grid, with boxes that each fill `share` of it, or of areas distributed like COCO's.

    Those areas are log-normal: median 8 % of the grid, and two thirds within a factor of e.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if share is None:
        spread = normal(masks)
        area = (_MEDIAN_SHARE * torch.exp(spread - spread.median())).clamp(max=1)  # (M,) of the grid's
    else:
        area = torch.full((masks,), share)
    aspect = torch.exp(0.4 * normal(masks)).clamp(area, 1 / area)
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1)  # (M, 2) of the grid's
    size = torch.tensor([width, height]) * _STRIDE
    corner = torch.rand(masks, 2, generator=generator) * (1 - sides) * size
    boxes = torch.cat([corner, corner + sides * size - 1], 1)
    patches = torch.rand(2, 3, height // 8, width // 8, generator=generator)
    images = F.interpolate(patches, (height * _STRIDE, width * _STRIDE))
    half = masks // 2
    targets = [
        {"boxes": some, "labels": torch.zeros(len(some), dtype=torch.int64)}
        for some in (boxes[:half], boxes[half:])
    ]
    geometry = mask_grid(list(images), _STRIDE, _STRIDE)
    grid = grid_targets(list(images), targets, geometry)
    blobs = F.interpolate(normal(masks, 1, height // 8, width // 8), (height, width), mode="bilinear")[:, 0]
    return Scene(
        logits=(2 * normal(masks, height, width)).requires_grad_(),
        grid=grid,
        similarity=color_similarity(list(images), grid.valid, geometry),
        pseudo_masks=(blobs > 0) & grid.box_masks,
        confidence=torch.rand(masks, generator=generator),
    )


Loss = Callable[[Scene], Tensor]


def pair_losses(color: bool, affinity: bool) -> tuple[Loss, Loss]:
    """The sum of the chosen losses: by the project's kernel, and by unfolding."""

    def kernel(scene: Scene) -> Tensor:
        grid = scene.grid
        regions = BoxRegions(grid.extents, grid.image_index, grid.valid)
        relations = []
        if color:
            relations.append(color_relation(scene.similarity, grid.image_index, _COLOR))
        if affinity:
            index = torch.arange(len(scene.logits))
            relations.append(affinity_relation(scene.pseudo_masks, index, _AFFINITY))
        sums, counts = pair_sums(scene.logits, regions, relations)
        total = sums.new_zeros(())
        if color:
            total = total + color_pairwise_loss(sums[0], counts[0])
        if affinity:
            total = total + noise_reduced_affinity_loss(sums[-1], counts[-1], scene.confidence)
        return total

    def unfolded(scene: Scene) -> Tensor:
        term = -log_probability_of_same(scene.logits)  # (M, 8, h, w)
        inside = scene.grid.box_masks[:, None]
        total = term.new_zeros(())
        if color:
            weight = (scene.similarity[scene.grid.image_index] >= _COLOR) & inside  # (M, 8, h, w)
            total = total + (term * weight).sum() / weight.sum().clamp(min=1)
        if affinity:
            weight = (unfolded_affinity(scene) >= _AFFINITY) & inside  # (M, 8, h, w)
            per_mask = (term * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
            total = total + (per_mask * scene.confidence).sum() / (scene.confidence > 0).sum().clamp(min=1)
        return total

    return kernel, unfolded


def neighbors(maps: Tensor) -> Tensor:
    """The eight neighbors (M, 8, h, w) of each cell of maps (M, h, w); 0 outside."""
    unfolded = F.unfold(maps[:, None], 3, dilation=_DILATION, padding=_DILATION).unflatten(2, maps.shape[1:])
    return torch.cat([unfolded[:, :4], unfolded[:, 5:]], 1)


def log_probability_of_same(logits: Tensor) -> Tensor:
    """(M, 8, h, w) of logits (M, h, w), as BoxInst writes it (CVPR 2021, Eq. 4)."""
    log_foreground, log_background = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_foreground = log_foreground[:, None] + neighbors(log_foreground)
    both_background = log_background[:, None] + neighbors(log_background)
    greater = torch.maximum(both_foreground, both_background)
    sum_of_exps = torch.exp(both_foreground - greater) + torch.exp(both_background - greater)
    return sum_of_exps.log() + greater


def unfolded_affinity(scene: Scene) -> Tensor:
    """(M, 8, h, w) of the pseudo masks; 0 where the neighbor is not valid."""
    masks = scene.pseudo_masks.float()
    smooth = (masks + F.avg_pool2d(masks[:, None], 3, stride=1, padding=1)[:, 0]) / 2  # (M, h, w)
    near = neighbors(smooth)
    valid = neighbors(scene.grid.valid.float())[scene.grid.image_index]
    return (smooth[:, None] * near + (1 - smooth[:, None]) * (1 - near)) * valid


def projection(scene: Scene) -> Tensor:
    return projection_loss(scene.logits, scene.grid.box_masks).mean()


def baseline_projection(scene: Scene) -> Tensor:
    masks, boxes = scene.logits.sigmoid(), scene.grid.box_masks.float()
    return sum(baseline_dice(masks.amax(axis), boxes.amax(axis)) for axis in (1, 2)).mean()


def pixel(scene: Scene) -> Tensor:
    return noise_aware_pixel_loss(scene.logits, scene.pseudo_masks, scene.confidence)


def baseline_pixel(scene: Scene) -> Tensor:
    per_mask = baseline_dice(scene.logits.sigmoid().flatten(1), scene.pseudo_masks.float().flatten(1))
    return (per_mask * scene.confidence).sum() / (scene.confidence > 0).sum()


def baseline_dice(p: Tensor, q: Tensor) -> Tensor:
    return 1 - 2 * (p * q).sum(1) / ((p**2).sum(1) + (q**2).sum(1) + 1e-5)


def gradient_of(loss: Loss, scene: Scene) -> Callable[[], Tensor]:
    """Forward and backward pass, which returns the gradient (M, h, w)."""

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(scene), scene.logits)
        return gradient

    return run


def compared(name: str, losses: tuple[Loss, Loss], scene: Scene, repetitions: int, **more: object) -> Row:
    """A row of forward and backward passes, after a check that values and gradients are equal."""
    ours, baseline = losses
    with torch.no_grad():
        assert_close(ours(scene), baseline(scene), rtol=1e-4, atol=1e-6)
    run, run_baseline = gradient_of(ours, scene), gradient_of(baseline, scene)
    expected = run_baseline()
    assert_close(run(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    return alternate(name, run, run_baseline, repetitions, **more)


def loss_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    """Each loss at one size, and the pair losses with boxes that fill the grid."""
    masks, height, width = (16, 80, 80) if quick else (128, 200, 304)
    coco = scene(masks, height, width)
    size = f"{masks} masks on {height} × {width}"
    limits = {} if quick else {"max_time": 1 / 15, "max_memory": 1 / 12}
    both = pair_losses(True, True)
    yield compared(f"both pair losses, {size}, COCO-like boxes", both, coco, repetitions, **limits)
    yield compared(f"color-pairwise, {size}", pair_losses(True, False), coco, repetitions)
    yield compared(f"affinity, {size}", pair_losses(False, True), coco, repetitions)
    yield compared(f"projection, {size}", (projection, baseline_projection), coco, repetitions)
    yield compared(f"pixel, {size}", (pixel, baseline_pixel), coco, repetitions)
    limits = {} if quick else {"max_time": 1.0, "max_memory": 0.5}
    filled = scene(masks, height, width, share=1.0)
    name = f"both pair losses, {size}, boxes that fill the grid"
    yield compared(name, both, filled, repetitions, **limits)


def sweep_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    """The cost of the pair losses over the number of masks, the grid and the area of boxes."""
    both = pair_losses(True, True)
    for side in (80,) if quick else (80, 128, 256):
        for masks in (1, 8) if quick else (1, 8, 32, 128, 512):
            if masks * side**2 > _MAX_CELLS:
                continue
            name = f"both pair losses, {masks} masks on {side} × {side}, COCO-like boxes"
            point = {"masks": masks, "side": side}
            yield compared(name, both, scene(masks, side, side), repetitions, point=point)
    for share in (0.1, 1.0) if quick else (0.01, 0.04, 0.16, 0.36, 0.64, 1.0):
        masks, side = (8, 80) if quick else (64, 128)
        name = f"both pair losses, {masks} masks on {side} × {side}, boxes of {share:.0%}"
        yield compared(name, both, scene(masks, side, side, share), repetitions, point={"share": share})
