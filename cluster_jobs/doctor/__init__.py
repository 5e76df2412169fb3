"""`deepclust doctor` says whether this machine has what a run needs, and what mends it.

Each check is one function that looks at the real thing: it decodes images, searches with FAISS,
writes a file and renames it. A check of a library runs in a new process, since a broken one may end
its process. Red is what a run needs here. Yellow is slower, or needed by some runs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cluster_jobs.doctor import clusters, gpu, machine, places, software
from cluster_jobs.doctor.finding import RED, Finding

__all__ = ["CHECKS", "RED", "Finding", "examine", "line"]

CHECKS: tuple[tuple[str, Callable[[Path], Finding]], ...] = (
    ("python", software.python),
    ("packages", software.packages),
    ("torch", software.torch),
    ("compiled", software.compiled),
    ("faiss", software.faiss),
    ("decoders", software.decoders),
    ("gpu", gpu.driver),
    ("nccl", gpu.nccl),
    ("processors", machine.processors),
    ("memory", machine.memory),
    ("shared memory", machine.shared_memory),
    ("open files", machine.open_files),
    ("processes", machine.semaphores),
    ("host name", machine.host_name),
    ("folder", places.writable),
    ("free space", places.free_space),
    ("disk speed", places.speed),
    ("clock", places.clock),
    ("temporary files", places.temporary),
    ("ray", clusters.ray),
    ("slurm", clusters.slurm),
)


def examine(folder: Path) -> Iterator[tuple[str, Finding]]:
    """Do every check, and yield its name and what it found; `folder` is where runs shall be."""
    for name, check in CHECKS:
        try:
            yield name, check(folder)
        except Exception as error:  # the others are done all the same
            yield name, Finding(RED, f"{type(error).__name__}: {error}", "see the error")


def line(name: str, finding: Finding) -> str:
    """Return a finding for a terminal: its colour, name, what was seen, and what mends it."""
    text = f"{finding.state:6}  {name:15}  {finding.seen}"
    return f"{text}\n{'':25}{finding.fix}" if finding.fix else text
