"""A run's folder, settings and state."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from boxteacher import __version__
from boxteacher.engine.checkpoint import SegmenterInfo, save_checkpoint
from boxteacher.engine.files import write_atomically
from boxteacher.engine.lock import locked
from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError
from boxteacher.supervision import TrainingWrapper

_CHECKPOINTS_PER_RUN = 10


@dataclass
class RunState:
    """State of a run, which changes with every step.

    Attributes:
        model: training wrapper with the student.
        optimizer: optimizer of the student.
        schedule: learning rate schedule.
        step: number of steps taken.
        saved: step of `last.pt`; 0 if there is none.
    """

    model: TrainingWrapper
    optimizer: Optimizer
    schedule: LRScheduler
    step: int = 0
    saved: int = 0


def new_checkpoint(output: Path) -> Path:
    """The path of the checkpoint of a new run in that folder.

    Raises:
        InputError: another run is writing to the folder or has left a checkpoint there, or it is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder as --output")
    if (output / "lock").exists():
        with locked(output):
            pass
    return _unused(output / "last.pt")


@contextmanager
def run_folder(settings: TrainSettings) -> Iterator[None]:
    """Creates the run's folder with `settings.json`, and refuses other runs in it until this one ends.

    Raises:
        InputError: another run has been faster.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    with locked(settings.output):
        _unused(settings.output / "last.pt")
        _write_settings(settings)
        yield


def _unused(checkpoint: Path) -> Path:
    if checkpoint.exists():
        raise InputError(f"{checkpoint} exists: give another --output, or remove that run first")
    return checkpoint


def _write_settings(settings: TrainSettings) -> None:
    content = {
        **asdict(settings),
        "boxteacher": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(settings.output / "settings.json", lambda path: path.write_text(text))


def save_if_due(state: RunState, checkpoint: Path, info: SegmenterInfo, steps: int) -> None:
    """Writes the checkpoint ten times during a run of `steps` steps, the last time after the last step."""
    if state.step % math.ceil(steps / _CHECKPOINTS_PER_RUN) == 0 or state.step == steps:
        state.model.synchronize()  # the teacher follows the step just taken
        save_checkpoint(checkpoint, state.model.segmenter, info)
        state.saved = state.step


@contextmanager
def noting_what_is_kept(state: RunState, checkpoint: Path) -> Iterator[None]:
    """Adds a note to whatever stops a run, Ctrl-C included: the last step and the checkpoint of the run."""
    try:
        yield
    except BaseException as error:
        if state.step > 0:
            # Not Path.is_file, which raises for a disk that is gone.
            saved = state.saved > 0 and os.path.isfile(checkpoint)
            kept = f"{checkpoint} of step {state.saved} is kept" if saved else "no checkpoint is kept"
            # As `add_note` of Python 3.11.
            vars(error).setdefault("__notes__", []).append(f"stopped after step {state.step}, {kept}")
        raise
