"""The first line of a run's recipe.yaml: a digest of the keys that decide its results.

A bit that flips in a learning rate gives a valid recipe. A resume with it would give other weights
than the run had begun to make. The digest is of the plain values in the file. So a key that a later
version adds does not count as a change. Keys that may change on resume are left out. Recipes of
older versions have no such line and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from deepclust.errors import RunDiffersError
from deepclust.files import read_bytes
from deepclust.recipe.may_change import may_change
from deepclust.recipe.plain import flatten, parse

MARK = "# digest of the keys that decide the results: "


def seal(text: str) -> str:
    """Return the YAML of a recipe under a line with its digest."""
    return f"{MARK}{_digest(parse(text, 'recipe'))}\n{text}"


def check_seal(path: Path) -> None:
    """Raise `RunDiffersError` when a run's recipe has changed since the run wrote it."""
    first, _, text = read_bytes(path).decode("utf-8", "replace").partition("\n")
    if not first.startswith(MARK) or first.removeprefix(MARK) == _digest(parse(text, str(path))):
        return
    raise RunDiffersError(
        f"{path} has changed since the run wrote it, in a key that decides the results. Undo the "
        "change. What a resume may change, it changes by itself: deepclust resume RUN a.b=c. If "
        "the change is meant, delete the first line of that file: the results from there on are "
        "those of another recipe."
    )


def _digest(tree: Any) -> str:
    """Return the blake2b of the dotted keys and their values."""
    pairs = [pair for pair in flatten(tree) if not may_change(pair[0], longer=False)]
    text = json.dumps(sorted(pairs, key=lambda pair: pair[0]))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
