"""The peaks of a command while it runs: memory of all its processes, and bytes of its folder.

Memory is what the kernel cannot drop: the processes' own pages, and their part of shared ones
(Pss_Anon and Pss_Shmem of /proc). Pages of files are not counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

EVERY_S = 0.25
COUNTED = ("Pss_Anon:", "Pss_Shmem:")


class Watch:
    """Looks at a process, its children and a folder, until it is left."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder
        self.memory = self.disk = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread, which has looked at the folder a last time."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        going = True
        while going:
            going = not self._ended.wait(EVERY_S)
            self.memory = max(self.memory, sum(map(held, family(self.pid))))
            self.disk = max(self.disk, folder_bytes(self.folder))


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it, as far as they still run."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(entry.path, "stat").read_text().rpartition(")")[2]
                children.setdefault(int(stat.split()[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def held(pid: int) -> int:
    """Return the bytes of a process that the kernel cannot drop; 0 of one that is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(one.split()[1]) for one in lines if one.startswith(COUNTED))
    return 0


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, which may change meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
