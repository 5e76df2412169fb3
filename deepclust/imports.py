"""Importing modules that a recipe, a run or a command names, such as a user's own method."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from deepclust.errors import RecipeError


def import_named(name: str) -> ModuleType:
    """Import the module of a dotted name.

    A recipe or a run directory may come from anybody, and some modules act when they are imported
    (`ensurepip.__main__` installs packages). So names of the standard library and names with a
    leading underscore are refused. A run's own folder is never on the path. Raises RecipeError.
    """
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or not all(part[:1].isalpha() for part in parts):
        raise RecipeError(f"{name!r} is not the name of a module that may be imported: use a.b.c")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"{name!r} cannot be imported ({error}); put its folder into PYTHONPATH"
        ) from error
