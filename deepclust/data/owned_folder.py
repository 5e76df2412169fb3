"""Temporary folders with an owner: the process that made them, which alone may use them.

A killed process leaves its folder behind, and a later one of the same kind deletes it. So the
folder holds a file with all that names a process. What is not surely dead, and ours, stays.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepclust.data.process_identity import has_ended, identity

FILE = ".owner.json"


def make_folder(parent: Path, kind: str, mark: str = "") -> Path:
    """Make the folder KIND-MARK-RANDOM for this process alone.

    Those of the kind whose owners are dead are deleted. Raises OSError (see `files.disk_errors`).
    """
    for folder in parent.glob(f"{kind}-*"):
        if is_orphan(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{mark}", dir=parent))
    (folder / FILE).write_text(json.dumps(identity()))
    return folder


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Mark a folder as this process's own while it is filled (see `sweep`)."""
    (folder / FILE).write_text(json.dumps(identity()))
    yield
    (folder / FILE).unlink()


def sweep(path: Path) -> list[Path]:
    """Delete what killed processes left of a folder that was to become `path`.

    Return what stays, under the same kind of name (`files.temporary`): its owner may live.
    """
    folders = sorted(path.parent.glob(f".{glob.escape(path.name[:60])}.*.tmp"))
    for folder in folders:
        if is_orphan(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in folders if os.path.lexists(folder)]


def is_orphan(folder: Path) -> bool:
    """Return whether a folder is this user's, nobody else's, and its owner has ended."""
    try:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return False
        owner = json.loads((folder / FILE).read_bytes()[:4096])
        return has_ended({name: owner[name] for name in identity()})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # of an earlier version, not yet or no longer whole, or not a folder of ours
