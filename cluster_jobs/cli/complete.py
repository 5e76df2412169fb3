"""What the shell offers at the TAB key: recipes, their keys, runs, guides (--install-completion).

The shell completes paths by itself where nothing is offered. Nothing is ever raised here: a shell
would show the traceback in the middle of what is typed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import typer

from deepclust.errors import DeepclustError

RECIPES = ("recipe", "name")  # the arguments of verbs that hold one
DEFAULT = "small-photos"
KINDS = ("recipes", "methods", "terms", "backbones", "keys")


def recipes(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin so."""
    from deepclust.recipe.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the keys of the recipe that is typed before, of a run's, or of any, with their =."""
    from deepclust.recipe import Recipe

    if "=" in incomplete:
        return []
    try:
        given = next((ctx.params[name] for name in RECIPES if ctx.params.get(name)), None)
        run = ctx.params.get("run_dir") if given is None else None
        source = given or (Path(run) / "recipe.yaml" if run else DEFAULT)
        names = [*Recipe.load(source).flat(), "data.shards"]
    except (DeepclustError, OSError):
        names = [*Recipe.load(DEFAULT).flat(), "data.shards"]
    return [f"{name}=" for name in sorted({*names}) if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Return runs, and folders that may hold some, whose path begins so."""
    try:
        return sorted(_runs(incomplete))
    except OSError:
        return []


def _runs(typed: str) -> Iterator[str]:
    start = typed.rpartition("/")[2]
    place = typed[: len(typed) - len(start)]
    with os.scandir(place or ".") as entries:
        for entry in entries:
            if entry.name.startswith(start) and not entry.name.startswith(".") and entry.is_dir():
                is_run = os.path.lexists(os.path.join(entry.path, "recipe.yaml"))
                yield f"{place}{entry.name}" if is_run else f"{place}{entry.name}/"


def guides(incomplete: str) -> list[str]:
    """Return the guides that begin so."""
    from cluster_jobs import guides

    return [name for name in (*guides.names(), guides.CHANGELOG) if name.startswith(incomplete)]


def kinds(incomplete: str) -> list[str]:
    """Return what `deepclust list` can list."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]
