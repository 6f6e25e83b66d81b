"""Prints how far a released network's numbers differ from the original's.

    python -m tests.benchmarks.released_parity FOLDER NAME… [--image-seed SEED]

FOLDER holds `forward_NAME.npz`, numbers for the images of the seed, or `trajectory_NAME.npz`, which names the
seeds of its steps' images, or both.

The comparison is repeated with pixels that are off by float32's rounding: two programs cannot be expected to
agree better than that.
"""

import argparse
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
from tests.released_trajectory import trajectory_differences

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


def compare_trajectory(title: str, name: str, folder: Path, noise: float = 0.0) -> None:
    found = trajectory_differences(name, folder, noise)
    print(f"{title}: trajectory's losses {worst(found.losses)}, confidences {worst(found.confidences)}")
    for group in ("student", "teacher"):
        moved = {key: value for key, value in found.changes.items() if key.startswith(group)}
        buffers = {key: value for key, value in moved.items() if "running" in key}
        parameters = {key: value for key, value in moved.items() if key not in buffers}
        print(f"{title}: {group}'s parameters {worst(parameters)}, running statistics {worst(buffers)}")
    print(f"{title}: {len(found.frozen)} frozen averages, which rounding moves there, {worst(found.frozen)}")


def main(folder: Path, names: list[str], image_seed: int) -> None:
    torch.set_num_threads(1)
    for name in names:
        titles = {name: 0.0, f"{name}, pixels off by {_NOISE:g}": _NOISE}
        for title, noise in titles.items():
            if (folder / f"forward_{name}.npz").exists():
                compare(title, load_released(name, folder, noise, image_seed))
            if (folder / f"trajectory_{name}.npz").exists():
                compare_trajectory(title, name, folder, noise)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints differences from the original's numbers.")
    parser.add_argument("folder", type=Path, help="folder of the original's numbers")
    parser.add_argument("names", nargs="+", help="released networks: r50, r101, r101_dcn, swin-base")
    parser.add_argument("--image-seed", type=int, default=0, help="seed of the images of forward_NAME.npz")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.names, arguments.image_seed)
