"""Options declared once, as fields of a dataclass, for the command line, the checks and the docs.

`python -m boxteacher.engine.options docs/command_line.md` updates the table of `boxteacher train`.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from boxteacher.errors import InputError

_KINDS = {int: "whole number", float: "number", str: "name", Path: "path"}


def option(default: Any = MISSING, **attributes: Any) -> Any:
    """A field of a dataclass of options, of type int, float, str, Path, Literal, Path | Literal, or a tuple.

    Args:
        default: value, or a function of the settings that uses the fields above; the option is required if
            not given.
        attributes: `help` and further attributes of `Option`.
    """
    return field(default=None if callable(default) else default, metadata={"default": default, **attributes})


@dataclass(frozen=True)
class Option:
    """A field of a dataclass of options.

    Attributes:
        name: name of the field.
        kind: type of values other than the choices; None if there are only choices.
        choices: names that are allowed as values.
        is_tuple: whether the value is a tuple of such values.
        default: value, function of the settings, or MISSING.
        help: meaning in one line that begins with a noun.
        group: heading of this option and of those below it.
        metavar: name of the value in the command's help; the option's name if not given.
        default_text: description of a default whose value is not shown.
        minimum, above, maximum: bounds of a number; `above` is exclusive.
    """

    name: str
    kind: type | None
    choices: tuple[str, ...]
    is_tuple: bool
    default: Any
    help: str
    group: str = ""
    metavar: str | None = None
    default_text: str = ""
    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = math.inf

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def shown_default(self) -> str:
        if self.default_text or self.default is MISSING:
            return self.default_text
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def expected(self) -> str:
        """Description of the allowed values."""
        bounds = {"at least": self.minimum, "above": self.above, "at most": self.maximum}
        bound = " and ".join(f"{name} {value:g}" for name, value in bounds.items() if math.isfinite(value))
        kind = _KINDS[self.kind] if self.kind else ""
        kinds = [f"{kind}s" if self.is_tuple else f"a {kind}"] if kind else []
        *others, last = [*kinds, *self.choices]
        return (f"{', '.join(others)} or " if others else "") + last + (f", {bound}" if bound else "")

    def parse(self, text: str) -> Any:
        return text if self.kind is None or text in self.choices else self.kind(text)

    def allows(self, value: Any) -> bool:
        if self.is_tuple:
            return isinstance(value, tuple) and all(map(self._allows_one, value))
        return self._allows_one(value)

    def _allows_one(self, value: Any) -> bool:
        if value in self.choices:
            return True
        if self.kind is None or not isinstance(value, (int, float) if self.kind is float else self.kind):
            return False
        if not isinstance(value, int | float):
            return True
        return math.isfinite(value) and self.minimum <= value <= self.maximum and value > self.above


def options_of(settings: type) -> Iterator[Option]:
    """The fields of a dataclass of options."""
    hints = get_type_hints(settings)
    for each in fields(settings):
        is_tuple = get_origin(hints[each.name]) is tuple
        hint = get_args(hints[each.name])[0] if is_tuple else hints[each.name]
        parts = (hint,) if isinstance(hint, type) or get_origin(hint) is Literal else get_args(hint)
        choices = tuple(name for part in parts if get_origin(part) is Literal for name in get_args(part))
        kind = next((part for part in parts if isinstance(part, type)), None)
        yield Option(each.name, kind, choices, is_tuple, **each.metadata)


def resolve_options(settings: Any) -> None:
    """Resolves defaults that depend on other options and checks every value; call it in `__post_init__`.

    Lists become tuples, names of files paths, and numbers of other types, such as numpy's, Python's own.

    Raises:
        InputError: a value is of another type or out of range; the message names option, value and range.
    """
    for each in options_of(type(settings)):
        value = getattr(settings, each.name)
        if value is None and callable(each.default):
            value = each.default(settings)
        if each.is_tuple and isinstance(value, list):
            value = tuple(value)
        value = tuple(map(_plain_number, value)) if isinstance(value, tuple) else _plain_number(value)
        if each.kind is Path and isinstance(value, str) and value not in each.choices:
            value = Path(value)
        if not each.allows(value):
            raise InputError(f"{each.name} is {value!r}: give {each.expected}")
        object.__setattr__(settings, each.name, value)


def _plain_number(value: Any) -> Any:
    """A number as bool, int or float, which every file of settings can hold; anything else as it is."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds the fields of a dataclass of options to a parser, whose namespace holds only those given."""
    group: Any = parser
    for each in options_of(settings):
        if each.group:
            group = parser.add_argument_group(each.group)
        text = f"{each.help} (default: {each.shown_default})" if each.shown_default else each.help
        group.add_argument(
            each.flag,
            type=each.parse if each.choices else each.kind,
            nargs="*" if each.is_tuple else None,
            metavar=each.metavar or "|".join(each.choices) or None,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def options_table(settings: type) -> str:
    """The options of a dataclass as a Markdown table."""
    rows = ["| option | meaning | value | default |", "|---|---|---|---|"]
    for each in options_of(settings):
        rows += [f"| **{each.group}** | | | |"] if each.group else []
        rows.append(f"| `{each.flag}` | {each.help} | {each.expected} | {each.shown_default} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    from boxteacher.engine.settings import TrainSettings

    document = Path(sys.argv[1])
    table = options_table(TrainSettings)
    document.write_text(re.sub(r"\| option \|.*?\n(?=\n)", lambda _: table, document.read_text(), flags=re.S))
