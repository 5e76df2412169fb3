"""Peak of what a process allocates, RssAnon, above what it has now; watched by another process.

File pages that the kernel can drop don't count. A thread would miss what happens while a library
holds the interpreter's lock, so `python memory.py PID` looks every 2 ms from outside (Linux).
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from types import TracebackType
from typing import Self

EVERY_S = 0.002


class Peak:
    """`with Peak() as peak: ...`, then `peak.bytes`. Import everything before."""

    def __enter__(self) -> Self:
        self.before = anonymous(os.getpid())
        command = [sys.executable, __file__, str(os.getpid())]
        self.watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.watcher.stdout.readline()  # it watches
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        most, _ = self.watcher.communicate()
        self.bytes = int(most) - self.before


def anonymous(process: int) -> int:
    """RssAnon of a process in bytes."""
    with open(f"/proc/{process}/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Watch until the other side closes our input; print the largest value seen."""
    watched, most = int(sys.argv[1]), 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        most = max(most, anonymous(watched))
    print(max(most, anonymous(watched)))


if __name__ == "__main__":
    main()
