"""`forward_teacher` and the evaluation call: types, ranges, and that looking changes nothing."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boxteacher.errors import ProtocolError
from boxteacher.protocol import Candidates
from boxteacher.testing.findings import Subject, finding, require, require_tensor, require_within
from boxteacher.testing.measure import decoded
from boxteacher.testing.scenes import known_boxes

_BOX_KEYS = ("boxes", "scores", "labels", "masks")


def check_candidates(subject: Subject) -> None:
    """Checks what `forward_teacher` returns, its masks in any order, and that images do not mix."""
    subject = subject.twin(training=False)
    model = subject.model
    images, _ = known_boxes(subject.num_classes, subject.device, seed=2)
    before, modes = _snapshot(model), [module.training for module in model.modules()]
    given = copy.deepcopy(images)
    with finding(model, "forward_teacher"), torch.no_grad():
        candidates = subject.provider.forward_teacher(images)
        _check_output(subject, candidates, images)
        for i, (now, earlier) in enumerate(zip(images, given, strict=True)):
            require(torch.equal(now, earlier), f"image {i} was changed in place: normalise a copy of it")
    with finding(model, "a teacher that stays as it is"), torch.no_grad():
        _check_state(before, _snapshot(model))
        require(
            modes == [module.training for module in model.modules()],
            "forward_teacher changed modules between training and evaluation mode: leave train() and eval() "
            "alone",
        )
    with finding(model, "decode_masks"), torch.no_grad():
        _check_decoding(subject, candidates, images)
    with finding(model, "determinism of forward_teacher"), torch.no_grad():
        again = subject.provider.forward_teacher(images)
        for i in range(len(images)):
            _check_same(subject, _of_image(again, i), _of_image(candidates, i), ("boxes", "scores", "masks"))
    with finding(model, "candidates of one image at a time"), torch.no_grad():
        _check_images_apart(subject, candidates, images)


def check_detections(subject: Subject) -> None:
    """Checks that `model(images)` in evaluation mode returns torchvision's detections, twice the same."""
    model = copy.deepcopy(subject.model).eval()
    images, _ = known_boxes(subject.num_classes, subject.device, seed=3)
    with finding(model, "detections in evaluation mode"), torch.no_grad():
        first = model(images)
        require_detections(subject, first, images)
    with finding(model, "determinism of detections"), torch.no_grad():
        for ours, theirs in zip(model(images), first, strict=True):
            _check_same(
                subject, [ours[key] for key in _BOX_KEYS], [theirs[key] for key in _BOX_KEYS], _BOX_KEYS
            )


def require_detections(subject: Subject, detections: object, images: Sequence[Tensor]) -> None:
    """Raises ProtocolError unless they are torchvision's: a dict per image, with finite tensors in range."""
    if not isinstance(detections, list) or len(detections) != len(images):
        raise ProtocolError(
            f"model(images) returned a {type(detections).__name__}: return a list, one dict per image"
        )
    device = subject.device
    for i, (found, image) in enumerate(zip(detections, images, strict=True)):
        missing = set(_BOX_KEYS) - set(found)
        require(not missing, f"detections of image {i} lack {', '.join(sorted(missing))}: add them")
        height, width = image.shape[-2:]
        count = len(found["scores"])
        name = f"of image {i}"
        boxes = require_tensor(f"boxes {name}", found["boxes"], (count, 4), "float", device)
        scores = require_tensor(f"scores {name}", found["scores"], (count,), "float", device)
        labels = require_tensor(f"labels {name}", found["labels"], (count,), "int64", device)
        masks = require_tensor(f"masks {name}", found["masks"], (count, 1, height, width), "float", device)
        _check_ranges(subject, boxes, scores, labels, torch.full_like(labels, i), images)
        require_within(f"masks {name}", masks, 0, 1, "return probabilities: apply the sigmoid to logits")


def _check_output(subject: Subject, candidates: Candidates, images: Sequence[Tensor]) -> None:
    require(
        isinstance(candidates, Candidates),
        f"it returned a {type(candidates).__name__}: return boxteacher.Candidates(...)",
    )
    count, device = len(candidates.scores), subject.device
    require_tensor("boxes", candidates.boxes, (count, 4), "float", device)
    require_tensor("scores", candidates.scores, (count,), "float", device)
    require_tensor("labels", candidates.labels, (count,), "int64", device)
    require_tensor("image_index", candidates.image_index, (count,), "int64", device)
    require_within(
        "image_index", candidates.image_index, 0, len(images) - 1, "it is the image's position in the batch"
    )
    _check_ranges(
        subject, candidates.boxes, candidates.scores, candidates.labels, candidates.image_index, images
    )
    with_gradient = [name for name in ("boxes", "scores") if getattr(candidates, name).requires_grad]
    require(
        not with_gradient,
        f"{with_gradient} carry a gradient though it is called under torch.no_grad: keep it so",
    )


def _check_ranges(
    subject: Subject,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_index: Tensor,
    images: Sequence[Tensor],
) -> None:
    require_within("scores", scores, 0, 1, "return probabilities: apply the sigmoid or softmax to logits")
    most = subject.num_classes - 1
    require_within("labels", labels, 0, most, "labels are 0 to C−1 without background: shift or leave it out")
    sizes = torch.tensor([[*image.shape[:0:-1]] * 2 for image in images], device=boxes.device)  # (B, 4)
    remedy = "boxes are x0, y0, x1, y1 in pixels of the image as it was given: map them back and clip them"
    # A pixel's slack for rounding in a resize that is mapped back.
    parts = ((boxes - 1) / sizes[image_index]).clamp(min=0)  # (K, 4)
    require_within("boxes over the image's size", parts, 0, 1, remedy)
    require_within("x0 and y0 of boxes", boxes[:, :2], -1, float(sizes.max()) + 1, remedy)
    require_within(
        "x1 − x0 and y1 − y0 of boxes", boxes[:, 2:] - boxes[:, :2], 0, float(sizes.max()) + 1, remedy
    )


def _check_decoding(subject: Subject, candidates: Candidates, images: Sequence[Tensor]) -> None:
    count = len(candidates.scores)
    every = torch.arange(count, device=subject.device)
    for indices in (every, every.flip(0), every[count // 2 :: 2], every[:0]):
        boxes, labels = candidates.boxes[indices], candidates.labels[indices]
        masks = decoded(subject, candidates, indices, boxes, labels, images)
        require(
            not masks.requires_grad, "masks carry a gradient though decoded under torch.no_grad: keep it so"
        )
        if indices is every:
            full = masks
        require(
            not subject.differ(masks, full[indices]),
            f"decode_masks of {len(indices)} of {count} candidates, {indices[:4].tolist()} …, gives other "
            "masks than decoding them all does: decode_masks(indices, boxes, labels) returns the mask of "
            "each index, in the order of the indices",
        )


def _check_images_apart(subject: Subject, candidates: Candidates, images: Sequence[Tensor]) -> None:
    """Other pixels in image 0 leave the candidates of image 1 as they are."""
    others = subject.provider.forward_teacher([1 - images[0], *images[1:]])
    ours, theirs = (_of_image(each, 1) for each in (candidates, others))
    for name, one, other in zip(("boxes", "scores", "masks"), ours, theirs, strict=True):
        require(
            not subject.differ(other, one),
            f"{name} of image 1's candidates change with the pixels of image 0: image_index must say which "
            "image each candidate was found in, decode_masks must read that image's features, and nothing "
            "may be selected over the whole batch",
        )


def _check_same(
    subject: Subject, ours: Sequence[Tensor], theirs: Sequence[Tensor], names: Sequence[str]
) -> None:
    for name, one, other in zip(names, ours, theirs, strict=True):
        require(
            not subject.differ(one, other),
            f"{name} of two calls in evaluation mode differ: switch dropout and other randomness off when "
            "self.training is False, and keep no state between calls",
        )


def _check_state(before: dict[str, object], after: dict[str, object]) -> None:
    made = sorted(after.keys() - before.keys())
    require(
        not made, f"the first call made {', '.join(made[:3])}: make all parameters and buffers in __init__"
    )
    changed = sorted(name for name, value in after.items() if not _same(value, before[name]))
    require(
        not changed,
        f"forward_teacher changed {', '.join(changed[:3])}: keep batch statistics and counters as they are "
        "in evaluation mode",
    )


def _of_image(candidates: Candidates, image: int) -> tuple[Tensor, Tensor, Tensor]:
    mine = (candidates.image_index == image).nonzero()[:, 0]
    return candidates.boxes[mine], candidates.scores[mine], candidates.own_masks(mine)


def _snapshot(model: nn.Module) -> dict[str, object]:
    return copy.deepcopy(model.state_dict())


def _same(value: object, other: object) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return value is other or value == other
