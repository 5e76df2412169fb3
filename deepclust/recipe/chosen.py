"""The sections of a recipe that depend on a name in it: those of the method and of the terms."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from deepclust.errors import RecipeError
from deepclust.recipe.named import section_of
from deepclust.recipe.sections import MethodSection, TermSection

if TYPE_CHECKING:
    from deepclust.recipe.recipe import Recipe


class _UnknownMethod(MethodSection):
    model_config = ConfigDict(extra="ignore")

    def chance_loss(self, recipe: Recipe) -> float:
        return math.nan


class _UnknownTerm(TermSection):
    model_config = ConfigDict(extra="ignore")


Terms = tuple[tuple[str, type[TermSection]], ...]


def choose_sections(
    tree: dict[str, Any],
) -> tuple[dict[str, Any], tuple[type[MethodSection], Terms], list[str]]:
    """Return the tree with a method's name in it, the sections, and the problems with names.

    The tables are `METHODS` and `TERMS` of `deepclust.methods`. Of an unknown name any section is
    taken, so that the problems of the other sections are found too.
    """
    problems: list[str] = []
    method, terms = tree.get("method", {}), tree.get("terms", {})
    section: type[MethodSection] = _UnknownMethod
    if isinstance(method, dict):
        methods = _tables("deepclust.methods")
        method = {"name": methods.DEFAULT, **method}
        tree = {**tree, "method": method}
        try:
            section = section_of(str(method["name"]), methods.METHODS, MethodSection)
        except RecipeError as error:
            problems.append(f"method.name: {error}")
    table, chosen = _tables("deepclust.methods.terms").TERMS, dict[str, type[TermSection]]()
    for name in terms if isinstance(terms, dict) else ():
        try:
            chosen[name] = section_of(str(name), table, TermSection)
        except RecipeError as error:
            if isinstance(name, str) and name.isprintable():  # else no field for pydantic
                chosen[name] = _UnknownTerm
            problems.append(f"terms.{name}: {error}")
    return tree, (section, tuple(chosen.items())), problems


def default_method() -> str:
    """Return the name of the method of a recipe that names none."""
    return str(_tables("deepclust.methods").DEFAULT)


def _tables(module: str) -> Any:
    # imported late: the sections of methods derive from ours
    return import_module(module)
