"""Parts that a recipe chooses by name: a row of a table, or any importable module.

A table maps names to packages that have a `config.py` (the part's section, torch-free) and a module
with the part itself. A name with a dot is any module or package of the same kind. So a user's part
needs no edit of this package.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from deepclust.errors import RecipeError
from deepclust.files import import_named
from deepclust.recipe.plain import short


def section_of(name: str, table: Mapping[str, str], base: type) -> Any:
    """Return the `Config` class of a named part, a subclass of `base`.

    Raises RecipeError for an unknown name, with the nearest known one, and for a module that cannot
    be imported or has no such class.
    """
    return _attribute(_module(_path(name, table), "config"), "Config", base)


def part_of(name: str, table: Mapping[str, str], kind: str) -> Any:
    """Return the class of a named part: `Method` of its `method.py`, `Term` of its `term.py`."""
    return _attribute(_module(_path(name, table), kind), kind.capitalize(), object)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or all of them."""
    known = [*known]
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}"


def _path(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    if "." in name:
        return name
    raise RecipeError(f"unknown {short(repr(name))}{nearest(name, list(table))}")


def _module(path: str, part: str) -> ModuleType:
    """Import the module `part` of a package, or a module that holds all in one file."""
    whole = sys.modules.get(path) or import_named(path)
    return import_named(f"{path}.{part}") if hasattr(whole, "__path__") else whole


def _attribute(module: ModuleType, name: str, base: type) -> Any:
    part = getattr(module, name, None)
    if not (isinstance(part, type) and issubclass(part, base)):
        raise RecipeError(f"{module.__name__} has no class {name} derived from {base.__name__}")
    return part
