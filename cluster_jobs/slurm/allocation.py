"""What Slurm has given this task: the variables of the job step, read in one place.

A node is known by Slurm's name for it, never by its host name or address: several may share those.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass

from deepclust.errors import ResourceError

ASK_S = 20.0
NODES = "DEEPCLUST_NODES"  # the job's, which the job script asks of Slurm


@dataclass(frozen=True)
class Allocation:
    """The job, this task's place in it, and what its node gives to it."""

    job: str
    restart: int  # how often the job was queued again
    nodes: list[str]
    number: int  # of this node among them
    task: int  # among all tasks
    cpus: int
    gpus: int

    @property
    def name(self) -> str:
        """Of this node."""
        return self.nodes[self.number]

    @property
    def life(self) -> str:
        """A name for this start of the job.

        A file of an older one has another.
        """
        return f"{self.job}-{self.restart}"


def read_allocation() -> Allocation:
    """Return this task's allocation, or raise `ResourceError` outside of a job step."""
    given = os.environ
    try:
        nodes, number = given[NODES].split(), int(given["SLURM_NODEID"])
        return Allocation(
            job=given["SLURM_JOB_ID"], restart=int(given.get("SLURM_RESTART_COUNT", 0)),
            nodes=nodes, number=number, task=int(given["SLURM_PROCID"]),
            cpus=int(given.get("SLURM_CPUS_PER_TASK", 1)),
            gpus=_gpus(),
        )  # fmt: skip
    except KeyError as error:
        raise ResourceError(
            f"{error} is not set: start this by srun in a Slurm job, as slurm/*.sbatch and "
            "`deepclust submit --on slurm` do"
        ) from error


def own_address(allocation: Allocation) -> str:
    """Return this node's address as the others can reach it: that of the way to one of them.

    Where `scontrol` does not say, as in a container, a node's name must lead to it.
    """
    others = [name for name in allocation.nodes if name != allocation.name]
    if not others:
        return "127.0.0.1"
    match = re.search(r"NodeAddr=(\S+)", _ask("scontrol", "show", "node", others[0]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((match[1] if match else others[0], 9))  # of UDP: nothing is sent
        except OSError as error:
            raise ResourceError(
                f"{allocation.name} finds no address of {others[0]}: {error}"
            ) from error
        return str(way.getsockname()[0])


def _gpus() -> int:
    """Return how many GPUs this task sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name and name != "NoDevFiles"])
    return int(os.environ.get("SLURM_GPUS_ON_NODE", 0))


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
