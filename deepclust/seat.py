"""One process's place in a gang: a trainer rank, or the cluster worker."""

from __future__ import annotations

from dataclasses import dataclass

CLUSTER_WORKER = -1


@dataclass(frozen=True)
class Seat:
    """Rank (-1: the cluster worker) of `size`, where ranks meet, and the only stage to do."""

    rank: int
    size: int
    meeting: str  # a file of this machine, or tcp://HOST:PORT, where rank 0 listens
    stage: str | None = None
    gpu: int | None = None  # of its node, where a scheduler has chosen; else the rank's number

    @property
    def log_name(self) -> str:
        """The name of its file in `logs/`."""
        return "cluster-worker.log" if self.rank == CLUSTER_WORKER else f"rank-{self.rank:05d}.log"
