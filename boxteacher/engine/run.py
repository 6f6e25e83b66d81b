"""A run's folder, and what changes while the run goes on."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from boxteacher import __version__
from boxteacher.engine.checkpoint import SegmenterInfo, save_checkpoint
from boxteacher.engine.files import write_atomically
from boxteacher.engine.settings import TrainSettings
from boxteacher.errors import InputError
from boxteacher.supervision import TrainingWrapper

_CHECKPOINTS_PER_RUN = 10


@dataclass
class RunState:
    """What changes while a run goes on.

    Attributes:
        model: student, with what teaches it.
        optimizer: optimizer of the student.
        schedule: schedule of the learning rate.
        step: number of steps that have been taken.
        saved: step of `last.pt`; 0 if there is none.
    """

    model: TrainingWrapper
    optimizer: Optimizer
    schedule: LRScheduler
    step: int = 0
    saved: int = 0


def new_checkpoint(output: Path) -> Path:
    """The path of the checkpoint of a run in that folder.

    Raises:
        InputError: there is one of an earlier run, or the folder is a file.
    """
    checkpoint = output / "last.pt"
    if checkpoint.exists():
        raise InputError(f"{checkpoint} exists: give another --output, or remove that run first")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder as --output")
    return checkpoint


def write_settings(settings: TrainSettings) -> None:
    """Makes the run's folder, and `settings.json` in it."""
    settings.output.mkdir(parents=True, exist_ok=True)
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
    """Writes the checkpoint ten times in a run of so many steps, the last time after the last step."""
    if state.step % math.ceil(steps / _CHECKPOINTS_PER_RUN) == 0 or state.step == steps:
        save_checkpoint(checkpoint, state.model.segmenter, info)
        state.saved = state.step
