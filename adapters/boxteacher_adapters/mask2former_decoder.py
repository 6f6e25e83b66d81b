"""Mask2Former's transformer decoder: queries that look where their last mask was and draw the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxteacher_adapters.mask2former_prior import SpatialPrior, ellipse_logits
from boxteacher_adapters.parts.pixel_decoder import by_token, feedforward, sine_position_embedding

_NUM_HEADS = 8
_NUM_LEVELS = 3


@dataclass(frozen=True)
class QueryPredictions:
    """What the queries say after one round.

    Attributes:
        class_logits: (B, Q, C + 1), "no object" last.
        mask_embeddings: (B, Q, D); a mask is their product with the mask features.
        ellipses: (B, Q, 4) of the spatial prior; None without one.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    ellipses: Tensor | None

    def of_queries(self, queries: Tensor) -> "QueryPredictions":
        """What some queries (B, N) of each image say."""

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, queries[:, :, None].expand(-1, -1, values.shape[2]))

        ellipses = None if self.ellipses is None else chosen(self.ellipses)
        return QueryPredictions(chosen(self.class_logits), chosen(self.mask_embeddings), ellipses)

    def mask_logits(self, features: Tensor) -> Tensor:
        """Masks (B, Q, h, w): each embedding with its image's features (B, D, h, w), and the prior."""
        logits = (self.mask_embeddings @ features.flatten(2)).unflatten(2, features.shape[2:])
        if self.ellipses is None:
            return logits
        return logits + ellipse_logits(self.ellipses, features.shape[2], features.shape[3])


class MaskedAttentionDecoder(nn.Module):
    """Queries that attend only to where their mask of the round before is (Mask2Former, Sec. 3.2).

    Args:
        channels: of queries, levels and mask features.
        num_classes: C.
        num_queries: Q.
        num_layers: of masked attention.
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
        """Predictions before the first layer and after each.

        Args:
            levels: (B, channels, h_i, w_i) of strides 32, 16 and 8.
            mask_features: (B, channels, H / 4, W / 4).
        """
        tokens = [by_token(x) + e for x, e in zip(levels, self.level_embedding, strict=True)]
        positions = [sine_position_embedding(x.shape[-2], x.shape[-1], x.shape[1], x.device) for x in levels]
        # A mask made smaller is the product with smaller features.
        small = [F.interpolate(mask_features, x.shape[-2:], mode="bilinear") for x in levels]
        queries = self.query_features.expand(len(mask_features), -1, -1)  # (B, Q, channels)
        rounds = [self._predict(queries)]
        for i, layer in enumerate(self.layers):
            level = i % len(levels)
            hidden = _hidden_cells(rounds[-1], small[level])
            queries = layer(queries, self.query_positions, tokens[level], positions[level], hidden)
            rounds.append(self._predict(queries))
        return rounds

    def _predict(self, queries: Tensor) -> QueryPredictions:
        queries = self.norm(queries)
        ellipses = None if self.prior is None else self.prior(queries)
        return QueryPredictions(self.class_logits(queries), self.mask_embeddings(queries), ellipses)


@torch.no_grad()
def _hidden_cells(predictions: QueryPredictions, features: Tensor) -> Tensor:
    """(B, Q, h · w) bool: cells outside a query's mask, none if that is empty."""
    hidden = predictions.mask_logits(features).flatten(2) < 0
    return hidden & ~hidden.all(2, keepdim=True)


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
        self, queries: Tensor, query_positions: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor
    ) -> Tensor:
        """Queries (B, Q, channels) after one look at tokens (B, S, channels).

        Args:
            queries: (B, Q, channels).
            query_positions: (Q, channels), added to queries wherever they ask or are asked.
            tokens: (B, S, channels) of one level.
            positions: (S, channels), added to tokens where they are asked.
            hidden: (B, Q, S) bool, tokens that a query does not see.
        """
        hidden = hidden.repeat_interleave(_NUM_HEADS, 0)  # (B · heads, Q, S)
        seen, _ = self.cross_attention(
            queries + query_positions, tokens + positions, tokens, attn_mask=hidden, need_weights=False
        )
        queries = self.cross_norm(queries + seen)
        asking = queries + query_positions
        heard, _ = self.self_attention(asking, asking, queries, need_weights=False)
        queries = self.self_norm(queries + heard)
        return self.feedforward_norm(queries + self.feedforward(queries))
