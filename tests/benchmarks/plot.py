"""Plots of the cost of the pair losses."""

import statistics
from pathlib import Path

import matplotlib

from tests.benchmarks.measure import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["svg.fonttype"] = "none"  # text stays text


def plot(rows: list[Row], path: Path) -> None:
    """Plots time and peak memory over the number of masks and over the share of the grid in each box."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharey="row")
    for column, (axis, label) in enumerate((("masks", "masks"), ("share", "share of the grid in each box"))):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if axis in row.point:
                side = row.point.get("side")
                lines.setdefault("" if side is None else f", {side:.0f} × {side:.0f}", []).append(row)
        for k, (name, members) in enumerate(lines.items()):
            x = [row.point[axis] for row in members]
            for top, bottom, who, style in (
                ([statistics.median(row.ours) for row in members], 0, "boxes only", "o-"),
                ([statistics.median(row.baseline) for row in members], 1, "unfold", "s--"),
            ):
                memory = [row.memory[bottom] / 2**20 for row in members if row.memory]
                axes[0, column].loglog(
                    x, [1000 * value for value in top], style, color=f"C{k}", label=who + name
                )
                axes[1, column].loglog(x, memory, style, color=f"C{k}", label=who + name)
        axes[1, column].set_xlabel(label)
        axes[0, column].legend(fontsize=7)
    axes[0, 0].set_ylabel("forward and backward, ms")
    axes[1, 0].set_ylabel("peak memory, MiB")
    for each in axes.flat:
        each.grid(alpha=0.3)
    axes[0, 0].set_title("COCO-like boxes, median 8 % of the grid")
    axes[0, 1].set_title("64 masks on 128 × 128")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
