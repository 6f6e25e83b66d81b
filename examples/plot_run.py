"""Plots the losses of a run, smoothed: python examples/plot_run.py RUN [RUN …] (needs boxteacher[viz])."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

WINDOW = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("losses.png"))
    arguments = parser.parse_args()

    logs = {run: [json.loads(line) for line in (run / "log.jsonl").open()] for run in arguments.runs}
    names = sorted({name for lines in logs.values() for name in lines[0] if name.startswith("loss")})
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(4 * -(-len(names) // 2), 6))
    for axis, name in zip(axes.flat, names, strict=False):
        for run, lines in logs.items():
            values = [line[name] for line in lines if name in line]
            axis.plot(np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid"), label=run.name)
        axis.set_title(name)
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
