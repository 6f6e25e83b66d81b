"""Pseudo masks of a run's rounds against the annotated masks of its training images, which it has not read.

    python -m tests.benchmarks.rounds RUN --data DIR

For every `RUN/pseudo_masks_STEP.npz`: mean and median IoU, the share of objects above 0.8, precision, recall,
the median of the pseudo mask's area over the annotated one's, mean confidence, and the calibration error: the
mean distance of confidence and IoU over ten bins of as many objects each, ordered by confidence.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from boxteacher.data import DataIndex, read_split
from boxteacher.engine.pseudo_masks import PredictedMasks, load_predicted_masks

Array = NDArray[np.float64]
_BINS = 10


@dataclass(frozen=True)
class Comparison:
    """Pseudo masks of N objects that have an annotated mask.

    Attributes:
        overlap: (N,) IoU.
        area: (N,) of the pseudo mask, in areas of the annotated one.
        confidence: (N,).
    """

    overlap: Array
    area: Array
    confidence: Array

    def precision(self) -> Array:
        """Share (N,) of the pseudo mask that is right: I / P with I = IoU · (P + A) / (1 + IoU)."""
        return self._intersection() / self.area.clip(min=1e-9)

    def recall(self) -> Array:
        """Share (N,) of the annotated mask that is found."""
        return self._intersection()

    def _intersection(self) -> Array:
        return self.overlap * (self.area + 1) / (1 + self.overlap)

    def calibration_error(self) -> float:
        """Mean over bins of |mean confidence − mean IoU|."""
        bins = np.array_split(self.confidence.argsort(), min(_BINS, len(self.confidence)))
        return float(
            np.mean([abs(self.confidence[each].mean() - self.overlap[each].mean()) for each in bins])
        )


def compare(predicted: PredictedMasks, index: DataIndex) -> Comparison:
    """Compares a data set's pseudo masks with its annotated masks, where both are."""
    owners = np.repeat(np.arange(len(index)), np.diff(index.starts))  # (M,)
    rows = []
    for k, (pseudo, annotated) in enumerate(zip(predicted.masks, index.masks or (), strict=True)):
        if pseudo is None or annotated is None:
            continue
        size = index.sizes[owners[k]].tolist()
        ours, true = ({"size": size, "counts": counts} for counts in (pseudo, annotated))
        overlap = float(mask_utils.iou([ours], [true], [0])[0, 0])
        area = float(mask_utils.area(ours)) / max(1.0, float(mask_utils.area(true)))
        rows.append((overlap, area, float(predicted.confidence[k])))
    return Comparison(*np.array(rows).reshape(-1, 3).T)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    index = read_split(arguments.data, "train", read_masks=True)
    for path in sorted(arguments.run.glob("pseudo_masks_*.npz")):
        predicted, step = load_predicted_masks(path)
        found = compare(predicted, index)
        print(
            f"step {step}: {len(found.overlap)} of {(~index.crowd).sum()} objects, IoU mean "
            f"{found.overlap.mean():.3f} median "
            f"{np.median(found.overlap):.3f}, above 0.8 {(found.overlap > 0.8).mean():.2f}, precision "
            f"{found.precision().mean():.3f}, recall {found.recall().mean():.3f}, area "
            f"{np.median(found.area):.2f}, confidence {found.confidence.mean():.3f}, calibration "
            f"error {found.calibration_error():.3f}"
        )


if __name__ == "__main__":
    main()
