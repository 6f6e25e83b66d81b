"""Which candidate mask belongs to which ground-truth box."""

import torch
from torch import Tensor
from torchvision.ops import box_iou


def match_quality(
    candidate_boxes: Tensor,
    candidate_image: Tensor,
    boxes: Tensor,
    box_image: Tensor,
    iou_threshold: float,
) -> Tensor:
    """IoU of each candidate with each box of its image; 0 where it is below the threshold.

    Args:
        candidate_boxes: (K, 4).
        candidate_image: (K,) int64.
        boxes: (T, 4).
        box_image: (T,) int64.
        iou_threshold: least IoU, in (0, 1].

    Returns:
        (K, T) in [0, 1].
    """
    iou = box_iou(candidate_boxes.float(), boxes.float())  # (K, T)
    same_image = candidate_image[:, None] == box_image
    return torch.where(same_image & (iou >= iou_threshold), iou, 0.0)


def assign_greedily(iou: Tensor, ranking_score: Tensor) -> Tensor:
    """Lets candidates, best first, each choose the box of highest IoU that is still free.

    This is the box-based assignment of BoxTeacher's Algorithm 1. All candidates choose at once: a box keeps
    its best suitor, those turned down choose again among the boxes that never turned them down, until
    nobody is turned down. As every box ranks the candidates alike, there is just one stable matching, and
    the one-by-one choice gives the same.

    Args:
        iou: (K, T) as `match_quality` returns it: 0 means that the candidate cannot have the box.
        ranking_score: (K,); of equals, the earlier candidate goes first.

    Returns:
        (T,) int64: the candidate of each box, −1 for none.
    """
    candidates, boxes = iou.shape
    unassigned = torch.full((boxes,), -1, dtype=torch.int64, device=iou.device)
    if candidates == 0 or boxes == 0:
        return unassigned
    order = ranking_score.argsort(descending=True, stable=True)  # (K,) best candidate first
    wish = iou[order]  # (K, T)
    place = torch.arange(candidates, device=iou.device)  # (K,)
    while True:
        value, choice = wish.max(1)  # (K,)
        suitor = torch.where(value > 0, place, candidates)
        best = torch.full((boxes,), candidates, dtype=torch.int64, device=iou.device)
        best = best.scatter_reduce(0, choice, suitor, "amin")  # (T,) place of each box's best suitor
        turned_down = (value > 0) & (best[choice] != place)
        # The loop's length depends on the data, so this waits for the device.
        if not turned_down.any():
            break
        wish = wish.scatter(1, choice[:, None], torch.where(turned_down, 0.0, value)[:, None])
    return torch.where(best < candidates, order[best.clamp(max=candidates - 1)], unassigned)
