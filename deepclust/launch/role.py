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
    rendezvous: str = ""  # a file of this machine, or tcp://HOST:PORT, where rank 0 listens
    stage: str | None = None
    gpu: int | None = None  # of its node, where a scheduler has chosen; else the rank's number

    @property
    def name(self) -> str:
        """The role in words, as events and messages have it."""
        return "cluster worker" if self.rank == CLUSTER_WORKER else f"rank {self.rank}"

    @property
    def log_name(self) -> str:
        """The name of its file in `logs/`."""
        return "cluster-worker.log" if self.rank == CLUSTER_WORKER else f"rank-{self.rank:05d}.log"


def roles_of(recipe: Recipe, stage: str | None = None) -> list[Role]:
    """Return the roles of a recipe's worker group, the cluster worker last if there is one."""
    size = recipe.train.ranks
    ranks = [*range(size), *([] if recipe.clusters_inline else [CLUSTER_WORKER])]
    return [Role(rank, size, stage=stage) for rank in ranks]
