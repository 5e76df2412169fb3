"""Overrides such as `cluster.k=1000`, applied to a recipe's tree of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepclust.errors import RecipeError
from deepclust.recipe.plain import MOST_LEVELS, parse, short

PATHS = {
    *("data.shards", "data.index", "data.scratch", "data.stage"),
    *("init.weights", "init.assignments", "seeds.labels", "seeds.held_out"),
}

HUBS = ("torchvision:", "timm:", "hf-hub:")  # init.weights may name weights in a library


def apply_overrides(
    tree: dict[str, Any], overrides: Sequence[str], default_method: str
) -> dict[str, Any]:
    """Change the tree by all overrides and return it.

    The name of a method comes first: another method begins with its own defaults. Raises
    RecipeError for an override that is not of the form section.key=value.
    """
    if wrong := [one for one in overrides if not isinstance(one, str)]:
        raise RecipeError(f"override {short(repr(wrong[0]))} is not a text such as 'cluster.k=100'")
    for override in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        _apply(tree, override, default_method)
    return tree


def _apply(tree: dict[str, Any], override: str, default_method: str) -> None:
    key, separator, text = override.partition("=")
    shown = short(repr(override))
    if not separator or not key:
        raise RecipeError(f"override {shown} is not of the form section.key=value")
    *sections, last = key.split(".")
    if len(sections) > MOST_LEVELS:
        raise RecipeError(f"override {shown} has too many levels")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        inner = tree[section]
        if not isinstance(inner, dict):
            raise RecipeError(f"override {shown}: {short(section)} is a value, not a section")
        tree = inner
    if key in PATHS and text not in ("", "null", "~"):
        tree[last] = text  # a path is not YAML: "#", ":" and braces are letters in it
        return
    if key == "method.name" and tree.get(last, default_method) != text:
        tree.clear()
    tree[last] = parse(text, f"the value of override {shown}")
