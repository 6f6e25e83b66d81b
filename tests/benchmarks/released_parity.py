"""Prints how far a released network's numbers differ from the original's.

python -m tests.benchmarks.released_parity FOLDER NAME…, where FOLDER holds `forward_NAME.npz`.

The comparison is repeated with pixels that are off by float32's rounding: two programs cannot be expected to
agree better than that.
"""

import sys
from pathlib import Path

import torch

from tests.released_parity import (
    Released,
    detection_differences,
    feature_differences,
    head_differences,
    load_released,
    step_differences,
)

_NOISE = 1e-7  # about float32's rounding


def worst(differences: dict[str, float]) -> str:
    name = max(differences, key=differences.__getitem__)
    return f"{differences[name]:.1e} ({name})"


def compare(name: str, released: Released) -> None:
    detections = list(detection_differences(released))
    features, heads = feature_differences(released), head_differences(released)
    print(f"{name}: features {worst(features)}, heads {worst(heads)}")
    print(
        f"{name}: of 120 detections {sum(each.labels for each in detections)} other labels, "
        f"scores {max(each.scores for each in detections):.1e}, "
        f"boxes {max(each.boxes for each in detections):.1e} pixels, "
        f"minimum IoU of masks {min(each.mask_iou for each in detections):.4f}"
    )
    losses, gradients = step_differences(released)
    print(f"{name}: losses and confidences {worst(losses)}, gradients' norms {worst(gradients)}")


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        compare(name, load_released(name, folder))
        compare(f"{name}, pixels off by {_NOISE:g}", load_released(name, folder, _NOISE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
