"""Assignment of candidates to boxes, against a sequential loop over candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boxteacher.assignment import assign_greedily, match_quality


def sequential(iou: list[list[float]], score: list[float], boxes: int) -> list[int]:
    """In descending order of score, each candidate takes the best box that is still free."""
    owner = [-1] * boxes
    for candidate in sorted(range(len(score)), key=lambda k: -score[k]):  # stable: ties in order
        free = [n for n in range(boxes) if owner[n] < 0 and iou[candidate][n] > 0]
        if free:
            owner[max(free, key=lambda n: iou[candidate][n])] = candidate  # of ties, the first
    return owner


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[float], int]:
    candidates, boxes = draw(st.integers(0, 9)), draw(st.integers(0, 7))
    # Few values, so that ties are common.
    values = st.sampled_from([0.0, 0.0, 0.5, 0.5625, 0.625, 0.75, 1.0])
    row = st.lists(values, min_size=boxes, max_size=boxes)
    iou = draw(st.lists(row, min_size=candidates, max_size=candidates))
    scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=candidates, max_size=candidates)
    return iou, draw(scores), boxes


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_parallel_assignment_equals_the_sequential_one(problem):
    iou, score, boxes = problem
    matrix = torch.tensor(iou, dtype=torch.float32).reshape(len(score), boxes)
    assert assign_greedily(matrix, torch.tensor(score)).tolist() == sequential(iou, score, boxes)


@pytest.mark.parametrize("size", [(200, 40), (40, 200), (300, 3)])
def test_large_problems_equal_the_sequential_assignment(size):
    torch.manual_seed(0)
    iou = torch.rand(size)
    iou = torch.where(iou > 0.7, iou, 0.0)
    score = torch.rand(size[0])
    assert assign_greedily(iou, score).tolist() == sequential(iou.tolist(), score.tolist(), size[1])


def test_candidates_with_the_same_ranking_of_boxes_are_assigned_by_score():
    """The most iterations possible: all candidates rank the boxes alike, so each iteration assigns one."""
    iou = torch.linspace(1, 0.5, 12).expand(12, 12)
    score = torch.linspace(0.1, 0.9, 12)
    assert assign_greedily(iou, score).tolist() == list(range(11, -1, -1))


def test_a_candidate_whose_best_box_is_taken_late_gets_the_box_that_is_left():
    """All rank the boxes alike but the lowest-scoring one, whose best box is taken in the 11th iteration."""
    iou = torch.linspace(1, 0.5, 12).repeat(12, 1)
    iou[11, 10] = 2.0
    score = torch.linspace(0.9, 0.1, 12)
    assert assign_greedily(iou, score).tolist() == list(range(12))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4), st.randoms())
def test_as_many_iterations_as_boxes_in_any_one_image_are_enough(sizes, random):
    blocks = []
    for candidates, boxes in sizes:
        values = [random.choice([0.0, 0.5, 0.75, 1.0]) for _ in range(candidates * boxes)]
        blocks.append(torch.tensor(values).reshape(candidates, boxes))
    iou = torch.block_diag(*blocks)
    score = torch.tensor([random.choice([0.25, 0.5, 0.75]) for _ in range(len(iou))])
    chosen = assign_greedily(iou, score, max(boxes for _, boxes in sizes))
    assert chosen.tolist() == sequential(iou.tolist(), score.tolist(), iou.shape[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_candidates_and_of_boxes_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(7, 5, generator=generator)
    iou = torch.where(iou > 0.4, iou, 0.0)
    score = torch.rand(7, generator=generator)
    candidates, boxes = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    owner = assign_greedily(iou, score)
    permuted = assign_greedily(iou[candidates][:, boxes], score[candidates])
    assert torch.equal(torch.where(permuted >= 0, candidates[permuted], -1), owner[boxes])


def test_a_candidate_is_assigned_to_at_most_one_box_and_only_one_that_it_overlaps():
    torch.manual_seed(1)
    iou = torch.rand(20, 30)
    iou = torch.where(iou > 0.6, iou, 0.0)
    owner = assign_greedily(iou, torch.rand(20))
    winners = owner[owner >= 0]
    assert len(winners.unique()) == len(winners) > 0
    assert (iou[winners, (owner >= 0).nonzero()[:, 0]] > 0).all()


def boxes_of(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_candidates_match_only_boxes_of_their_own_image():
    boxes = boxes_of((0, 0, 10, 10), (0, 0, 10, 10))
    quality = match_quality(boxes, torch.tensor([0, 1]), boxes, torch.tensor([1, 0]), 0.5)
    assert quality.tolist() == [[0, 1], [1, 0]]


def test_an_iou_equal_to_the_threshold_matches():
    candidates = boxes_of((0, 0, 10, 5), (0, 0, 10, 4.9), (0, 0, 10, 8))
    quality = match_quality(
        candidates, torch.zeros(3).long(), boxes_of((0, 0, 10, 10)), torch.zeros(1).long(), 0.5
    )
    assert quality[:, 0].tolist() == pytest.approx([0.5, 0, 0.8])


@pytest.mark.parametrize(("candidates", "boxes"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_match_gives_an_empty_table(candidates, boxes):
    quality = match_quality(
        torch.zeros(candidates, 4),
        torch.zeros(candidates).long(),
        torch.zeros(boxes, 4),
        torch.zeros(boxes).long(),
        0.5,
    )
    assert quality.shape == (candidates, boxes)
    assert assign_greedily(quality, torch.zeros(candidates)).tolist() == [-1] * boxes


def test_half_precision_boxes_are_compared_in_float32():
    # 2047 × 2047 overflows float16.
    box = boxes_of((0, 0, 2047, 2047)).half()
    index = torch.zeros(1).long()
    assert match_quality(box, index, box, index, 0.5).tolist() == [[1.0]]
