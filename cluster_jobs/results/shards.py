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

from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DataError, DiskError, RecipeError
from deepclust.run.directory import Run


@contextlib.contextmanager
def open_shards(shards: str, run: Run) -> Iterator[Index]:
    """Yield the index of shards: that of the run, the one beside them, or else one made for this.

    A temporary index is gone afterwards. Raises what `open_index` raises.
    """
    with contextlib.ExitStack() as stack:
        try:
            index = open_own(run) if _are_own(shards, run) else open_index(shards)
        except (DiskError, RecipeError):  # nothing can be written beside them
            index = _open_elsewhere(shards, run, stack)
        yield index


def open_own(run: Run) -> Index:
    """Return the index of the shards that a run is trained on."""
    data = run.recipe.data
    return open_index(data.shards, data.index, run.path)


def _are_own(shards: str, run: Run) -> bool:
    """Return whether these are the run's shards, by name or by folder."""
    own = run.recipe.data.shards
    if str(shards) == str(own):
        return True
    folders = isinstance(own, str) and os.path.isdir(shards) and os.path.isdir(own)
    return folders and os.path.samefile(shards, own)


def _open_elsewhere(shards: str, run: Run, stack: contextlib.ExitStack) -> Index:
    """Return an index that is kept in the run, or in a temporary folder."""
    name = hashlib.blake2b(str(shards).encode(), digest_size=4).hexdigest()
    # DataError: the shards have changed since
    with contextlib.suppress(DiskError, DataError, OSError):
        return open_index(shards, run.path / "evaluations" / f"index-{name}")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deepclust-"))
    return open_index(shards, Path(folder) / "index")
