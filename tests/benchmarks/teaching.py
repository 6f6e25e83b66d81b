"""The teacher's work beside its forward pass: assigning and decoding pseudo masks, and the EMA update."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import box_iou

from boxteacher import Candidates, EMATeacher, PseudoMasks
from boxteacher.ema import update_ema
from boxteacher.grid import mask_grid, upsample_aligned
from boxteacher.targets import GridTargets, grid_targets
from boxteacher_adapters.condinst import CondInst, DynamicMaskHead
from boxteacher_adapters.parts.backbones import build_backbone
from tests.benchmarks.measure import Row, alternate

_STRIDE, _FEATURE_STRIDE, _IMAGES = 4, 8, 2


def ema_row(repetitions: int) -> Row:
    """The EMA update (three streams of memory) over a copy (two)."""
    teacher = CondInst(build_backbone("resnet50", "none"), num_classes=80).requires_grad_(False)
    student = copy.deepcopy(teacher)
    pairs = [(ours, theirs) for ours, theirs in zip(tensors(teacher), tensors(student), strict=True)]
    parameters = sum(parameter.numel() for parameter in teacher.parameters())

    def update() -> None:
        update_ema(teacher, student, 0.999)

    def copy_() -> None:
        for ours, theirs in pairs:
            ours.copy_(theirs)

    name = f"EMA of {parameters / 1e6:.0f} M parameters over copying them"
    return alternate(name, update, copy_, 5 * repetitions, None, max_time=1.3)


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class Scripted(nn.Module):
    """A provider with ready candidates, so that only the core's work is measured."""

    mask_stride = _STRIDE
    size_divisor = 32

    def __init__(self, scene: "Scene") -> None:
        super().__init__()
        self.scene = (scene,)

    def __deepcopy__(self, memo: object) -> "Scripted":
        return Scripted(*self.scene)

    def forward_teacher(self, images: list[Tensor]) -> Candidates:
        (scene,) = self.scene
        labels = torch.zeros(len(scene.boxes), dtype=torch.int64)
        return Candidates(scene.boxes, scene.scores, labels, scene.image_index, scene.decode)

    def forward_student(self, images: list[Tensor], targets: object) -> None:
        raise NotImplementedError


class Scene:
    """Candidates with CondInst's dynamic filters, of which a third overlaps a box enough."""

    def __init__(self, height: int, width: int, candidates: int, boxes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = torch.tensor([width, height])
        corner = torch.rand(_IMAGES, boxes, 2, generator=generator) * 0.6 * size
        sides = (0.1 + 0.3 * torch.rand(_IMAGES, boxes, 2, generator=generator)) * size
        truth = torch.cat([corner, corner + sides], 2)  # (B, N, 4)
        near = torch.randint(boxes, (_IMAGES, candidates), generator=generator)
        moved = 0.3 * torch.randn(_IMAGES, candidates, 4, generator=generator)
        found = truth.gather(1, near[..., None].expand(-1, -1, 4))
        found = found + moved * (found[..., 2:] - found[..., :2]).repeat(1, 1, 2)
        self.images = [torch.zeros(3, height, width) for _ in range(_IMAGES)]
        self.targets = [{"boxes": each, "labels": torch.zeros(boxes, dtype=torch.int64)} for each in truth]
        self.mask_grid = mask_grid(self.images, _STRIDE, 32)
        self.grid: GridTargets = grid_targets(self.images, self.targets, self.mask_grid)
        self.boxes = found.flatten(0, 1)  # (K, 4)
        self.image_index = torch.arange(_IMAGES).repeat_interleave(candidates)  # (K,)
        self.scores = torch.rand(len(self.boxes), generator=generator)
        head = DynamicMaskHead(16, sizes=(64,), stride=_FEATURE_STRIDE)
        features = torch.randn(
            _IMAGES, 16, height // _FEATURE_STRIDE, width // _FEATURE_STRIDE, generator=generator
        )
        filters = 0.5 * torch.randn(len(self.boxes), head.num_params, generator=generator)
        centers = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        levels = torch.zeros(len(self.boxes), dtype=torch.int64)

        def decode(index: Tensor, *_: Tensor) -> Tensor:
            logits = head(features, filters[index], self.image_index[index], centers[index], levels[index])
            return upsample_aligned(logits, _FEATURE_STRIDE // _STRIDE)[:, 0]  # (M, h, w)

        self.decode: Callable[..., Tensor] = decode


def by_the_project(teacher: EMATeacher, scene: Scene) -> PseudoMasks:
    pseudo = teacher(scene.images, scene.targets, scene.mask_grid)
    return PseudoMasks(pseudo.masks * scene.grid.box_masks, pseudo.confidence)


def by_decoding_all(scene: Scene) -> PseudoMasks:
    """Decodes every candidate's mask at the image's size, then loops over masks and boxes."""
    count = len(scene.grid.boxes)
    decoded = scene.decode(torch.arange(len(scene.boxes))).sigmoid()  # (K, h, w)
    enlarged = upsample_aligned(decoded[:, None], _STRIDE)[:, 0]  # (K, H, W)
    quality = torch.stack([mask[mask > 0.5].mean() for mask in enlarged]).nan_to_num()
    on_grid = enlarged[:, _STRIDE // 2 :: _STRIDE, _STRIDE // 2 :: _STRIDE]
    masks = torch.zeros_like(scene.grid.box_masks)
    confidence = torch.zeros(count)
    ranking = (scene.scores * quality).sqrt()
    for k in ranking.argsort(descending=True, stable=True).tolist():
        best, owner = 0.0, None
        for t in range(count):
            if confidence[t] > 0 or scene.image_index[k] != scene.grid.image_index[t]:
                continue
            iou = float(box_iou(scene.boxes[k : k + 1], scene.grid.boxes[t : t + 1]))
            if iou >= 0.5 and iou > best:
                best, owner = iou, t
        if owner is not None:
            confidence[owner] = (scene.scores[k].sqrt() * quality[k]).sqrt()
            masks[owner] = (on_grid[k] > 0.5) & scene.grid.box_masks[owner]
    return PseudoMasks(masks, confidence)


def pseudo_mask_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    """Assignment, scoring and decoding for two images, with quality on the grid and on the image."""
    height, width, candidates, boxes = (160, 224, 20, 5) if quick else (800, 1216, 100, 20)
    scene = Scene(height, width, candidates, boxes)
    expected = by_decoding_all(scene)
    assert (expected.confidence > 0).sum() > boxes
    name = f"pseudo masks, {candidates} candidates × {boxes} boxes per image, {height} × {width}"
    for place, max_time in (("grid", None if quick else 1 / 20), ("image", None)):
        teacher = EMATeacher(Scripted(scene), quality_at=place)
        ours = by_the_project(teacher, scene)
        if place == "image":
            assert torch.equal(ours.masks, expected.masks)
            assert_close(ours.confidence, expected.confidence)
        else:  # quality is a mean over other points, so nearly equal candidates may swap places
            assert ((ours.confidence > 0) == (expected.confidence > 0)).all()
            assert_close(ours.confidence.mean(), expected.confidence.mean(), rtol=0.02, atol=0)
        yield alternate(
            f"{name}, quality on the {place}",
            partial(by_the_project, teacher, scene),
            partial(by_decoding_all, scene),
            repetitions,
            max_time=max_time,
        )


def teaching_rows(repetitions: int, quick: bool) -> Iterator[Row]:
    yield ema_row(repetitions)
    with torch.no_grad():
        yield from pseudo_mask_rows(repetitions, quick)
