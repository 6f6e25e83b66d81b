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


def assign_greedily(iou: Tensor, ranking_score: Tensor, most_boxes: int | None = None) -> Tensor:
    """Lets candidates, best first, each choose the box of highest IoU that is still free.

    This is the box-based assignment of BoxTeacher's Algorithm 1. In every round all candidates choose at
    once, among the boxes that no better candidate holds. The best candidate that will own a box holds it
    after the first round, the next best after the second, and so on: as many rounds as an image has boxes
    are enough, and nothing is asked of the device.

    Args:
        iou: (K, T) as `match_quality` returns it: 0 means that the candidate cannot have the box.
        ranking_score: (K,); of equals, the earlier candidate goes first.
        most_boxes: of one image; T if not given.

    Returns:
        (T,) int64: the candidate of each box, −1 for none.
    """
    candidates, boxes = iou.shape
    if candidates == 0 or boxes == 0:
        return torch.full((boxes,), -1, dtype=torch.int64, device=iou.device)
    order = ranking_score.argsort(descending=True, stable=True)  # (K,) best candidate first
    wish = iou[order]  # (K, T)
    place = torch.arange(candidates, device=iou.device)  # (K,)
    holder = torch.full((boxes,), candidates, device=iou.device)  # (T,) place of each box's; K for none
    for _ in range(min(candidates, boxes if most_boxes is None else most_boxes)):
        value, choice = torch.where(place[:, None] <= holder, wish, 0.0).max(1)  # (K,)
        holder = holder.scatter_reduce(0, choice, torch.where(value > 0, place, candidates), "amin")
    return torch.cat([order, order.new_full((1,), -1)])[holder]
