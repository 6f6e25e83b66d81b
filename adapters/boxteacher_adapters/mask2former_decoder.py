"""Mask2Former's transformer decoder: queries that attend to their last mask and predict the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher_adapters.parts.maps import flatten_levels
from boxteacher_adapters.parts.pixel_decoder import feedforward, sine_position_embedding

_NUM_HEADS = 8
_NUM_LEVELS = 3
_PRIOR_LOGIT = 4.0  # in the center of an ellipse
_INITIAL_EXTENT = 0.3  # width and height of an ellipse in fractions of the padded batch's


@dataclass(frozen=True)
class QueryPredictions:
    """The queries' predictions after a decoder layer.

    Attributes:
        class_logits: (B, Q, C + 1), "no object" last.
        mask_embeddings: (B, Q, D); a mask is their product with the mask features.
        ellipses: (B, Q, 4) of the spatial prior; None without one.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    ellipses: Tensor | None

    def of_queries(self, queries: Tensor) -> "QueryPredictions":
        """The predictions of some queries (B, N) of each image."""

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, queries[:, :, None].expand(-1, -1, values.shape[2]))

        ellipses = None if self.ellipses is None else chosen(self.ellipses)
        return QueryPredictions(chosen(self.class_logits), chosen(self.mask_embeddings), ellipses)

    def mask_logits(self, features: Tensor) -> Tensor:
        """Masks (B, Q, h, w): each embedding times its image's features (B, D, h, w), plus the prior."""
        logits = (self.mask_embeddings @ features.flatten(2)).unflatten(2, features.shape[2:])
        if self.ellipses is None:
            return logits
        return logits + ellipse_logits(self.ellipses, features.shape[2], features.shape[3])


class MaskedAttentionDecoder(nn.Module):
    """Queries that attend only to their mask of the layer before (Mask2Former, Sec. 3.2).

    Args:
        channels: number of channels of queries, levels and mask features.
        num_classes: C.
        num_queries: Q.
        num_layers: number of layers of masked attention.
        spatial_prior: whether masks begin as ellipses; see `SpatialPrior`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_queries: int,
        num_layers: int,
        *,
        spatial_prior: bool = False,
    ) -> None:
        super().__init__()
        self.query_features = nn.Parameter(torch.randn(num_queries, channels))
        self.query_positions = nn.Parameter(torch.randn(num_queries, channels))
        self.level_embedding = nn.Parameter(torch.randn(_NUM_LEVELS, channels))
        self.layers = nn.ModuleList(MaskedAttentionLayer(channels) for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels)
        self.class_logits = nn.Linear(channels, num_classes + 1)
        self.mask_embeddings = nn.Sequential(
            *(nn.Linear(channels, channels), nn.ReLU(inplace=True)),
            *(nn.Linear(channels, channels), nn.ReLU(inplace=True)),
            nn.Linear(channels, channels),
        )
        self.prior = SpatialPrior(channels, num_queries) if spatial_prior else None

    def forward(self, levels: Sequence[Tensor], mask_features: Tensor) -> list[QueryPredictions]:
        """Predictions of the learned queries and after each layer.

        Args:
            levels: (B, channels, h_i, w_i) of strides 32, 16 and 8.
            mask_features: (B, channels, H / 4, W / 4).
        """
        tokens = [flatten_levels([x]) + e for x, e in zip(levels, self.level_embedding, strict=True)]
        positions = [sine_position_embedding(x.shape[-2], x.shape[-1], x.shape[1], x.device) for x in levels]
        # A mask resized is the product with resized features.
        small = [F.interpolate(mask_features, x.shape[-2:], mode="bilinear") for x in levels]
        queries = self.query_features.expand(len(mask_features), -1, -1)  # (B, Q, channels)
        predictions = [self._predict(queries)]
        for i, layer in enumerate(self.layers):
            level = i % len(levels)
            outside = _outside_mask(predictions[-1], small[level])
            queries = layer(queries, self.query_positions, tokens[level], positions[level], outside)
            predictions.append(self._predict(queries))
        return predictions

    def _predict(self, queries: Tensor) -> QueryPredictions:
        queries = self.norm(queries)
        ellipses = None if self.prior is None else self.prior(queries)
        return QueryPredictions(self.class_logits(queries), self.mask_embeddings(queries), ellipses)


@torch.no_grad()
def _outside_mask(predictions: QueryPredictions, features: Tensor) -> Tensor:
    """Cells outside a query's mask, (B, Q, h · w) bool; none if the mask is empty."""
    outside = predictions.mask_logits(features).flatten(2) < 0
    return outside & ~outside.all(2, keepdim=True)


class MaskedAttentionLayer(nn.Module):
    """Masked cross-attention, self-attention and a feed-forward net, each followed by its layer norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(channels, _NUM_HEADS, batch_first=True)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attention = nn.MultiheadAttention(channels, _NUM_HEADS, batch_first=True)
        self.self_norm = nn.LayerNorm(channels)
        self.feedforward = feedforward(channels, 8 * channels)
        self.feedforward_norm = nn.LayerNorm(channels)
        for attention in (self.cross_attention, self.self_attention):
            nn.init.xavier_uniform_(attention.out_proj.weight)

    def forward(
        self, queries: Tensor, query_positions: Tensor, tokens: Tensor, positions: Tensor, outside: Tensor
    ) -> Tensor:
        """Queries (B, Q, channels) after attending to tokens (B, S, channels).

        Args:
            queries: (B, Q, channels).
            query_positions: (Q, channels), added to queries wherever attention weights are computed.
            tokens: (B, S, channels) of one level.
            positions: (S, channels), added to tokens where attention weights are computed.
            outside: (B, Q, S) bool, tokens that a query does not attend to.
        """
        outside = outside.repeat_interleave(_NUM_HEADS, 0)  # (B · heads, Q, S)
        attended, _ = self.cross_attention(
            queries + query_positions, tokens + positions, tokens, attn_mask=outside, need_weights=False
        )
        queries = self.cross_norm(queries + attended)
        positioned = queries + query_positions
        attended, _ = self.self_attention(positioned, positioned, queries, need_weights=False)
        queries = self.self_norm(queries + attended)
        return self.feedforward_norm(queries + self.feedforward(queries))


class SpatialPrior(nn.Module):
    """An ellipse per query, moved away from a learned anchor of the query.

    Boxes alone do not tell an object from its outline: both have the same projections, and cells on an edge
    have no neighbor of similar color for the pairwise loss. From features alone, whose strongest responses at
    first are edges, short training ended in outlines. Added to the mask logits, ellipses make masks begin as
    separate solid discs, which the losses then shape.

    Anchors are those of DAB-DETR (ICLR 2022); a logit that falls with the squared distance from a predicted
    center is SMCA's (ICCV 2021), which adds it to attention.

    Args:
        channels: number of channels of the queries.
        num_queries: Q.
    """

    def __init__(self, channels: int, num_queries: int) -> None:
        super().__init__()
        centers = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(num_queries)  # (Q, 2)
        anchors = torch.cat([centers, torch.full_like(centers, _INITIAL_EXTENT)], 1)
        self.anchors = nn.Parameter(anchors.logit(eps=1e-3))  # (Q, 4)
        last = nn.Linear(channels, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.offsets = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), last)

    def forward(self, queries: Tensor) -> Tensor:
        """Ellipses (B, Q, 4) of queries (B, Q, channels): `x, y, width, height` in [0, 1]."""
        return (self.anchors + self.offsets(queries).float()).sigmoid()


def ellipse_logits(ellipses: Tensor, height: int, width: int) -> Tensor:
    """Logits (B, N, height, width) of ellipses (B, N, 4): 4 in the center, 0 on the line, less outside."""
    columns = _squared_distance(ellipses[..., 0::2], width)  # (B, N, width)
    rows = _squared_distance(ellipses[..., 1::2], height)  # (B, N, height)
    return _PRIOR_LOGIT * (1 - rows[..., :, None] - columns[..., None, :])


def _squared_distance(center_and_extent: Tensor, cells: int) -> Tensor:
    """Squared distance (…, cells) of the cells' centers from a center (…, 2), in halves of the extent."""
    center, extent = center_and_extent.split(1, -1)
    cell_centers = (torch.arange(cells, device=center.device) + 0.5) / cells
    return ((cell_centers - center) / (extent / 2).clamp(min=0.5 / cells)).square()
