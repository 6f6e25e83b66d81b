"""Measures what the project claims to be fast, each against what it is compared with, in one table.

    python -m tests.benchmarks [--quick] [--only NAME] [--rounds N] [--json FILE] [--plot FILE]

Every row is a ratio, ours over theirs, of runs that take turns in one process: the median of the turns, and
the range of the middle half of them. Losses and pseudo masks of both sides are first seen to be the same.
Peak memory is the greatest sum of bytes that torch's CPU allocator has given out during one run, in a pass of
its own (`torch.profiler`); of training steps the weights are part. `--quick` shows that it runs.
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
    "flops": lambda rounds, quick: iter([flops_row(rounds, quick)]),
    "sweep": sweep_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns")
    parser.add_argument("--only", choices=_GROUPS, help="one group of rows")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each row")
    parser.add_argument("--json", type=Path, help="writes the rows there as well")
    parser.add_argument("--plot", type=Path, help="draws the sweep there; needs the [viz] extra")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    rows = []
    for name in [arguments.only] if arguments.only else _GROUPS:
        for row in _GROUPS[name](rounds, arguments.quick):
            rows.append(row)
            print(f"{row.name}: {row.time_ratio:.3f}", flush=True)
    print(f"\n{', '.join(f'{key} {value}' for key, value in setting().items())}\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**setting(), "rows": [vars(row) for row in rows]}, indent=1) + "\n"
        )
    if arguments.plot:
        from tests.benchmarks.plot import draw

        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
