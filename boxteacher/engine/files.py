"""Files that are written whole or not at all."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from boxteacher.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place in one step.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            write(temporary)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, content: Any) -> None:
    """`torch.save`, which by itself hides the reason why a file cannot be written.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the path in an OSError: that of a write to a full disk names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def check_new_file(path: Path) -> None:
    """Raises InputError if the file exists already, or its folder does not."""
    if path.exists():
        raise InputError(f"{path} exists: move it away or give another name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}: make it or give another name")
