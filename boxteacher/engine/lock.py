"""A lock on a run's folder, which ends with its process."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from boxteacher.errors import InputError

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the file `lock` in an existing folder.

    The operating system releases it when the process ends, however it ends. On a file system without locks a
    warning is logged.

    Raises:
        InputError: another run holds the lock.
    """
    with (folder / "lock").open("a") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as error:  # POSIX, Windows
            raise InputError(
                f"{folder}: another run is writing to it: give another --output, or wait until it ends"
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not start a second run in it", folder, error)
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
