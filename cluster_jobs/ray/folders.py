"""Temporary folders of Ray on this machine, each with the pid of its owner in its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

TEMPORARY = Path("/tmp")  # short: a socket's path has 107 letters at most


def make_folder(kind: str, mark: str = "") -> Path:
    """Make a folder KIND-MARK-PID-RANDOM, and delete those of the kind whose owner is dead."""
    for folder in TEMPORARY.glob(f"{kind}-*-*"):
        with suppress(FileNotFoundError):  # its owner was first
            if folder.stat().st_uid == os.getuid() and is_orphan(folder):
                shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{kind}-{mark}{os.getpid()}-", dir=TEMPORARY))


def is_orphan(folder: Path) -> bool:
    """Return whether the process that made the folder has ended."""
    pid = folder.name.split("-")[-2]
    return pid.isdigit() and Path("/proc/self").exists() and not Path("/proc", pid).exists()
