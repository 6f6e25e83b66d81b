"""What is wrong with a data set: every problem of one reading, and what becomes of them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set; `str` says it in one line.

    Attributes:
        file: annotations or image at fault.
        record: name of the record in that file, such as "annotations[3] (id 7)"; empty for the whole file.
        what: fault, with the value found.
        remedy: remedy, in the same words for all problems of one kind.
        severity: "error" if the data set must not be used as it is, else "warning".
    """

    file: Path
    record: str
    what: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.record}: ' if self.record else ''}{self.what}; {self.remedy}"


class RecordError(Exception):
    """Stops the reading of one record; the reader goes on with the next."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def raise_first_error(problems: Iterable[Problem]) -> None:
    """Logs the warnings, one line for all of a kind, and raises the first error if there is one.

    Raises:
        InputError: the first error, and the number of all errors if there are more.
    """
    kinds: dict[str, list[Problem]] = {}
    errors = []
    for problem in problems:
        if problem.severity == "error":
            errors.append(problem)
        else:
            kinds.setdefault(problem.remedy, []).append(problem)
    for first, *others in kinds.values():
        logger.warning("%s%s", first, f" ({len(others)} more like this)" if others else "")
    if errors:
        raise InputError(f"{errors[0]}{f' (first of {len(errors)} errors)' if errors[1:] else ''}")
