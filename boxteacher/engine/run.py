"""A run's folder, settings and state."""

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
    """The path of the checkpoint of a run in that folder.

    Raises:
        InputError: it exists already, or the folder is a file.
    """
    checkpoint = output / "last.pt"
    if checkpoint.exists():
        raise InputError(f"{checkpoint} exists: give another --output, or remove that run first")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder as --output")
    return checkpoint


def write_settings(settings: TrainSettings) -> None:
    """Creates the run's folder with `settings.json`."""
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
    """Writes the checkpoint ten times during a run of `steps` steps, the last time after the last step."""
    if state.step % math.ceil(steps / _CHECKPOINTS_PER_RUN) == 0 or state.step == steps:
        state.model.synchronize()  # the teacher follows the step just taken
        save_checkpoint(checkpoint, state.model.segmenter, info)
        state.saved = state.step
