"""What the fork server of the reader processes does at its start: it imports this module first.

The fork server must end when the rank ends, even if a reader is stopped (SIGSTOP). Each reader
holds the pipe open that the fork server would take for the life of the rank. So a timer looks at
the parent's pid. The kernel then kills the readers, which ask for that right after their fork.
Nothing else may import this module: it acts on the process that imports it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LOOK_S = 1.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_parent = os.getppid()


def _look(_signal: int, _frame: object) -> None:
    if os.getppid() != _parent:
        os._exit(1)


def _die_with_fork_server() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


signal.signal(signal.SIGALRM, _look)
signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)  # a fork does not inherit it
os.register_at_fork(after_in_child=_die_with_fork_server)
