"""The folder of runs: whether it can be written, its space and speed, and its clock."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster_jobs.doctor.finding import GREEN, RED, YELLOW, Finding
from cluster_jobs.doctor.machine import GIB, graded

ENOUGH_SPACE, LEAST_SPACE = 20 * GIB, GIB
ENOUGH_SPEED, LEAST_SPEED = 50.0, 1.0  # MB/s
WRITTEN = 32 * 2**20  # bytes
MOST_SKEW_S = 5.0
FIRST_YEAR = 2024
NAME = ".deepclust-doctor-"


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return there


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Give a new folder in the place, and remove it."""
    with tempfile.TemporaryDirectory(prefix=NAME, dir=existing(folder)) as name:
        yield Path(name)


def writable(folder: Path) -> Finding:
    """Make a file, rename it over another one, and remove it, as every commit does."""
    there = existing(folder)
    try:
        with scratch(folder) as place:
            (place / "new").write_text("new")
            (place / "old").write_text("old")
            os.replace(place / "new", place / "old")
            assert (place / "old").read_text() == "new"
    except OSError as error:
        fix = "give --run a folder of yours, or free space and inodes there"
        return Finding(RED, f"{there}: {error.strerror or error}", fix)
    return Finding(GREEN, f"{there} can be written")


def free_space(folder: Path) -> Finding:
    """Check the space for features, checkpoints and reports."""
    free = shutil.disk_usage(existing(folder)).free
    state = graded(free, LEAST_SPACE, ENOUGH_SPACE)
    fix = "" if state == GREEN else "delete old runs, or give --run a folder on a larger disk"
    return Finding(state, f"{free / GIB:.1f} GiB are free", fix)


def speed(folder: Path) -> Finding:
    """Measure how fast bytes reach the disk, with fsync as every commit has it."""
    block = os.urandom(WRITTEN)
    with scratch(folder) as place, (place / "block").open("wb", buffering=0) as file:
        began = time.perf_counter()
        file.write(block)
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    rate = WRITTEN / seconds / 1e6
    state = graded(rate, LEAST_SPEED, ENOUGH_SPEED)
    fix = "" if state == GREEN else "put runs on a local or a parallel file system"
    return Finding(state, f"{rate:.0f} MB/s written with fsync", fix)


def clock(folder: Path) -> Finding:
    """Compare the clock of this machine with that of the file system."""
    with scratch(folder) as place:
        before = time.time()
        (place / "now").touch()
        skew = (place / "now").stat().st_mtime - before
    year = time.gmtime(before).tm_year
    fix = (
        "set the clock by NTP: timedatectl set-ntp true, or chrony, on this machine and the server"
    )
    if year < FIRST_YEAR:
        return Finding(RED, f"this machine is in {year}", fix)
    state = RED if abs(skew) > MOST_SKEW_S else YELLOW if abs(skew) > 1 else GREEN
    return Finding(
        state, f"{skew:+.1f} s between files and this machine", "" if state == GREEN else fix
    )


def temporary(_folder: Path) -> Finding:
    """Check that the folder for temporary files can be written."""
    fix, wanted = "set TMPDIR to a folder of yours with space", os.environ.get("TMPDIR")
    try:
        place = Path(tempfile.gettempdir())
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    except OSError as error:  # of all places that Python tries
        return Finding(RED, error.strerror or str(error), fix)
    if wanted and os.path.realpath(wanted) != os.path.realpath(place):
        return Finding(YELLOW, f"TMPDIR={wanted} cannot be used, so {place} is", fix)
    return Finding(GREEN, f"{place} can be written")
