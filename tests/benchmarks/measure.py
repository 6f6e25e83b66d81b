"""Ratios measured in one process in turns, so that they hold on a machine that does other things as well."""

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
    """Ours beside what it is compared with; a ratio is ours over theirs.

    Attributes:
        name: of the comparison.
        ours: seconds of each turn.
        theirs: likewise.
        memory: peak bytes of ours and of theirs, if measured.
        most_time: greatest ratio of times that is aimed at, if any.
        most_memory: greatest ratio of peaks that is aimed at, if any.
        point: where on a plot's axes the row lies, by the axis's name.
    """

    name: str
    ours: list[float]
    theirs: list[float]
    memory: tuple[int, int] | None = None
    most_time: float | None = None
    most_memory: float | None = None
    point: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Of each turn, in rising order."""
        return sorted(mine / other for mine, other in zip(self.ours, self.theirs, strict=True))

    @property
    def time_ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def memory_ratio(self) -> float | None:
        return self.memory[0] / self.memory[1] if self.memory else None


def in_turns(
    name: str, ours: Run, theirs: Run, rounds: int, held: tuple[int, int] | None = (0, 0), **aims: Any
) -> Row:
    """Runs both once to warm up, then alternately.

    Args:
        name: of the comparison.
        ours: what is measured.
        theirs: what it is compared with.
        rounds: turns.
        held: bytes that either side holds already, and that count; without it, memory is not measured.
        aims: further fields of `Row`.
    """
    ours(), theirs()
    row = Row(name, [], [], **aims)
    for _ in range(rounds):
        row.ours.append(seconds(ours))
        row.theirs.append(seconds(theirs))
    if held is not None:
        row.memory = peak_bytes(ours, held[0]), peak_bytes(theirs, held[1])
    return row


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Run, held: int) -> int:
    """The greatest sum of bytes that torch's CPU allocator has given out in `run`, beginning with `held`."""
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
        "| measured | time | spread | aim | peak memory | aim | ours | theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = row.ratios
        quarter = len(ratios) // 4
        peaks = f"{row.memory[0] / 2**20:.0f}, {row.memory[1] / 2**20:.0f} MiB" if row.memory else ""
        lines.append(
            f"| {row.name} | {row.time_ratio:.3f} | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} | "
            f"{_aim(row.time_ratio, row.most_time)} | "
            f"{'' if row.memory_ratio is None else f'{row.memory_ratio:.3f} ({peaks})'} | "
            f"{_aim(row.memory_ratio, row.most_memory)} | "
            f"{1000 * statistics.median(row.ours):.1f} ms | {1000 * statistics.median(row.theirs):.1f} ms |"
        )
    return "\n".join(lines)


def _aim(ratio: float | None, most: float | None) -> str:
    if ratio is None or most is None:
        return ""
    return f"≤ {most:.3g}: {'met' if ratio <= most else 'MISSED'}"


def setting() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
