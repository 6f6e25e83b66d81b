"""Mask2Former's parts: its attention, its pixel decoder, its spatial prior."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from boxteacher_adapters.mask2former import STRIDES
from boxteacher_adapters.mask2former_decoder import MaskedAttentionDecoder, SpatialPrior, ellipse_logits
from boxteacher_adapters.parts.deformable_attention import DeformableAttention
from boxteacher_adapters.parts.pixel_decoder import PixelDecoder, sine_position_embedding


def test_deformable_attention_is_a_weighted_sum_of_bilinear_samples():
    torch.manual_seed(0)
    attention = DeformableAttention(16, num_levels=2, num_heads=4, num_points=3)
    for layer in (attention.offsets, attention.weights):
        torch.nn.init.normal_(layer.weight, std=0.3)
    sizes = [(3, 4), (6, 8)]
    tokens, queries = torch.randn(2, 12 + 48, 16), torch.randn(2, 5, 16)
    centers = torch.rand(5, 2)
    found = attention(queries, centers, tokens, sizes)
    offsets = attention.offsets(queries).view(2, 5, 4, 2, 3, 2)
    weights = attention.weights(queries).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 2, 3)
    values = attention.values(tokens).view(2, 60, 4, 4)
    expected = torch.zeros(2, 5, 4, 4)
    for level, (first, (height, width)) in enumerate(zip((0, 12), sizes, strict=True)):
        for b, n, m, k in itertools.product(range(2), range(5), range(4), range(3)):
            dx, dy = offsets[b, n, m, level, k].tolist()
            x, y = centers[n, 0].item() * width + dx - 0.5, centers[n, 1].item() * height + dy - 0.5
            for i, j in itertools.product(
                (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
            ):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, n, m, level, k]
                    expected[b, n, m] += share * values[b, first + i * width + j, m]
    assert_close(found, attention.output(expected.flatten(2)), rtol=1e-4, atol=1e-5)


def test_heads_attend_in_directions_of_their_own_at_first():
    rays = DeformableAttention(64, 3).offsets.bias.view(8, 3, 4, 2)
    assert_close(rays[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), atol=1e-5, rtol=0)
    assert_close(rays[1, 2, 1], torch.tensor([2.0, 2.0]), atol=1e-5, rtol=0)
    assert_close(rays[6, 1, 0], torch.tensor([0.0, -1.0]), atol=1e-5, rtol=0)


def test_positions_are_the_sines_of_row_and_column():
    table = sine_position_embedding(3, 5, 8, torch.device("cpu")).view(3, 5, 8)
    row, column = 2 * math.pi * 2 / 3, 2 * math.pi * 4 / 5
    expected = [f(angle / d) for angle in (row, column) for d in (1, 100) for f in (math.sin, math.cos)]
    assert_close(table[1, 3], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_pixel_decoder_keeps_the_strides():
    decoder = PixelDecoder((8, 16, 24, 40), 64, num_layers=1)
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((8, 16, 24, 40), STRIDES, strict=True)]
    levels, features = decoder(maps)
    assert [tuple(x.shape) for x in levels] == [(2, 64, 2, 3), (2, 64, 4, 6), (2, 64, 8, 12)]
    assert features.shape == (2, 64, 16, 24)


def test_a_query_sees_nothing_outside_its_last_mask():
    torch.manual_seed(0)
    decoder = MaskedAttentionDecoder(64, 3, num_queries=4, num_layers=1).eval()
    levels = [torch.randn(1, 64, 2 * k, 3 * k) for k in (1, 2, 4)]
    features = torch.randn(1, 64, 8, 12)
    first = decoder(levels, features)[0].mask_logits(features)
    inside = F.interpolate(first, (2, 3), mode="bilinear") >= 0  # (1, 4, 2, 3)
    cells = itertools.product(range(2), range(3))
    row, column = next((i, j) for i, j in cells if not inside[0, :, i, j].all())
    masked = ~inside[0, :, row, column] & inside[0].flatten(1).any(1)  # (4,)
    assert masked.any()
    # Self-attention would carry a change from one query to another; here each attends to itself alone.
    torch.nn.init.zeros_(decoder.layers[0].self_attention.out_proj.weight)
    before = decoder(levels, features)[1].mask_embeddings[0]
    levels[0][0, :, row, column] += 3
    changed = (decoder(levels, features)[1].mask_embeddings[0] - before).abs().amax(1) > 1e-4
    assert_close(changed, ~masked)


def test_the_prior_s_logits_are_those_of_an_ellipse():
    ellipses = torch.tensor([[[0.25, 0.5, 0.5, 0.25]]])
    logits = ellipse_logits(ellipses, 16, 8)[0, 0]
    # In halves of the extent, cell (r, c)'s center is (r + 0.5 − 8) / 2 and (c + 0.5 − 2) / 2 away.
    for r, c in ((7, 1), (8, 3), (6, 0), (9, 2)):
        expected = 4 * (1 - ((r - 7.5) / 2) ** 2 - ((c - 1.5) / 2) ** 2)
        assert logits[r, c].item() == pytest.approx(expected, abs=1e-5)


def test_a_prior_as_small_as_nothing_is_finite():
    logits = ellipse_logits(torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]]), 4, 4)
    assert torch.isfinite(logits).all()


def test_anchors_cover_the_image_at_first():
    ellipses = SpatialPrior(32, 100)(torch.randn(2, 100, 32))
    assert_close(ellipses[0], ellipses[1])
    assert_close(ellipses[..., 2:], torch.full((2, 100, 2), 0.3))
    covered = (ellipse_logits(ellipses, 32, 32)[0] > 0).sum(0)
    assert covered.min() >= 1
    # An ellipse covers π / 4 · 0.3² of the image, and about half of that in a corner.
    assert covered.max() <= 3 * 100 * math.pi / 4 * 0.3**2
