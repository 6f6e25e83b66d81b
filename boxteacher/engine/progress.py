"""Logging of a run: a progress bar, `log.jsonl`, and TensorBoard where it is installed."""

import importlib.util
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from boxteacher.engine.files import naming

logger = logging.getLogger(__name__)

_SMOOTHING = 0.95
_LINES_PER_RUN = 20
_NOT_SHOWN = ("gradient_norm", "lr")


class TrainingLog:
    """Logs every step to `RUN/log.jsonl` and, for TensorBoard, to `RUN/tensorboard`, and shows progress.

    Progress is a bar with tqdm (extra `train`), otherwise twenty log lines per run.

    Args:
        output: existing folder of the run.
        steps: number of steps of the run.
    """

    def __init__(self, output: Path, steps: int) -> None:
        self._steps = steps
        self._output = output
        self._file = (output / "log.jsonl").open("w")
        self._bar = _progress_bar(steps)
        self._board = _tensorboard(output / "tensorboard")
        self._start = time.perf_counter()
        self._smooth: dict[str, float] = {}

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with naming(self._output), _no_thread_traces(), ExitStack() as closing:
            for each in (self._file, self._bar, self._board):
                if each is not None:
                    closing.callback(each.close)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Logs one step.

        Args:
            step: number of the step, 1 … steps.
            numbers: losses (`loss_…`), without their sum, and other scalars.

        Raises:
            OSError: the log cannot be written, or was removed.
        """
        total = sum(value for name, value in numbers.items() if name.startswith("loss_"))
        numbers = {"loss": total, **numbers}
        seconds = time.perf_counter() - self._start
        rounded = {name: float(f"{value:.6g}") for name, value in numbers.items()}
        line = {"step": step, **rounded, "seconds": round(seconds, 2)}
        with naming(self._output):
            Path(self._file.name).stat()  # a write to a file that was removed raises no error
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, step)
        for name, value in numbers.items():
            self._smooth[name] = _SMOOTHING * self._smooth.get(name, value) + (1 - _SMOOTHING) * value
        self._show(step, seconds)

    def _show(self, step: int, seconds: float) -> None:
        shown = {name: value for name, value in self._smooth.items() if name not in _NOT_SHOWN}
        short = {name.removeprefix("loss_"): f"{value:.2g}" for name, value in shown.items()}
        if self._bar is not None:
            self._bar.set_postfix(short, refresh=False)
            self._bar.update()
        elif step % max(1, self._steps // _LINES_PER_RUN) == 0:
            left = seconds / step * (self._steps - step)
            numbers = " ".join(f"{name}={value}" for name, value in short.items())
            logger.info("step %d/%d, %.0f s left: %s", step, self._steps, left, numbers)


@contextmanager
def _no_thread_traces() -> Iterator[None]:
    """Silences TensorBoard's thread: what fails there on closing is raised in the main thread as well."""
    hook = threading.excepthook
    threading.excepthook = lambda failed: None
    try:
        yield
    finally:
        threading.excepthook = hook


def _progress_bar(steps: int) -> Any:
    if importlib.util.find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=1.0)


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
