"""The role of one process in a worker group: a trainer rank, or the cluster worker."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

from deepclust.recipe import Recipe

CLUSTER_WORKER = -1
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def die_with(parent: int) -> None:
    """Do the same, and end at once when the parent has died already."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


@dataclass(frozen=True)
class Role:
    """Rank (-1: the cluster worker) of `size`, where ranks meet, and the only stage to do."""

    rank: int
    size: int
    rendezvous: str = ""  # a file of this machine, tcp://HOST:PORT of rank 0, or env://
    stage: str | None = None
    gpu: int | None = None  # place among those that it sees, where a scheduler has chosen
    threads: int | None = None  # CPUs for the cluster worker, where a scheduler gives them
    has_worker: bool = True  # unless the recipe has none; without one rank 0 clusters

    @property
    def is_cluster_worker(self) -> bool:
        """Whether it clusters and does not train."""
        return self.rank == CLUSTER_WORKER

    @property
    def name(self) -> str:
        """The role in words, as events and messages have it."""
        return "cluster worker" if self.is_cluster_worker else f"rank {self.rank}"

    @property
    def log_name(self) -> str:
        """The name of its file in `logs/`."""
        return "cluster-worker.log" if self.is_cluster_worker else f"rank-{self.rank:05d}.log"


def roles_of(recipe: Recipe, stage: str | None = None) -> list[Role]:
    """Return the roles of a recipe's worker group, the cluster worker last if there is one."""
    size = recipe.train.ranks
    ranks = [*range(size), *([] if recipe.clusters_inline else [CLUSTER_WORKER])]
    return [Role(rank, size, stage=stage) for rank in ranks]


def cores() -> int:
    """Return the CPUs that this process may run on: Linux knows what a scheduler gave us."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
