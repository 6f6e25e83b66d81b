"""Measuring: peaks of known allocations, and equal losses of kernel and baseline."""

import pytest
import torch

from tests.benchmarks.losses import Scene, gradient_of, pair_losses, scene
from tests.benchmarks.measure import Row, peak_bytes, table

MEGABYTE = 2**20


def test_the_peak_is_the_maximum_held_at_one_time():
    def run() -> None:
        for _ in range(3):
            first = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
            second = torch.empty(MEGABYTE, dtype=torch.uint8)
            del first, second

    assert peak_bytes(run, held=5 * MEGABYTE) == pytest.approx(8 * MEGABYTE, rel=0.001)


def test_ratios_are_per_repetition_and_their_median_is_compared_with_the_target():
    row = Row("kernel", [1.0, 2.0, 9.0], [2.0, 2.0, 2.0], (10, 40), max_time=1.0, max_memory=0.2)
    assert row.ratios == [0.5, 1.0, 4.5]
    assert row.time_ratio == 1.0
    line = table([row]).splitlines()[2]
    assert "≤ 1: met" in line
    assert "≤ 0.2: MISSED" in line


@pytest.mark.parametrize(("color", "affinity"), [(True, False), (False, True), (True, True)])
def test_kernel_and_unfolding_have_equal_values_and_gradients(color: bool, affinity: bool):
    small: Scene = scene(5, 24, 40)
    ours, baseline = pair_losses(color, affinity)
    torch.testing.assert_close(ours(small), baseline(small), rtol=1e-4, atol=1e-6)
    gradients = [gradient_of(loss, small)() for loss in (ours, baseline)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    assert gradients[0].abs().max() > 0
