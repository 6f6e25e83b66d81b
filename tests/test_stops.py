"""What stops a run: one line, which says what is kept; and one run per folder."""

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from boxteacher import BoxTeacher, InputError
from boxteacher.cli import main
from boxteacher.engine import lock as lock_module
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.files import write_atomically, write_tensors
from boxteacher.engine.lock import locked
from tests.engine_support import error_of, log_of, train_arguments

FULL_DISK = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="there is no /dev/full")


@pytest.fixture
def during_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Lets something happen during a step, 1 …, of each run."""

    def during(step: int, happen: Callable[[], Any]) -> None:
        forward = BoxTeacher.forward

        def disturbed(self: BoxTeacher, *args: Any) -> Any:
            if self.training and self.optimizer_steps == step - 1:
                happen()
            return forward(self, *args)

        monkeypatch.setattr(BoxTeacher, "forward", disturbed)

    return during


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Interrupts the process as Ctrl-C does, also where a shell started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_run_in_one_line_with_exit_code_130(shapes, tmp_path, capsys, during_step, ctrl_c):
    run = tmp_path / "run"
    during_step(4, ctrl_c)
    message = error_of([*train_arguments(shapes, run), "--steps", "20"], capsys, code=130)
    assert message == f"boxteacher: interrupted; stopped after step 3, {run}/last.pt of step 2 is kept"
    load_checkpoint(run / "last.pt")
    assert len(log_of(run)) == 3


def test_ctrl_c_before_the_first_step_ends_a_run_in_one_line(shapes, tmp_path, capsys, during_step, ctrl_c):
    during_step(1, ctrl_c)
    message = error_of(train_arguments(shapes, tmp_path / "run"), capsys, code=130)
    assert message == "boxteacher: interrupted"


@needs_full_disk
@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("last.pt.partial", "stopped after step 2, {run}/last.pt of step 1 is kept"),
        ("log.jsonl", "stopped after step 1, no checkpoint is kept"),
        ("settings.json.partial", "check the path, its permissions and the disk"),
    ],
)
def test_a_full_disk_ends_a_run_in_one_line(shapes, tmp_path, capsys, during_step, file, kept):
    run = tmp_path / "run"
    run.mkdir()
    if file == "last.pt.partial":
        during_step(2, lambda: (run / file).symlink_to(FULL_DISK))
    else:
        (run / file).symlink_to(FULL_DISK)
    capsys.readouterr()
    assert main(train_arguments(shapes, run)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("boxteacher: error: [Errno 28] No space left on device")
    assert f"'{run}" in message
    assert message.endswith(kept.format(run=run))
    if file == "last.pt.partial":
        load_checkpoint(run / "last.pt")
    assert not list(run.glob("*.partial"))


def test_a_folder_that_is_removed_ends_a_run_in_one_line(shapes, tmp_path, capsys, during_step):
    run = tmp_path / "run"
    during_step(2, lambda: shutil.rmtree(run))
    capsys.readouterr()
    assert main(train_arguments(shapes, run, "--steps", "40")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"No such file or directory: '{run}'" in message
    assert message.endswith("stopped after step 2, no checkpoint is kept")
    assert not run.exists()


@needs_full_disk
def test_a_write_to_a_full_disk_names_the_file_and_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"first")
    (tmp_path / "weights.pt.partial").symlink_to(FULL_DISK)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, lambda temporary: write_tensors(temporary, torch.ones(9)))
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_running(
    shapes, tmp_path, capsys, during_step
):
    run = tmp_path / "run"
    lines: list[str] = []
    started: list[bool] = []

    def start_another() -> None:
        if not started:  # the second run passes this step too, if it is not refused
            started.append(True)
            lines.append(error_of(train_arguments(shapes, run, "--seed", "1"), capsys))

    during_step(1, start_another)
    assert main(train_arguments(shapes, run)) == 0
    (line,) = lines
    assert line.startswith(f"boxteacher: error: {run}: another run is writing to it: give another --output")
    assert [line["step"] for line in log_of(run)] == [1, 2, 3]
    assert '"seed": 0' in (run / "settings.json").read_text()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""  # without this library, whose import takes seconds


def test_a_killed_process_leaves_no_lock(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, tmp_path / "lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_logs_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock_module, "_lock", unsupported)
    with locked(tmp_path):
        assert "do not start a second run" in caplog.text


def test_evaluate_prints_its_table_where_it_cannot_write(shapes, run, tmp_path, capsys, caplog):
    shutil.copy(run / "last.pt", tmp_path)
    (tmp_path / "metrics.json").mkdir()  # as root, no folder is read-only
    assert main(["evaluate", str(tmp_path / "last.pt"), "--data", str(shapes), "--workers", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum("Average Precision" in line for line in printed) == 12
    assert printed[-1].startswith('{"segm"')
    assert "the figures are not saved" in caplog.text
    assert str(tmp_path / "metrics.json") in caplog.text


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("scipy", "train --model mask2former --backbone resnet18 --weights none --image-size 64 --workers 0"),
        ("timm", "train --model condinst --backbone efficientnet_lite0 --image-size 64 --workers 0"),
        ("timm", "demo"),
    ],
)
def test_a_missing_extra_is_named_before_a_folder_is_made(
    shapes, tmp_path, capsys, monkeypatch, package, command
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    arguments = [*command.split(), "--output", str(tmp_path / "output")]
    if command != "demo":
        arguments += ["--data", str(shapes), "--device", "cpu"]
    assert "install boxteacher[" in error_of(arguments, capsys)
    assert not (tmp_path / "output").exists()
