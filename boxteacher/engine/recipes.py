"""Recipes by name: the settings of whole runs, one per file of `boxteacher.recipes`."""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import boxteacher.recipes
from boxteacher.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a whole run without its folders.

    Attributes:
        name: name of its file in `boxteacher.recipes`.
        summary: one line with its published mask AP.
        settings: values of `TrainSettings`, by field.

    Example:
        >>> recipe = find_recipe("condinst_r50_1x")
        >>> settings = TrainSettings(**recipe.settings, data=data, output=output)  # doctest: +SKIP
    """

    name: str
    summary: str
    settings: dict[str, Any]


def recipe_names() -> list[str]:
    """Names that `find_recipe` knows, in alphabetical order."""
    names = (module.name for module in iter_modules(boxteacher.recipes.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in recipe_names():
        raise InputError(f"no recipe {name!r}: take one of {', '.join(recipe_names())}")
    module = import_module(f"boxteacher.recipes.{name}")
    return Recipe(name, (module.__doc__ or "").splitlines()[0], dict(module.SETTINGS))
