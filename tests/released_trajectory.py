"""Differences between three training steps of a recipe here and of the released code as it is configured."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boxteacher.engine.optimization import build_optimizer, build_schedule
from boxteacher.engine.recipes import find_recipe
from boxteacher.engine.run import RunState
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.step import take_step
from boxteacher.engine.train import supervise
from boxteacher_adapters.checkpoints import SCALES, condinst_name
from tests.released_parity import LOSSES, noisy_images, released_network
from tests.released_support import only, released_shapes

RECIPES = {"r50": "condinst_r50_1x"}
_AVERAGING_MOVES = 1e-6  # norm by which rounding moves an average of equal weights


@dataclass
class TrajectoryDifferences:
    """Differences from the original's trajectory.

    Attributes:
        losses: relative difference of each loss of each step.
        confidences: largest difference of each step's confidences.
        changes: relative difference of how far each parameter and buffer has moved.
        frozen: how far each entry has moved that stays the same in the original but for rounding.
    """

    losses: dict[str, float]
    confidences: dict[str, float]
    changes: dict[str, float]
    frozen: dict[str, float]


def trajectory_differences(name: str, folder: Path, noise: float = 0.0) -> TrajectoryDifferences:
    """Takes the steps of `folder/trajectory_NAME.npz` with the recipe, its warm-ups over.

    Args:
        name: name of the released network; r50.
        folder: folder with the original's numbers.
        noise: part of their value by which the pixels differ randomly.
    """
    with np.load(folder / f"trajectory_{name}.npz") as arrays:
        numbers = {key: arrays[key] for key in arrays.files if key != "adjust"}
    state, settings = _run(name, numbers)
    networks = {"student": state.model.student, "teacher": state.model.teacher.model}
    start = {name: _entries(network.state_dict()) for name, network in networks.items()}
    targets = [
        {
            "boxes": torch.from_numpy(numbers[f"{i}_gt_boxes"]),
            "labels": torch.from_numpy(numbers[f"{i}_gt_labels"]),
            "ignored_bottom_rows": 10,
            "file_name": str(i),
        }
        for i in range(2)
    ]
    found = TrajectoryDifferences({}, {}, {}, {})
    for step, seed in enumerate(numbers["image_seeds"].tolist()):
        losses = take_step(state, noisy_images(seed, noise), targets, settings.gradient_clip)
        for ours, theirs in LOSSES.items():
            wanted = float(numbers[f"{step}_loss_{theirs}"])
            found.losses[f"{step} {ours}"] = abs(losses[ours] - wanted) / abs(wanted)
        wanted = np.concatenate([numbers[f"{step}_{i}_confidence"] for i in range(2)])
        confidence = state.model.last_pseudo_masks.confidence.numpy()
        found.confidences[f"step {step}"] = float(np.abs(confidence - wanted).max())
    for name, network in networks.items():
        for key, value in _entries(network.state_dict()).items():
            change = float((value.double() - start[name][key].double()).norm())
            wanted = _changes(numbers, name).get(key)
            if wanted is None:  # it does not move in the original
                assert change == 0, key
            elif wanted < _AVERAGING_MOVES:
                found.frozen[f"{name} {key}"] = change
            else:
                found.changes[f"{name} {key}"] = abs(change - wanted) / wanted
    return found


def _run(name: str, numbers: dict[str, np.ndarray]) -> tuple[RunState, TrainSettings]:
    """A run with the recipe's settings but for the rates, warm-ups and sizes of the original's steps."""
    changed = {
        "lr": float(numbers["lr"]),
        "weight_decay": float(numbers["weight_decay"]),
        "lr_warmup_steps": 0,
        "warmup_steps": 0,
        "pseudo_warmup_steps": 0,
        "augmentation": "none",
        "teacher_size": (128, 160),
        "device": "cpu",
    }
    recipe = find_recipe(RECIPES[name]).settings
    settings = TrainSettings(**{**recipe, **changed}, data=Path(), output=Path())
    student = released_network(only("student", released_shapes(name)))
    model = supervise(student, settings).train()
    optimizer = build_optimizer(student, settings)
    return RunState(model, optimizer, build_schedule(optimizer, settings)), settings


def _entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a network's entries without counters, with a scale per level as in the original."""
    entries = {key: value.clone() for key, value in state.items() if "num_batches" not in key}
    scales = entries.pop(SCALES)
    return {**entries, **{f"{SCALES}.{level}.scale": value for level, value in enumerate(scales)}}


def _changes(numbers: dict[str, np.ndarray], network: str) -> dict[str, float]:
    """The original's changes of a network's entries, by their names here."""
    prefix = f"change_{network}."
    changes = {
        condinst_name(key.removeprefix(prefix)): float(value)
        for key, value in numbers.items()
        if key.startswith(prefix)
    }
    changes.pop(None, None)  # a counter of iterations, which is no entry here
    return changes
