"""Which query Mask2Former gives to which target."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from boxteacher.errors import InputError
from boxteacher.grid import mask_grid
from boxteacher.targets import grid_targets
from boxteacher_adapters import mask2former_matching as matching
from tests.mask2former_support import with_masks
from tests.support import seeded_images, target

COUNTS = [2, 1]


def two_images(masks: bool = False) -> tuple[matching.MatchingTargets, list[Tensor]]:
    """Targets of two images, and each image's box masks on the grid."""
    images = seeded_images((64, 64), (64, 64))
    targets = [target((4, 4, 32, 60), (40, 8, 60, 28)), target((16, 16, 60, 40))]
    for each in targets:
        each["labels"] = torch.arange(len(each["boxes"]))
    if masks:
        targets = with_masks(targets, images)
    grid = grid_targets(images, targets, mask_grid(images, 4, 32))
    return matching.matching_targets(grid, COUNTS, 4, masks), [grid.box_masks[:2], grid.box_masks[2:]]


@pytest.mark.parametrize("masks", [False, True])
def test_the_query_that_predicts_a_target_is_assigned_to_it(masks):
    targets, box_masks = two_images(masks)
    logits = torch.full((2, 5, 16, 16), -6.0)
    for image, (query, n) in [(0, (3, 0)), (0, (1, 1)), (1, (4, 0))]:
        logits[image, query][box_masks[image][n]] = 6.0
    cost = matching.matching_cost(torch.zeros(2, 5, 4), logits, targets)
    assert matching.assign(cost[None], COUNTS).tolist() == [[3, 1, 4]]


def test_of_two_like_masks_the_right_class_decides():
    targets, box_masks = two_images()
    logits = torch.full((2, 5, 16, 16), -6.0)
    logits[0, 1:3, box_masks[0][0]] = 6.0
    classes = torch.zeros(2, 5, 4)
    classes[0, 2, 0] = 1.0
    cost = matching.matching_cost(classes, logits, targets)
    assert matching.assign(cost[None], COUNTS)[0, 0] == 2


def test_costs_are_those_of_the_formulas():
    targets, _ = two_images(masks=True)
    torch.manual_seed(0)
    classes, logits = torch.randn(2, 5, 4), torch.randn(2, 5, 16, 16) * 3
    cost = matching.matching_cost(classes, logits, targets)
    p, t = logits[0, 3].sigmoid(), targets.masks[0, 1]
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    pixel = F.binary_cross_entropy_with_logits(logits[0, 3], t)
    probability = classes[0, 3].softmax(0)[1]
    assert_close(cost[0, 3, 1], -2 * probability + 5 * pixel + 5 * dice)

    left_half = torch.full_like(logits, -6.0).index_fill(3, torch.arange(8), 6.0)
    cost = matching.matching_cost(classes, left_half, two_images()[0])
    # Against a box from 40 to 60 and from 8 to 28 of 64 pixels.
    l1 = (40 + 8 + 28 + 36) / 64
    p = torch.tensor(6.0).sigmoid()
    # Of the grid's pixels 2, 6, 10, …, five lie in the box on each axis.
    columns = 1 - (2 * 5 * (1 - p) + 1) / (8 * p + 8 * (1 - p) + 5 + 1)
    rows = 1 - (2 * 5 * p + 1) / (16 * p + 5 + 1)
    assert_close(cost[0, 3, 1], -2 * probability + 5 * l1 + 5 * (columns + rows))


def test_targets_without_an_annotated_mask_are_matched_by_their_box():
    images, boxes = seeded_images((64, 64)), target((4, 4, 32, 60), (40, 8, 60, 28))
    (annotated,) = with_masks([boxes], images)
    annotated["has_mask"] = torch.tensor([True, False])
    costs = []
    torch.manual_seed(0)
    classes, logits = torch.randn(1, 5, 4), torch.randn(1, 5, 16, 16)
    all_annotated = {**annotated, "has_mask": torch.ones(2).bool()}
    for each, masks in ((annotated, True), (boxes, False), (all_annotated, True)):
        grid = grid_targets(images, [each], mask_grid(images, 4, 32))
        targets = matching.matching_targets(grid, [2], 4, masks)
        costs.append(matching.matching_cost(classes, logits, targets)[0])
    mixed, box, mask = costs
    assert_close(mixed[:, 1], box[:, 1])
    assert_close(mixed[:, 0], mask[:, 0])
    assert not torch.allclose(box, mask)


def test_the_assignment_has_the_minimum_cost():
    torch.manual_seed(0)
    costs = torch.randn(2, 3, 5, 3)
    counts = (3, 0, 2)
    found = matching.assign(costs, counts)
    assert found.shape == (2, 5)
    for r in range(2):
        for b, mine in ((0, found[r, :3]), (2, found[r, 3:])):
            n = len(mine)
            best = min(
                sum(costs[r, b, q, i].item() for i, q in enumerate(choice))
                for choice in itertools.permutations(range(5), n)
            )
            assert len(set(mine.tolist())) == n
            assert costs[r, b, mine, torch.arange(n)].sum().item() == pytest.approx(best, rel=1e-5)


def test_a_diverged_network_is_left_for_its_loss_to_tell():
    assert matching.assign(torch.full((1, 1, 4, 2), math.nan), (2,)).shape == (1, 2)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(matching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install boxteacher\[mask2former\]"):
        matching.assign(torch.zeros(1, 1, 4, 2), (2,))
