"""One controller for a run: the lock, its heartbeat, and the token that fences off an old one.

The lock names host, boot, pid, start time and, inside a job, the job and its restart. A dead
process on this host frees it at once. A lock of another host is freed when its
heartbeat is two minutes old.
A process that acquires it writes a new token. Every commit compares tokens just before its rename,
so an old controller that wakes up cannot write anything. A controller that restarts its worker
group renews the token, which fences off what is left of the old group in the same way.

A job script sets DEEPCLUST_JOB and DEEPCLUST_RESTART (how often the job was queued again).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepclust.data.process_identity import identity, is_here, start_time
from deepclust.errors import DataError, MissingError, RunHeldError
from deepclust.files import disk_errors, open_append, read_record, temporary, write_json
from deepclust.run.links import refuse_links_out

HEARTBEAT_S = 10.0
STALE_AFTER_S = 120.0
GUARD = ".lock-guard"
MOST = 2**16  # bytes of lock.json
FIELDS = {  # of lock.json
    **dict.fromkeys(("host", "boot", "token"), str),
    "pid": int,
    "started": (str, None),
    "job": (str, None),
    "restart": (int, None),
}


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[str]:
    """Hold the run while the block lasts, and yield the token, or raise `RunHeldError`.

    Raises `DiskError` for a run with a link that leads out of it.
    """
    refuse_links_out(run_dir)
    # the open file shows that this process works on the run (see `works_on`)
    with _guard(run_dir):
        token = _acquire(run_dir)
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(run_dir, stop), daemon=True)
        beat.start()
        try:
            yield token
        finally:
            stop.set()
            beat.join()
            _release(run_dir)


def _release(run_dir: Path) -> None:
    """Remove our lock; where that fails it is stale once this process has ended."""
    # an error here would hide the one that ended the block
    with contextlib.suppress(OSError, DataError):
        if _is_mine(_read(run_dir)):
            (run_dir / "lock.json").unlink(missing_ok=True)


def renew(run_dir: Path, token: str) -> str:
    """Write and return a new token for the same holder, which fences off the old one.

    Raises `RunHeldError` when the run is no longer held by that token.
    """
    with _guarded(run_dir):
        check_token(run_dir, token)
        return _write(run_dir)


def check_token(run_dir: Path, token: str) -> None:
    """Raise `RunHeldError` unless the lock still has this token."""
    if not run_dir.is_dir():
        raise MissingError(f"the run {run_dir} is gone: it was moved or deleted while it ran")
    if _token(run_dir) != token:
        holder = owner(run_dir) or "the lock is gone"
        raise RunHeldError(
            f"{run_dir} was taken over by another controller ({holder}); this process writes "
            "nothing more"
        )


def owner(run_dir: Path) -> str | None:
    """Return who holds the run, in words, or None when no living process does."""
    lock = _read(run_dir)
    if lock is None or _is_stale(run_dir, lock):
        return None
    job = f", job {lock['job']}" if lock["job"] else ""
    return f"process {lock['pid']} on {lock['host']}{job}"


def owner_job(run_dir: Path) -> str | None:
    """Return the job of the process that holds the run, if it is in one."""
    lock = _read(run_dir)
    return None if lock is None or _is_stale(run_dir, lock) else lock["job"]


def owner_pid(run_dir: Path) -> int | None:
    """Return the pid of the living controller, when it is on this machine."""
    lock = _read(run_dir)
    if lock is None or _is_stale(run_dir, lock) or not is_here(lock):
        return None
    return int(lock["pid"])


def works_on(run_dir: Path, pid: int) -> bool:
    """Return whether a process of this machine and user has files of the run open.

    A lock that came with somebody else's run may name any process, so a pid in it is not enough
    to send a signal. Only a controller has the run's guard, log or output open.
    """
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        guard = os.stat(run_dir / GUARD)
        handles = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False
    for handle in handles:
        with contextlib.suppress(OSError):  # closed in the meantime
            if os.path.samestat(handle.stat(), guard):
                return True
    return False


def _acquire(run_dir: Path) -> str:
    with _guarded(run_dir):
        _refuse_held(run_dir)
        return _write(run_dir)


def _refuse_held(run_dir: Path) -> None:
    if holder := owner(run_dir):
        raise RunHeldError(
            f"{run_dir} is held by {holder}. Watch it with `deepclust status {run_dir}`, or "
            f"end it with `deepclust cancel {run_dir}`."
        )


@contextlib.contextmanager
def unheld(run_dir: Path) -> Iterator[None]:
    """Keep others of this host from acquiring a run during a short block, without a lock of ours.

    Raises `RunHeldError` when somebody holds it, and `DiskError` for a run with a link that leads
    out of it. This writes nothing, so a full disk allows it.
    """
    refuse_links_out(run_dir)
    with _guarded(run_dir):
        _refuse_held(run_dir)
        yield


@contextlib.contextmanager
def _guarded(run_dir: Path) -> Iterator[None]:
    """Let one process of this host at a time write the lock.

    Across hosts the token decides.
    """
    with _guard(run_dir) as guard:
        with disk_errors(run_dir):
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _guard(run_dir: Path) -> BinaryIO:
    with disk_errors(run_dir):
        return open_append(run_dir / GUARD)


def _write(run_dir: Path) -> str:
    token = secrets.token_hex(8)
    write_json(run_dir / "lock.json", {**_me(), "token": token})
    return token


def _me() -> dict[str, Any]:
    return {
        **identity(),
        "job": os.environ.get("DEEPCLUST_JOB"),
        "restart": int(os.environ.get("DEEPCLUST_RESTART") or 0),
    }


def _is_stale(run_dir: Path, lock: dict[str, Any]) -> bool:
    if _is_of_earlier_restart(lock):
        return True
    if is_here(lock):
        began = start_time(int(lock["pid"]))
        # without the key the lock is damaged, and may still be that of a living process
        return began is None if "started" not in lock else bool(began != lock["started"])
    return _age(run_dir / "lock.json") > STALE_AFTER_S


def _is_of_earlier_restart(lock: dict[str, Any]) -> bool:
    """Return whether an earlier restart of our own job still has the lock.

    Its processes may still live, where a node has left the cluster. The token fences them off.
    """
    me = _me()
    is_ours = lock["job"] is not None and lock["job"] == me["job"]
    return is_ours and int(lock["restart"]) < int(me["restart"])


def _age(path: Path) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file server."""
    probe = temporary(path)  # a name that nobody can have put a link at
    try:
        open_append(probe).close()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        # the lock itself may be gone by now, and is then of nobody
        return time.time() - path.stat().st_mtime if path.exists() else STALE_AFTER_S + 1
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_mine(lock: dict[str, Any] | None) -> bool:
    return lock is not None and {**lock, "token": ""} == {**_me(), "token": ""}


def _beat(run_dir: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError, DataError):
            if _is_mine(_read(run_dir)):
                os.utime(run_dir / "lock.json")


def _read(run_dir: Path) -> dict[str, Any] | None:
    """Return the lock, None where there is none, or raise `DataError` for one that is damaged."""
    try:
        lock = read_record(run_dir / "lock.json", FIELDS, MOST)
    except MissingError:
        return None
    except DataError as error:
        raise DataError(
            f"{error}. If no process works on the run, delete that file and resume"
        ) from error
    # the names in locks of older versions
    lock["job"] = lock.get("job", lock.get("slurm_job"))
    lock["restart"] = lock.get("restart", lock.get("slurm_restart")) or 0
    return lock


def _token(run_dir: Path) -> str | None:
    lock = _read(run_dir)
    return None if lock is None else str(lock["token"])
