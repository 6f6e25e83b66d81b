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
        iou_threshold: minimum IoU, in (0, 1].

    Returns:
        (K, T) in [0, 1].
    """
    iou = box_iou(candidate_boxes.float(), boxes.float())  # (K, T)
    same_image = candidate_image[:, None] == box_image
    return torch.where(same_image & (iou >= iou_threshold), iou, 0.0)


def assign_greedily(iou: Tensor, ranking_score: Tensor, max_boxes: int | None = None) -> Tensor:
    """Lets candidates, best first, each choose the box of highest IoU that is still free.

    This is the box-based assignment of BoxTeacher's Algorithm 1. In each iteration all candidates choose at
    once, among the boxes that no better candidate owns. The best candidate that can own a box owns it after
    the first iteration, the next best after the second, and so on: an image needs as many iterations as it
    has boxes, and none of them synchronizes with the device.

    Args:
        iou: (K, T) as `match_quality` returns it: 0 where the candidate cannot own the box.
        ranking_score: (K,); of equal candidates, the earlier chooses first.
        max_boxes: number of boxes of the image that has most; T if not given.

    Returns:
        (T,) int64: the candidate of each box, −1 for none.
    """
    candidates, boxes = iou.shape
    if candidates == 0 or boxes == 0:
        return torch.full((boxes,), -1, dtype=torch.int64, device=iou.device)
    order = ranking_score.argsort(descending=True, stable=True)  # (K,) best candidate first
    iou = iou[order]  # (K, T)
    rank = torch.arange(candidates, device=iou.device)  # (K,)
    owner = torch.full((boxes,), candidates, device=iou.device)  # (T,) rank of each box's owner; K for none
    for _ in range(min(candidates, boxes if max_boxes is None else max_boxes)):
        value, choice = torch.where(rank[:, None] <= owner, iou, 0.0).max(1)  # (K,) each
        owner = owner.scatter_reduce(0, choice, torch.where(value > 0, rank, candidates), "amin")
    return torch.cat([order, order.new_full((1,), -1)])[owner]
