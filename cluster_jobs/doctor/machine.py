"""What the machine gives to a process: processors, memory, and the limits of the kernel."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import socket
from pathlib import Path

from cluster_jobs.doctor.finding import GREEN, RED, YELLOW, Finding

GIB = 2**30
SHM = Path("/dev/shm")
ENOUGH_SHM, LEAST_SHM = GIB, 64 * 2**20
ENOUGH_FILES, LEAST_FILES = 4096, 256
ENOUGH_MEMORY, LEAST_MEMORY = 8 * GIB, 2 * GIB
CGROUP = Path("/sys/fs/cgroup/memory.max")
MEMINFO = Path("/proc/meminfo")


def graded(value: float, least: float, enough: float) -> str:
    """Return the colour of a value."""
    return RED if value < least else YELLOW if value < enough else GREEN


def processors(_folder: Path) -> Finding:
    """Check that a rank and a reader have a processor each."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    number = usable or 1
    fix = "give the job a processor for each rank and each of its data.workers"
    return Finding(graded(number, 1, 2), f"{number} of {os.cpu_count()}", "" if number > 1 else fix)


def memory(_folder: Path) -> Finding:
    """Check the memory that is free now, within the limit of the container."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    if limit != "max":
        free = min(free, int(limit))
    state = graded(free, LEAST_MEMORY, ENOUGH_MEMORY)
    fix = "" if state == GREEN else "end other programs, or lower data.workers and train.batch"
    return Finding(state, f"{free / GIB:.1f} GiB are free", fix)


def shared_memory(_folder: Path) -> Finding:
    """Check the space in /dev/shm, where readers hand their batches over."""
    if not SHM.exists():
        return Finding(YELLOW, f"there is no {SHM}", "mount a tmpfs there: batches go by pipes")
    free = shutil.disk_usage(SHM).free
    state = graded(free, LEAST_SHM, ENOUGH_SHM)
    fix = "" if state == GREEN else "docker run --shm-size=8g, or --ipc=host"
    return Finding(state, f"{free / GIB:.2f} GiB are free in {SHM}", fix)


def open_files(_folder: Path) -> Finding:
    """Check how many shards, batches and sockets may be open at once."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = float("inf") if limit == resource.RLIM_INFINITY else limit
    state = graded(number, LEAST_FILES, ENOUGH_FILES)
    fix = "" if state == GREEN else f"ulimit -n {max(most, ENOUGH_FILES)}"
    return Finding(state, f"{limit} of at most {most}", fix)


def semaphores(_folder: Path) -> Finding:
    """Check that processes can be started, and have semaphores."""
    try:
        multiprocessing.get_context("spawn").Semaphore(1)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    except OSError as error:
        return Finding(RED, str(error), "raise ulimit -u, and mount a writable tmpfs at /dev/shm")
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    most = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}"
    return Finding(GREEN, f"can be started, {most}")


def host_name(_folder: Path) -> Finding:
    """Check the name of this host, by which ranks on several machines find each other."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        fix = (
            f"add a line `ADDRESS {name}` to /etc/hosts; runs on this machine alone do not need it"
        )
        return Finding(YELLOW, f"{name} has no address: {error}", fix)
    return Finding(GREEN, f"{name} is {address}")
