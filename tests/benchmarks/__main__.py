"""Benchmarks of losses, pseudo masks and training steps against baselines, in one table.

    python -m tests.benchmarks [--quick] [--only NAME] [--repetitions N] [--json FILE] [--plot FILE]

Every row is a ratio, ours over the baseline's, of runs that alternate in one process: the median over the
repetitions, and their interquartile range. Losses and pseudo masks are first checked to be equal to the
baseline's. Peak memory is the maximum of the bytes that torch's CPU allocator holds during one run, from
`torch.profiler` in a run of its own; in training steps it includes the weights. `--quick` checks that
everything runs.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.losses import loss_rows, sweep_rows
from tests.benchmarks.measure import Row, setting, table
from tests.benchmarks.steps import flops_row, share_rows, step_rows
from tests.benchmarks.teaching import teaching_rows

_GROUPS: dict[str, Callable[[int, bool], Iterator[Row]]] = {
    "losses": loss_rows,
    "teaching": teaching_rows,
    "steps": step_rows,
    "shares": share_rows,
    "flops": lambda repetitions, quick: iter([flops_row(repetitions, quick)]),
    "sweep": sweep_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions")
    parser.add_argument("--only", choices=_GROUPS, help="one group of rows")
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each row")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="file for a plot of the sweep; needs the [viz] extra")
    arguments = parser.parse_args()
    repetitions = 2 if arguments.quick else arguments.repetitions
    rows = []
    for name in [arguments.only] if arguments.only else _GROUPS:
        for row in _GROUPS[name](repetitions, arguments.quick):
            rows.append(row)
            print(f"{row.name}: {row.time_ratio:.3f}", flush=True)
    print(f"\n{', '.join(f'{key} {value}' for key, value in setting().items())}\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**setting(), "rows": [vars(row) for row in rows]}, indent=1) + "\n"
        )
    if arguments.plot:
        from tests.benchmarks.plot import plot

        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
