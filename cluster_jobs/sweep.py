"""A sweep: one recipe with several values of a key, each in its run directory of one folder."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from deepclust.errors import RecipeError, argument

COMMA = re.compile(r",(?![^\[{]*[\]}])")  # but not inside of a list or mapping


def points(sweep: list[str]) -> list[list[str]]:
    """Return the overrides of every run: all combinations of `key=value,value,...`, in order."""
    axes = [_axis(text) for text in sweep]
    keys = [text.partition("=")[0] for text in sweep]
    if len(set(keys)) < len(keys):
        raise RecipeError("--sweep has a key twice; write key=1,2,3")
    return [list(point) for point in itertools.product(*axes)]


def run_dirs(folder: Path, sweep: list[str]) -> dict[Path, list[str]]:
    """Return the run directory of every point.

    Raises `RecipeError` when two are the same.
    """
    wanted = points(sweep)
    by_path = {run_dir(folder, point): point for point in wanted}
    if len(by_path) < len(wanted):
        raise RecipeError(f"--sweep {' '.join(sweep)}: two runs would have the same name")
    return by_path


def run_dir(folder: Path, point: list[str]) -> Path:
    """Return the run directory of a point, named like `cluster.k=1000,train.lr=0.1`.

    A name shows no secret, so two values that differ in nothing else have one name.
    """
    return folder / ",".join(argument(word) for word in point).replace("/", "_")


def _axis(text: str) -> list[str]:
    key, separator, words = text.partition("=")
    values = [value.strip() for value in COMMA.split(words)]
    if not separator or not key or "" in values:
        raise RecipeError(f"--sweep {text!r} is not of the form section.key=1,2,3")
    if len(set(values)) < len(values):
        raise RecipeError(f"--sweep {text!r} has a value twice")
    return [f"{key}={value}" for value in values]
