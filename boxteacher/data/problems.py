"""Problems of a data set: errors, which are raised, and warnings, which are logged."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """A problem of a data set; `str` is one line.

    Attributes:
        file: annotation file or image with the problem.
        record: name of the record in that file, such as "annotations[3] (id 7)"; empty for the whole file.
        what: description with the value found.
        remedy: remedy, the same text for all problems of a kind.
        severity: "error" if the data set cannot be used as it is, else "warning".
    """

    file: Path
    record: str
    what: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.record}: ' if self.record else ''}{self.what}; {self.remedy}"


class RecordError(Exception):
    """Ends the reading of one record; the reader continues with the next."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def log_warnings(problems: Iterable[Problem]) -> None:
    """Logs the warnings among the problems, one line per kind."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity == "warning":
            kinds.setdefault(problem.remedy, []).append(problem)
    for first, *others in kinds.values():
        logger.warning("%s%s", first, f" ({len(others)} more like this)" if others else "")


def raise_first_error(problems: Sequence[Problem]) -> None:
    """Logs warnings, one line per kind, and raises the first error if there is one.

    Raises:
        InputError: the first error, with the number of errors if there are more.
    """
    log_warnings(problems)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise InputError(f"{errors[0]}{f' (first of {len(errors)} errors)' if errors[1:] else ''}")
