"""Opening shards to measure on: an index that cannot be written beside them goes elsewhere.

Shards may be read-only or behind a URL, and a command that only measures has no `data.index` to
set. The index of such shards is kept in the run, or in a temporary folder if the run is read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepclust.data.shards.check import LabelsChangedError
from deepclust.data.shards.find import Shards
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DiskError, MissingError, RecipeError
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run
from deepclust.stages.data_index import open_data_index, open_labelled


@contextlib.contextmanager
def open_shards(shards: Shards, run: Run) -> Iterator[Index]:
    """Yield the labelled index of shards: of the run, beside them, or else one made for this.

    A temporary index is gone afterwards. Raises what `open_index` raises.
    """
    data = run.recipe.data
    with contextlib.ExitStack() as stack:
        try:
            if _are_own(shards, run):
                index = open_labelled(data.shards, data, data.index, run.path)
            else:
                index = open_labelled(shards, data)
        except (DiskError, RecipeError):  # nothing can be written beside them
            index = _open_elsewhere(shards, run, stack)
        yield index


@contextlib.contextmanager
def open_own(run: Run, *, only_read: bool = False) -> Iterator[Index]:
    """Yield the index of the shards that a run is trained on, with the labels that it uses.

    `only_read`: the run may be somebody else's, so nothing but a temporary index is written.
    """
    with contextlib.ExitStack() as stack:
        try:
            index = open_data_index(run.recipe.data, run.path, build=not only_read)
        except (MissingError, LabelsChangedError):
            index = _open_temporarily(run.recipe.data.shards, run, stack)
        except (DiskError, RecipeError):
            index = _open_elsewhere(run.recipe.data.shards, run, stack)
        yield index


def _are_own(shards: Shards, run: Run) -> bool:
    """Return whether these are the run's shards, by name, or by what is there."""
    own = run.recipe.data.shards
    if str(shards) == str(own):
        return True
    if not isinstance(own, str) or not isinstance(shards, str | Path):
        return False
    return os.path.exists(shards) and os.path.exists(own) and os.path.samefile(shards, own)


def _open_elsewhere(shards: Shards, run: Run, stack: contextlib.ExitStack) -> Index:
    """Return an index that is kept in the run, or in a temporary folder."""
    data: Data = run.recipe.data
    name = hashlib.blake2b(str(shards).encode(), digest_size=4).hexdigest()
    # DataError: the shards have changed since
    with contextlib.suppress(DiskError, DataError, OSError):
        return open_labelled(shards, data, run.path / "evaluations" / f"index-{name}")
    return _open_temporarily(shards, run, stack)


def _open_temporarily(shards: Shards, run: Run, stack: contextlib.ExitStack) -> Index:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deepclust-"))
    return open_labelled(shards, run.recipe.data, Path(folder) / "index")
