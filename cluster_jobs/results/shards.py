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

from deepclust.data.loose.find import places_of
from deepclust.data.shards.check import LabelsChangedError
from deepclust.data.shards.fields import NONE
from deepclust.data.shards.find import Shards, is_remote
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DiskError, MissingError, RecipeError
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run
from deepclust.run.links import refuse_links_out
from deepclust.stages.data_index import open_data_index, open_kept_index, open_labelled


@contextlib.contextmanager
def open_shards(shards: Shards, run: Run, labels: str | None = None) -> Iterator[Index]:
    """Yield the labelled index of shards: of the run, beside them, or else one made for this.

    `labels` are those of `data.labels` where the run's are not wanted. A temporary index is gone
    afterwards. Raises what `open_index` raises.
    """
    data = with_labels(run.recipe.data, labels)
    with contextlib.ExitStack() as stack:
        try:
            if _are_own(shards, run) and labels is None:
                # nothing is written where only the run's recipe says so
                build = data.index is None
                index = open_labelled(data.shards, data, data.index, run.path, build=build)
            else:
                index = open_labelled(shards, data)
        # nothing can be written beside them
        except (DiskError, RecipeError, MissingError, LabelsChangedError):
            index = _open_elsewhere(shards, run, stack, labels)
        yield index


def with_labels(data: Data, labels: str | None) -> Data:
    """Return how images are read, with other labels where these are given."""
    if labels is None:
        return data
    return Data.model_validate({**data.model_dump(), "labels": labels})


@contextlib.contextmanager
def open_measured(shards: Shards, data: Data) -> Iterator[Index]:
    """Yield the labelled index of shards for no run: beside them, or one that is gone afterwards.

    Raises what `open_index` raises.
    """
    with contextlib.ExitStack() as stack:
        try:
            index = open_labelled(shards, data)
        # nothing can be written beside them
        except (DiskError, RecipeError, MissingError, LabelsChangedError):
            index = _open_temporarily(shards, data, stack)
        yield index


@contextlib.contextmanager
def open_own(run: Run, *, only_read: bool = False, remote: bool = True) -> Iterator[Index]:
    """Yield the index of the shards that a run is trained on, with the labels that it uses.

    `only_read`: the run may be somebody else's, so nothing but a temporary index is written.
    Without `remote` no URL is opened: the index of shards behind one is that which was kept.
    """
    if not remote and is_remote(run.recipe.data.shards):
        yield open_kept_index(run.recipe.data, run.path)
        return
    with contextlib.ExitStack() as stack:
        try:
            index = open_data_index(run.recipe.data, run.path, build=not only_read)
        except (MissingError, LabelsChangedError):
            index = _open_temporarily(run.recipe.data.shards, run.recipe.data, stack)
        except (DiskError, RecipeError):
            index = _open_elsewhere(run.recipe.data.shards, run, stack)
        yield index


def open_given(shards: str, data: Data, folder: Path) -> Index:
    """Return the index of images that are only looked at.

    One that is there is taken. Else one is written beside shards as usual, and in `folder` for
    image files, whose place is the user's, and wherever nothing can be written. `data` says which
    member of a sample is the image. Labels are not needed. Raises what `open_index` raises.
    """
    given = Data.model_validate({**data.model_dump(), "shards": shards, "index": None})
    with contextlib.suppress(DataError, DiskError, RecipeError, LabelsChangedError):
        return open_data_index(given, build=False)
    unlabelled = {"index": str(folder), "labels": NONE}
    apart = Data.model_validate({**given.model_dump(), **unlabelled})
    if is_remote(given.shards) or places_of(given.shards) is not None:
        return open_data_index(apart)
    try:
        return open_data_index(given)
    except (DiskError, RecipeError, LabelsChangedError):
        return open_data_index(apart)


def _are_own(shards: Shards, run: Run) -> bool:
    """Return whether these are the run's shards, by name, or by what is there."""
    own = run.recipe.data.shards
    if str(shards) == str(own):
        return True
    if not isinstance(own, str) or not isinstance(shards, str | Path):
        return False
    return os.path.exists(shards) and os.path.exists(own) and os.path.samefile(shards, own)


def _open_elsewhere(
    shards: Shards, run: Run, stack: contextlib.ExitStack, labels: str | None = None
) -> Index:
    """Return an index that is kept in the run, or in a temporary folder."""
    data = with_labels(run.recipe.data, labels)
    words = str(shards) if labels is None else repr((str(shards), labels))
    name = hashlib.blake2b(words.encode(), digest_size=4).hexdigest()
    # DataError: the shards have changed since
    with contextlib.suppress(DiskError, DataError, OSError):
        refuse_links_out(run.path)
        return open_labelled(shards, data, run.path / "evaluations" / f"index-{name}")
    return _open_temporarily(shards, data, stack)


def _open_temporarily(shards: Shards, data: Data, stack: contextlib.ExitStack) -> Index:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deepclust-"))
    return open_labelled(shards, data, Path(folder) / "index")
