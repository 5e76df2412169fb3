"""A sweep: one recipe with several values of a key, each a run of its own in one folder."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from deepclust.errors import RecipeError

COMMA = re.compile(r",(?![^\[{]*[\]}])")  # but not inside of a list or mapping


def points(sweep: list[str]) -> list[list[str]]:
    """Overrides for every run: all combinations of `key=value,value,...`, in that order."""
    axes = [_axis(text) for text in sweep]
    keys = [text.partition("=")[0] for text in sweep]
    if len(set(keys)) < len(keys):
        raise RecipeError("--sweep: the same key twice; write key=1,2,3")
    return [list(point) for point in itertools.product(*axes)]


def places(folder: Path, sweep: list[str]) -> dict[Path, list[str]]:
    """The run directory of every point. Raises `RecipeError` when two would be one."""
    wanted = points(sweep)
    found = {place(folder, point): point for point in wanted}
    if len(found) < len(wanted):
        raise RecipeError(f"--sweep {' '.join(sweep)}: two runs would have the same name")
    return found


def place(folder: Path, point: list[str]) -> Path:
    """The run directory of a point, named as it is written: `cluster.k=1000,train.lr=0.1`."""
    return folder / ",".join(point).replace("/", "_")


def _axis(text: str) -> list[str]:
    key, separator, values = text.partition("=")
    given = [value.strip() for value in COMMA.split(values)]
    if not separator or not key or "" in given:
        raise RecipeError(f"--sweep {text!r} is not of the form section.key=1,2,3")
    if len(set(given)) < len(given):
        raise RecipeError(f"--sweep {text!r} has a value twice")
    return [f"{key}={value}" for value in given]
