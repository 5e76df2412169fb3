"""One controller per run: the lock, its heartbeat, and the token that fences off a zombie.

The lock names host, boot, pid, start time and (under Slurm) job and restart. A dead process on
this host frees it at once; one on another host when its heartbeat has stopped for two minutes.
Whoever takes it writes a new token, and every commit compares tokens just before its rename, so
an old controller that wakes up cannot land anything. A controller that starts its gang again renews
the token, so that what is left of the old gang cannot either.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepclust.errors import RunHeldError
from deepclust.files import disk_errors, read_json, write_json

HEARTBEAT_S = 10.0
STALE_AFTER_S = 120.0


@contextlib.contextmanager
def hold(run: Path) -> Iterator[str]:
    """Hold the run while the block lasts; yields the token. Raises `RunHeldError`."""
    token = _take(run)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(run, stop), daemon=True)
    beat.start()
    try:
        yield token
    finally:
        stop.set()
        beat.join()
        if _is_mine(_read(run)):
            (run / "lock.json").unlink(missing_ok=True)


def renew(run: Path, token: str) -> str:
    """A new token for the same holder; whoever still writes by the old one is fenced off.

    Raises `RunHeldError` when the run is no longer held by that token.
    """
    with _guarded(run):
        check_token(run, token)
        return _write(run)


def check_token(run: Path, token: str) -> None:
    """Raise `RunHeldError` unless the lock still bears this token."""
    if _token(run) != token:
        raise RunHeldError(
            f"{run} was taken over by another controller ({owner(run) or 'the lock is gone'}); "
            "this process writes nothing more"
        )


def owner(run: Path) -> str | None:
    """Who holds the run, in words, if anyone alive does."""
    lock = _read(run)
    if lock is None or _is_stale(run, lock):
        return None
    job = f", Slurm job {lock['slurm_job']}" if lock.get("slurm_job") else ""
    return f"process {lock['pid']} on {lock['host']}{job}"


def owner_job(run: Path) -> str | None:
    """The Slurm job of whoever holds the run, if it is in one."""
    lock = _read(run)
    return None if lock is None or _is_stale(run, lock) else lock.get("slurm_job")


def owner_pid(run: Path) -> int | None:
    """The pid of the living controller, when it is on this machine."""
    lock = _read(run)
    if lock is None or _is_stale(run, lock) or not _is_here(lock):
        return None
    return int(lock["pid"])


def _take(run: Path) -> str:
    with _guarded(run):
        holder = owner(run)
        if holder:
            raise RunHeldError(
                f"{run} is held by {holder}. Watch it with `deepclust status {run}`, or end it "
                f"with `deepclust cancel {run}`."
            )
        return _write(run)


@contextlib.contextmanager
def _guarded(run: Path) -> Iterator[None]:
    """One taker at a time on this host; across hosts the token decides."""
    with disk_errors(run), open(run / ".lock-guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _write(run: Path) -> str:
    token = secrets.token_hex(8)
    write_json(run / "lock.json", {**_me(), "token": token})
    return token


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": platform.node(),
        "boot": _boot_id(),
        "pid_space": _pid_space(),
        "pid": pid,
        "started": _start_time(pid),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT"),
    }


def _is_stale(run: Path, lock: dict[str, Any]) -> bool:
    if _is_earlier_start(lock):
        return True
    if _is_here(lock):
        return bool(_start_time(int(lock["pid"])) != lock["started"])
    return _age(run / "lock.json") > STALE_AFTER_S


def _is_earlier_start(lock: dict[str, Any]) -> bool:
    """Whether an earlier start of our own Slurm job has it: that one is over for Slurm.

    Its processes may still live, where a node's slurmd has died; the token fences them off.
    """
    me = _me()
    same = lock.get("slurm_job") is not None and lock["slurm_job"] == me["slurm_job"]
    return same and int(lock.get("slurm_restart") or 0) < int(me["slurm_restart"] or 0)


def _is_here(lock: dict[str, Any]) -> bool:
    here = {"host": platform.node(), "boot": _boot_id(), "pid_space": _pid_space()}
    return all(lock[name] == value for name, value in here.items())


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file server."""
    probe = path.with_name(f".clock.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_mine(lock: dict[str, Any] | None) -> bool:
    return lock is not None and {**lock, "token": ""} == {**_me(), "token": ""}


def _beat(run: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            if _is_mine(_read(run)):
                os.utime(run / "lock.json")


def _read(run: Path) -> dict[str, Any] | None:
    try:
        return dict(read_json(run / "lock.json"))
    except FileNotFoundError:
        return None


def _token(run: Path) -> str | None:
    lock = _read(run)
    return None if lock is None else str(lock["token"])


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
