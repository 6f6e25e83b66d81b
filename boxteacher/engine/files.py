"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boxteacher.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place in one step."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_file(path: Path) -> None:
    """Raises InputError if the file exists already, or its folder does not."""
    if path.exists():
        raise InputError(f"{path} exists: move it away or give another name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}: make it or give another name")
