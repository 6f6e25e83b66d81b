"""Where a query's mask is likely to lie, before it has looked at the image's cells."""

import torch
from torch import Tensor, nn

_STRENGTH = 4.0
_FIRST_EXTENT = 0.3


class SpatialPrior(nn.Module):
    """An ellipse per query, moved away from an anchor that is the query's own.

    Boxes alone do not tell an object from its outline: both cast the same shadow, and cells on an edge have
    no neighbor of like colour that the pairwise loss could hold them to. From features alone, whose
    strongest responses at first are edges, short training ended in outlines. Added to the mask logits, an
    ellipse makes masks begin as solid discs apart from one another, which the losses then carve.

    Anchors are those of DAB-DETR (ICLR 2022); a logit that falls with the squared distance from a predicted
    centre is SMCA's (ICCV 2021), which adds it to attention.

    Args:
        channels: of the queries.
        num_queries: Q.
    """

    def __init__(self, channels: int, num_queries: int) -> None:
        super().__init__()
        evenly = torch.quasirandom.SobolEngine(2, scramble=True, seed=0)
        centers = evenly.draw(num_queries)  # (Q, 2)
        anchors = torch.cat([centers, torch.full_like(centers, _FIRST_EXTENT)], 1)
        self.anchors = nn.Parameter(anchors.logit(eps=1e-3))  # (Q, 4)
        last = nn.Linear(channels, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.offsets = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), last)

    def forward(self, queries: Tensor) -> Tensor:
        """Ellipses (B, Q, 4) of queries (B, Q, channels): `x, y, width, height` in parts of the canvas."""
        return (self.anchors + self.offsets(queries).float()).sigmoid()


def ellipse_logits(ellipses: Tensor, height: int, width: int) -> Tensor:
    """(B, N, height, width): 4 in the middle of an ellipse (B, N, 4), 0 on its line, less outside."""
    columns = _squared_distance(ellipses[..., 0::2], width)  # (B, N, width)
    rows = _squared_distance(ellipses[..., 1::2], height)  # (B, N, height)
    return _STRENGTH * (1 - rows[..., :, None] - columns[..., None, :])


def _squared_distance(center_and_extent: Tensor, cells: int) -> Tensor:
    """(…, cells) of the cells' middles from a centre (…, 2), in halves of the extent."""
    center, extent = center_and_extent.split(1, -1)
    middles = (torch.arange(cells, device=center.device) + 0.5) / cells
    return ((middles - center) / (extent / 2).clamp(min=0.5 / cells)).square()
