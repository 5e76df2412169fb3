"""What names a process for others: host, boot, pid namespace, pid and start time.

A pid alone says little. It may be of another host, of another container that shares the disk, or
used again.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Return what names this process, as JSON can hold it."""
    pid = os.getpid()
    return {**_surroundings(), "pid": pid, "started": start_time(pid)}


def is_here(process: dict[str, Any]) -> bool:
    """Return whether a process was named in our pid namespace, since this machine was started."""
    return all(process.get(name) == value for name, value in _surroundings().items())


def has_ended(process: dict[str, Any]) -> bool:
    """Return whether a named process surely lives no more: a pid of elsewhere says nothing."""
    here = _surroundings()
    if process["host"] != here["host"]:
        return False
    if process["boot"] != here["boot"]:
        return True
    if process["pid_space"] != here["pid_space"] or start_time(os.getpid()) is None:
        return False
    return bool(start_time(int(process["pid"])) != process["started"])


def start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot, or None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):  # it has ended, or there can be none of that number
        return None
    has_ended = fields[0] == "Z"  # it only waits for its parent to collect it
    return None if has_ended else fields[19]


def _surroundings() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid_space": _pid_space(),
    }


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
