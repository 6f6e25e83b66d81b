"""What `forward_student`, `forward_teacher` and the evaluation call return, and that nothing else changes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boxteacher.errors import ProtocolError
from boxteacher.grid import MaskGrid, mask_grid
from boxteacher.protocol import Candidates, StudentOutput, Target
from boxteacher.targets import flat_targets
from boxteacher.testing.findings import Subject, finding, require
from boxteacher.testing.scenes import OBLONG, Batch, known_boxes

_OWN_SHARE = 0.1  # of the strongest image's gradient; a mask of another image has exactly 0
_NOT_REPEATED = "of two calls in evaluation mode differ: switch dropout off there, and keep no state"


def check_student(subject: Subject) -> None:
    """Checks what `forward_student` returns for odd and mixed image sizes, and that it changes no input."""
    model = subject.model
    images, targets = known_boxes(subject, seed=1, sizes=OBLONG)
    given_images, given_targets = copy.deepcopy((images, targets))
    with finding(model, "forward_student"):
        output = subject.copy(training=True).provider.forward_student(given_images, given_targets)
        _check_student_output(subject, output, (images, targets))
    with finding(model, "inputs that must stay as they are"):
        _check_unchanged(given_images, images)
        for i, (given, target) in enumerate(zip(given_targets, targets, strict=True)):
            same = all(torch.equal(given[key], target[key]) for key in ("boxes", "labels", "masks"))
            require(same, f"target {i} was changed in place: work on a copy of it")
    with finding(model, "the image of each mask"):
        _check_images_of_masks(subject, images, targets)
    with finding(model, "determinism"):
        ours, theirs = (subject.copy(training=True).provider.forward_student for _ in range(2))
        subject.require_same(
            student_answers(ours, images, targets),
            student_answers(theirs, images, targets),
            "differs between two calls with the same torch.manual_seed: take random numbers from torch's own "
            "generator, and keep no state between calls",
        )


@torch.no_grad()
def check_candidates(subject: Subject) -> None:
    """Checks what `forward_teacher` returns, its masks in any order, and that images do not mix."""
    subject = subject.copy(training=False)
    model, provider = subject.model, subject.provider
    images, _ = known_boxes(subject, seed=2)
    given, before = copy.deepcopy(images), _state(model)
    with finding(model, "forward_teacher"):
        candidates = provider.forward_teacher(given)
        kind = type(candidates).__name__
        require(isinstance(candidates, Candidates), f"it returned a {kind}: return Candidates")
        _check_entries(subject, vars(candidates), images)
        _check_unchanged(given, images)
    with finding(model, "a teacher that stays as it is"):
        changed = [n for n, v in _state(model).items() if n not in before or not torch.equal(v, before[n])]
        require(
            not changed,
            f"forward_teacher made or changed {', '.join(changed[:3])}: make parameters and buffers in "
            "__init__, keep batch statistics as they are in evaluation mode, leave train() and eval() alone",
        )
    with finding(model, "decode_masks"):
        _check_decoding(subject, candidates, images)
    with finding(model, "determinism of forward_teacher"):
        again = provider.forward_teacher(images)
        subject.require_same(candidate_answers(again), candidate_answers(candidates), _NOT_REPEATED)
    with finding(model, "candidates of one image at a time"):
        others = provider.forward_teacher([1 - images[0], *images[1:]])
        subject.require_same(
            candidate_answers(others, image=1),
            candidate_answers(candidates, image=1),
            "of image 1 change with the pixels of image 0: image_index must say which image each candidate "
            "was found in, decode_masks must read that image's features, and nothing may be selected over "
            "the whole batch",
        )


@torch.no_grad()
def check_detections(subject: Subject) -> None:
    """Checks that `model(images)` in evaluation mode returns torchvision's detections, twice the same."""
    model = subject.copy(training=False).model
    images, _ = known_boxes(subject, seed=3)
    with finding(model, "detections in evaluation mode"):
        first = model(images)
        require_detections(subject, first, images)
        for ours, theirs in zip(model(images), first, strict=True):
            subject.require_same(ours, theirs, _NOT_REPEATED)


def student_answers(run: Any, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    """The losses of a `forward_student`, and each decoder layer's mean mask logit, from a fixed seed."""
    torch.manual_seed(7)
    output = run(copy.deepcopy(images), copy.deepcopy(targets))
    logits = {f"the mean mask logit of layer {i}": m.logits.mean() for i, m in enumerate(output.masks)}
    return {**output.losses, **logits}


def candidate_answers(candidates: Candidates, *, image: int | None = None) -> dict[str, Tensor]:
    """Boxes, scores and mask logits of all candidates, or of those of one image."""
    wanted = torch.ones_like(candidates.scores) > 0 if image is None else candidates.image_index == image
    mine = wanted.nonzero()[:, 0]
    masks = candidates.own_masks(mine)
    return {"boxes": candidates.boxes[mine], "scores": candidates.scores[mine], "masks of candidates": masks}


def require_detections(subject: Subject, detections: object, images: Sequence[Tensor]) -> None:
    """Raises ProtocolError unless they are torchvision's: a dict per image, with finite tensors in range."""
    if not isinstance(detections, list) or len(detections) != len(images):
        raise ProtocolError(
            f"model(images) returned a {type(detections).__name__}: return a list, one dict per image"
        )
    for i, (found, image) in enumerate(zip(detections, images, strict=True)):
        missing = {"boxes", "scores", "labels", "masks"} - set(found)
        require(not missing, f"detections of image {i} lack {', '.join(sorted(missing))}: add them")
        count = len(found["scores"])
        index = torch.zeros(count, dtype=torch.int64, device=subject.device)
        _check_entries(subject, {**found, "image_index": index}, [image])
        shape, remedy = (count, 1, *image.shape[-2:]), "return probabilities: apply the sigmoid to logits"
        subject.require_tensor(f"masks of image {i}", found["masks"], shape, "float", (0, 1), remedy)


def decode(subject: Subject, candidates: Candidates, grid: MaskGrid, *wanted: Tensor) -> Tensor:
    """Mask logits (M, h, w) of wanted candidates (M,), boxes (M, 4) and labels (M,), checked to be such."""
    name = f"decode_masks of {len(wanted[0])} of {len(candidates.scores)} candidates"
    masks = candidates.decode_masks(*wanted)
    return subject.require_tensor(name, masks, (len(wanted[0]), *grid.shape), "float")


def _check_student_output(subject: Subject, output: StudentOutput, batch: Batch) -> None:
    kind = type(output).__name__
    require(isinstance(output, StudentOutput), f"it returned a {kind}: return a StudentOutput")
    for name, loss in output.losses.items():
        subject.require_tensor(f"the loss {name}", loss, (), "float")
        require(loss.requires_grad, f"the loss {name} has no gradient: do not detach it")
    require(len(output.masks) > 0, "masks is empty: return a MaskPredictions, if need be without a sample")
    grid = mask_grid(batch[0], subject.provider.mask_stride, subject.provider.size_divisor)
    total = sum(len(target["boxes"]) for target in batch[1])
    for masks in output.masks:
        count = len(masks.target_index)
        index = subject.require_tensor("target_index", masks.target_index, (count,), "int64")
        named, shape = sorted({*index.tolist()}), (count, *grid.shape)
        require(
            named == [*range(total)],
            f"target_index names {named} of {total} targets: index all targets of the batch laid end to end "
            "(add the number of boxes in the images before), without background, and give every box a "
            "positive sample",
        )
        require(
            masks.logits.shape == shape,
            f"mask logits have shape {tuple(masks.logits.shape)} where {shape} is expected: one map per "
            f"sample, rows before columns, on the grid of the padded batch {grid.padded_size} at mask_stride "
            f"{grid.stride}; pad images with boxteacher.adapter.pad_images(images, size_divisor)",
        )
        subject.require_tensor("mask logits", masks.logits, shape, "float")
        weight = torch.as_tensor(masks.weight)
        sound = weight.shape in ((), (count,)) and bool((weight > 0).all() and weight.isfinite().all())
        require(sound, f"weight is {masks.weight}: give one number above 0, or one for each of {count} masks")
        require(masks.logits.requires_grad, "mask logits have no gradient: do not detach or threshold them")


def _check_images_of_masks(subject: Subject, images: list[Tensor], targets: list[Target]) -> None:
    """Checks that a mask depends on the pixels of its own target's image.

    Only what is clear counts: layers that mix a batch's images may let a sound mask depend on others too.
    """
    subject = subject.copy(training=True)
    for module in subject.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # a batch's statistics mix its images
    images = [image.clone().requires_grad_() for image in images]
    output = subject.provider.forward_student([image.clone() for image in images], targets)
    _, _, image_index = flat_targets(targets)  # (T,)
    for masks in output.masks:
        for i in range(len(images)):
            mine = masks.logits[image_index[masks.target_index] == i].float().square().sum()
            gradients = torch.autograd.grad(mine, images, retain_graph=True, allow_unused=True)
            norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
            strongest = max(range(len(norms)), key=lambda k: norms[k])
            require(
                not norms[i] < _OWN_SHARE * norms[strongest],  # which NaN is not
                f"masks whose target_index says image {i} depend mainly on the pixels of image {strongest}: "
                "target_index counts the targets of image 0 first, then those of image 1, …; bring it into "
                "that order",
            )


def _check_unchanged(given: list[Tensor], images: list[Tensor]) -> None:
    for i, (image, before) in enumerate(zip(given, images, strict=True)):
        require(torch.equal(image, before), f"image {i} was changed in place: normalize a copy of it")


def _check_entries(subject: Subject, found: Mapping[str, Any], images: Sequence[Tensor]) -> None:
    """Checks all but masks: tensors in range, the boxes inside their images."""
    shape = (len(found["scores"]),)
    remedy = "return probabilities: apply the sigmoid or softmax to logits"
    subject.require_tensor("scores", found["scores"], shape, "float", (0, 1), remedy)
    classes, remedy = (0, subject.num_classes - 1), "labels are 0 to C−1 without background: shift or omit it"
    subject.require_tensor("labels", found["labels"], shape, "int64", classes, remedy)
    batch, remedy = (0, len(images) - 1), "it is the image's position in the batch"
    index = subject.require_tensor("image_index", found["image_index"], shape, "int64", batch, remedy)
    boxes = subject.require_tensor("boxes", found["boxes"], (*shape, 4), "float")
    sizes = torch.tensor([image.shape[:0:-1] * 2 for image in images], device=boxes.device)[index]  # (K, 4)
    beyond = torch.cat([boxes - sizes, -boxes], 1) > 1  # (K, 8), as a resize may round by one pixel
    wrong = boxes[beyond.any(1) | (boxes[:, :2] > boxes[:, 2:]).any(1)]
    require(
        not len(wrong),
        f"box {wrong[:1].int().tolist()} is not inside its image: boxes are x0, y0, x1, y1 in pixels of the "
        "image as it was given; map them back and clip them",
    )


def _check_decoding(subject: Subject, found: Candidates, images: Sequence[Tensor]) -> None:
    grid = mask_grid(images, subject.provider.mask_stride, subject.provider.size_divisor)
    every = torch.arange(len(found.scores), device=subject.device)
    full = decode(subject, found, grid, every, found.boxes, found.labels)
    for indices in (every.flip(0), every[len(every) // 2 :: 2], every[:0]):
        masks = decode(subject, found, grid, indices, found.boxes[indices], found.labels[indices])
        subject.require_same(
            {"masks": masks},
            {"masks": full[indices]},
            f"of {len(indices)} of {len(every)} candidates differ from those that decoding all gives: return "
            "the mask of each index, in the order of the indices",
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers, and each module's mode."""
    modes = {f"{name}.training": torch.tensor(module.training) for name, module in model.named_modules()}
    tensors = (*model.named_parameters(), *model.named_buffers())
    return modes | {name: tensor.detach().clone() for name, tensor in tensors}
