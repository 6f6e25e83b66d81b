"""What a misplaced box or mask looks like, so that the error can say where to look."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from boxteacher.testing.findings import Subject
from boxteacher.testing.measure import (
    Batch,
    Found,
    centers,
    median_offset,
    student_masks,
    with_swapped_boxes,
)

Find = Callable[[Subject, Sequence[Batch]], Found]

_PLACES = (
    (0.3, 0.75),
    (0.75, 0.3),
    (0.45, 0.6),
    (0.7, 0.7),
)  # row and column of cells, in parts of the image
_IN_PLACE = (
    "the place is right, so check that target_index names the target of each mask, that targets' boxes are "
    "read as x0, y0, x1, y1, and that the right features and parameters are used"
)
_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    _IN_PLACE: lambda due: due,
    "rows and columns are swapped; return logits (M, h, w), rows first": lambda due: due.flip(1),
    "the grid is enlarged twice too much; check mask_stride, and the stride of the features": (
        lambda due: due / 2
    ),
    "the grid is enlarged half as much as is due; check mask_stride, and the stride of the features": (
        lambda due: due * 2
    ),
}
_SWAPPED = "x and y are swapped: read targets' boxes, and return boxes, as x0, y0, x1, y1"


def explain_boxes(subject: Subject, batches: Sequence[Batch], find: Find) -> str:
    """An example of a box in the wrong place, and what to check."""
    found = find(subject, batches)
    offset = found.boxes.new_tensor(median_offset(found.box_offset))  # (2,) y, x
    back = found.boxes - offset.flip(0).repeat(2)  # (T, 4)
    if bool(box_iou(back, found.known).diagonal().nanmean() > max(0.6, 1.2 * found.box_overlap.mean())):
        y, x = offset.tolist()
        return (
            f"they are off by ({y:+.1f}, {x:+.1f}) pixels (y, x): boxes are in pixels of the image as it was "
            "given, and the middle of a cell is not its corner"
        )
    worst = int(found.box_overlap.argmin())
    known, nearest = (
        [round(v) for v in box[worst].nan_to_num().tolist()] for box in (found.known, found.boxes)
    )
    guess = f"; {_SWAPPED}" if _is_swapped(subject, batches, find) else ""
    return (
        f"nearest to {known} is {nearest}{guess}: boxes are x0, y0, x1, y1 in pixels of the image as it was "
        "given; undo any resizing, and check the order of coordinates"
    )


def explain_masks(subject: Subject, batches: Sequence[Batch]) -> str:
    """What a student's masks tell: their values, those with boxes swapped, the pixels that they answer to."""
    subject = subject.twin(training=True)
    images, targets = batches[0]
    image = images[0].clone().requires_grad_()
    masks = subject.provider.forward_student([image, *images[1:]], targets).masks[-1]
    if bool(((masks.logits >= 0) & (masks.logits <= 1)).all()):
        return (
            "all mask logits lie in [0, 1]: return logits, not the probabilities that a sigmoid makes of them"
        )
    right, swapped = (student_masks(subject, batches, swapped=each).overlap.mean() for each in (False, True))
    if bool(swapped > 1.1 * right) and bool(swapped > 0.4):
        return f"told y0, x0, y1, x1 it does better, so {_SWAPPED}"
    return _explain_grid(subject, masks.logits[masks.target_index == 0].float().mean(0), image)


def _is_swapped(subject: Subject, batches: Sequence[Batch], find: Find) -> bool:
    """Whether boxes lie better on the known ones with x and y swapped."""
    swapped = [(images, [with_swapped_boxes(target) for target in targets]) for images, targets in batches]
    overlap, other = (find(subject, each).box_overlap.mean() for each in (batches, swapped))
    return bool(other > 1.2 * overlap)


def _explain_grid(subject: Subject, logits: Tensor, image: Tensor) -> str:
    """Which pixels of image (3, H, W) the cells of mask logits (h, w) answer to, and what that says."""
    stride = subject.provider.mask_stride
    height, width = image.shape[-2:]
    cells = [(int(y * height) // stride, int(x * width) // stride) for y, x in _PLACES]
    pulls = [
        torch.autograd.grad(_contrast(logits, *cell), image, retain_graph=True)[0].square().sum(0)
        for cell in cells
    ]
    found = centers(torch.stack(pulls)).nan_to_num().cpu()  # (P, 2) y, x
    due = torch.tensor(cells) * float(stride) + stride // 2  # (P, 2) y, x
    (y, x), (due_y, due_x) = found[0].round().int().tolist(), due[0].int().tolist()
    return (
        f"the logit of grid cell {cells[0]} depends most on the pixels round ({y}, {x}) (row, column), due "
        f"is ({due_y}, {due_x}): {_guess(found, due, stride)}"
    )


def _contrast(logits: Tensor, row: int, column: int) -> Tensor:
    """A cell's logit above its surroundings', which depends less on what steers all of the mask."""
    top, left = max(row - 4, 0), max(column - 4, 0)
    return logits[row, column] - logits[top : row + 5, left : column + 5].mean()


def _guess(found: Tensor, due: Tensor, stride: int) -> str:
    """What turns centres (P, 2) that are due into those that were found."""
    misfits = {name: float((found - guess(due)).abs().mean()) for name, guess in _GRIDS.items()}
    shift = (found - due).mean(0)  # (2,)
    if float(shift.abs().max()) > 2 * stride:
        y, x = shift.tolist()
        shifted = (
            f"the grid is off by ({y:+.0f}, {x:+.0f}) pixels (y, x); pad images at the right and bottom "
            "only, and check the cells' coordinates"
        )
        # A shift fits whatever it is fitted to, so it must fit clearly better.
        misfits[shifted] = 1.5 * float((found - due - shift).abs().mean())
    return min(misfits, key=misfits.__getitem__)
