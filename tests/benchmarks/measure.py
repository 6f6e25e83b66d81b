"""Ratios of alternating runs in one process, which other load on the machine changes little."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]


@dataclass
class Row:
    """A comparison with a baseline; ratios are ours over the baseline's.

    Attributes:
        name: name of the comparison.
        ours: seconds of each repetition.
        baseline: seconds of each repetition of the baseline.
        memory: peak bytes of ours and of the baseline, if measured.
        max_time: target for the ratio of times, if any.
        max_memory: target for the ratio of peaks, if any.
        point: coordinates on the axes of a plot, by the axis's name.
    """

    name: str
    ours: list[float]
    baseline: list[float]
    memory: tuple[int, int] | None = None
    max_time: float | None = None
    max_memory: float | None = None
    point: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Ratios of the repetitions in ascending order."""
        return sorted(mine / other for mine, other in zip(self.ours, self.baseline, strict=True))

    @property
    def time_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def memory_ratio(self) -> float | None:
        return self.memory[0] / self.memory[1] if self.memory else None


def alternate(
    name: str,
    ours: Run,
    baseline: Run,
    repetitions: int,
    held: tuple[int, int] | None = (0, 0),
    **more: Any,
) -> Row:
    """Runs both once to warm up, then alternately.

    Args:
        name: name of the comparison.
        ours: function to measure.
        baseline: function to compare it with.
        repetitions: number of times that each is measured.
        held: bytes that each holds beforehand, added to its peak; memory is not measured if None.
        more: further fields of `Row`.
    """
    ours(), baseline()
    row = Row(name, [], [], **more)
    for _ in range(repetitions):
        row.ours.append(seconds(ours))
        row.baseline.append(seconds(baseline))
    if held is not None:
        row.memory = peak_bytes(ours, held[0]), peak_bytes(baseline, held[1])
    return row


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Run, held: int) -> int:
    """The maximum of the bytes that torch's CPU allocator holds during `run`, plus `held`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    peak = held
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| measured | time | spread | target | peak memory | target | ours | baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = row.ratios
        quarter = len(ratios) // 4
        peaks = f"{row.memory[0] / 2**20:.0f}, {row.memory[1] / 2**20:.0f} MiB" if row.memory else ""
        lines.append(
            f"| {row.name} | {row.time_ratio:.3f} | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} | "
            f"{_target(row.time_ratio, row.max_time)} | "
            f"{'' if row.memory_ratio is None else f'{row.memory_ratio:.3f} ({peaks})'} | "
            f"{_target(row.memory_ratio, row.max_memory)} | "
            f"{1000 * statistics.median(row.ours):.1f} ms | {1000 * statistics.median(row.baseline):.1f} ms |"
        )
    return "\n".join(lines)


def _target(ratio: float | None, maximum: float | None) -> str:
    if ratio is None or maximum is None:
        return ""
    return f"≤ {maximum:.3g}: {'met' if ratio <= maximum else 'MISSED'}"


def setting() -> dict[str, Any]:
    """The environment that the figures depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
