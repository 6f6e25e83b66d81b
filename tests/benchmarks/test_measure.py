"""The measuring itself: peaks of known allocations, and losses that agree before they are timed."""

import pytest
import torch

from tests.benchmarks.losses import Scene, pair_losses, scene, taught
from tests.benchmarks.measure import Row, peak_bytes, table

MEGABYTE = 2**20


def test_the_peak_is_what_is_held_at_once():
    def run() -> None:
        for _ in range(3):
            first = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
            second = torch.empty(MEGABYTE, dtype=torch.uint8)
            del first, second

    assert peak_bytes(run, held=5 * MEGABYTE) == pytest.approx(8 * MEGABYTE, rel=0.001)


def test_ratios_are_of_turns_and_aims_are_judged_by_their_median():
    row = Row("kernel", [1.0, 2.0, 9.0], [2.0, 2.0, 2.0], (10, 40), most_time=1.0, most_memory=0.2)
    assert row.ratios == [0.5, 1.0, 4.5]
    assert row.time_ratio == 1.0
    line = table([row]).splitlines()[2]
    assert "≤ 1: met" in line
    assert "≤ 0.2: MISSED" in line


@pytest.mark.parametrize(("color", "affinity"), [(True, False), (False, True), (True, True)])
def test_unfolding_gives_what_the_kernel_gives(color: bool, affinity: bool):
    small: Scene = scene(5, 24, 40)
    ours, theirs = pair_losses(color, affinity)
    torch.testing.assert_close(ours(small), theirs(small), rtol=1e-4, atol=1e-6)
    gradients = [taught(loss, small)() for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    assert gradients[0].abs().max() > 0
