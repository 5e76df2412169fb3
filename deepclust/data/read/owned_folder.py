"""Temporary folders with an owner: the process that made them, which alone may use them.

A killed process leaves its folder behind, and a later one of the same kind deletes it. A pid says
little: it may be of another host, of another container that shares the disk, or used again. So the
folder holds a file with all that names a process. What is not surely dead, and ours, stays.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

FILE = ".owner.json"


def make_folder(parent: Path, kind: str, mark: str = "") -> Path:
    """Make the folder KIND-MARK-RANDOM for this process alone.

    Those of the kind whose owners are dead are deleted. Raises OSError (see `files.disk_errors`).
    """
    for folder in parent.glob(f"{kind}-*"):
        if is_orphan(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{mark}", dir=parent))
    (folder / FILE).write_text(json.dumps(_me()))
    return folder


def is_orphan(folder: Path) -> bool:
    """Return whether a folder is this user's, nobody else's, and its owner has ended."""
    try:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            return False
        owner = json.loads((folder / FILE).read_bytes()[:4096])
        return _has_ended({name: owner[name] for name in _me()})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # of an earlier version, not yet or no longer whole, or not a folder of ours


def _has_ended(owner: dict[str, Any]) -> bool:
    """Return whether a process of this machine and namespace does not live any more."""
    me = _me()
    if owner["host"] != me["host"]:
        return False
    if owner["boot"] != me["boot"]:
        return True
    if owner["pid_space"] != me["pid_space"] or not me["started"]:
        return False
    return _start_time(int(owner["pid"])) != str(owner["started"])


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": platform.node(),
        "boot": _read("/proc/sys/kernel/random/boot_id").strip(),
        "pid_space": _pid_space(),
        "pid": pid,
        "started": _start_time(pid),
    }


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since boot, or "" when it has ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if fields and fields[0] != "Z" else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
