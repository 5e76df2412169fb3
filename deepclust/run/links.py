"""Links in a run directory that lead out of it, through which a writer would leave the run.

Files are replaced by a rename or opened without following a link (`files.py`). A folder on the way
to them is followed, and what is written or deleted in it would be somewhere else. A run directory
may come from anybody, and archives and copies keep such links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deepclust.errors import DiskError
from deepclust.files import disk_errors


def refuse_links_out(run_dir: Path) -> None:
    """Raise `DiskError` naming a link in a run to a folder, or to nothing, outside the run.

    The run directory itself may be a link: the user has named it.
    """
    with disk_errors(run_dir):
        inside = os.path.realpath(run_dir)
        for link in _links(inside):
            target = os.path.realpath(link)
            is_out = os.path.commonpath([inside, target]) != inside
            if is_out and not os.path.isfile(target):
                raise DiskError(
                    f"{link} is a link that leads out of the run, to {target}: what is written "
                    "there would not be in the run. Remove the link, or put the folder itself in "
                    "its place. A whole run may be elsewhere: give its own path."
                )


def _links(folder: str) -> Iterator[Path]:
    """Yield the links in a folder and in its folders."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
