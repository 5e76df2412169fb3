"""The socket transport: ranks and cluster worker under the tasks of a Slurm step, without Ray.

Task 0 is the head: it holds the run and supervises. Every task, a child of the head for task 0
too, starts the process of its role and passes on what it reports. A rank that is lost begins again
in the same job. A task that is lost does not come back, so then the job is queued again.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from cluster_jobs import job_file
from cluster_jobs.slurm.allocation import Allocation
from cluster_jobs.slurm.layout import Layout, layout
from cluster_jobs.slurm.rendezvous import Head, Peer
from cluster_jobs.slurm.spec import SlurmSpec
from deepclust.errors import RequeueWanted, ResourceError
from deepclust.launch.endings import Ending, Record
from deepclust.launch.policy import AFTERMATH_S, Policy
from deepclust.launch.role import CLUSTER_WORKER, Role
from deepclust.launch.signals import held_back
from deepclust.launch.supervisor import Supervisor
from deepclust.launch.warm import PATIENCE_S
from deepclust.run.directory import Run
from deepclust.run.lock import hold


def control(
    run_dir: Path, allocation: Allocation, spec: SlurmSpec, head: Head, asked: list[int]
) -> None:
    """Bring the run to its end, or raise the errors of `deepclust.errors`."""
    with hold(run_dir) as token:
        run = Run(run_dir, token)
        policy = replace(Policy.of(run.recipe), stop=spec.stop, start=spec.start)
        stopping = lambda: job_file.stopping(run_dir, asked)  # noqa: E731
        supervisor = Supervisor(run, policy, stopping)
        tasks = Tasks(layout(run.recipe), head, spec.start, stopping)

        def attempt() -> Ending:
            tasks.check()
            supervisor.begin(tasks.layout.ranks, job=allocation.job)
            tasks.run = supervisor.run
            return supervisor.watch(tasks, tasks.roles)

        try:
            with supervisor.recorded(), own_task(run_dir, head, spec.start):
                tasks.gather(allocation)
                supervisor.control(attempt)
        except BaseException:
            job_file.forget_cancel(run_dir)
            raise


@contextmanager
def own_task(run_dir: Path, head: Head, patience: float) -> Iterator[None]:
    """Have a child that serves as task 0, as the other tasks do."""
    words = [sys.executable, "-u", "-P", "-m", "cluster_jobs.slurm.srun_worker"]
    words += [str(run_dir), str(os.getpid()), str(patience)]
    with held_back():
        child = subprocess.Popen(words, start_new_session=True)
    try:
        yield
    finally:
        head.close()  # it ends with its line
        try:
            child.wait(AFTERMATH_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Tasks:
    """The transport over the lines of the tasks, the same for every attempt of the job."""

    def __init__(
        self, layout: Layout, head: Head, patience: float, stopping: Callable[[], bool]
    ) -> None:
        self.layout, self.head, self.patience, self.stopping = layout, head, patience, stopping
        self.run: Run | None = None  # of the attempt
        self.peers: dict[int, Peer] = {}  # by rank

    @property
    def roles(self) -> list[Role]:
        """The roles that the layout gives, the cluster worker last."""
        places = [place for node in self.layout.nodes for place in node if place is not None]
        threads = {CLUSTER_WORKER: self.layout.worker_threads}
        roles = [
            Role(one.rank, self.layout.ranks, gpu=one.gpu, threads=threads.get(one.rank))
            for one in places
        ]
        return sorted(roles, key=lambda role: (role.is_cluster_worker, role.rank))

    def gather(self, allocation: Allocation) -> None:
        """Wait until all tasks have come, and let those without a role go.

        Raises `RequeueWanted` when one does not come: the next start may have it.
        """
        count = self.layout.tasks
        everyone = dict(enumerate(n for n in allocation.nodes for _ in range(count)))
        with another_start():
            self.head.gather(everyone, self.patience, self.stopping)
        places = [place for node in self.layout.nodes for place in node]
        for task, node in everyone.items():
            peer = self.head.peers[task]
            if peer.node != node:
                raise ResourceError(
                    f"task {task} is on {peer.node}, and not on {node}: srun must fill a node "
                    "before the next (--distribution=block)"
                )
            if (place := places[task]) is not None:
                self.peers[place.rank] = peer
            else:
                self.head.peers.pop(task).line.close()
        self.head.note("all here")

    def check(self) -> None:
        """Raise `RequeueWanted` when a task has left the job."""
        lost = [f"{_name(rank)} on {p.node}" for rank, p in self.peers.items() if not p.line.open]
        if lost:
            raise RequeueWanted(f"{', '.join(lost)} was lost; the job is queued again")

    def start(self, roles: list[Role]) -> list[Record]:
        """Give every task its role.

        Ranks meet at a port that rank 0's task has found free.
        """
        assert self.run is not None
        with another_start():
            self.head.await_all("ready", self.patience, self.stopping)
            fields = self.peers[0].fields
            rendezvous = f"tcp://{fields['address']}:{fields['ready']}"
            for role in roles:
                order = asdict(replace(role, rendezvous=rendezvous))
                line = self.peers[role.rank].line
                line.send(role=order, token=self.run.token, attempt=self.run.attempt)
            self.head.await_all("process", self.patience + PATIENCE_S, self.stopping)
        places = [
            {"who": _name(r), "node": p.node, "pid": p.fields["process"]} for r, p in self._ranked
        ]
        for peer in self.peers.values():
            peer.fields = {"address": peer.fields["address"]}
        return places

    @property
    def _ranked(self) -> list[tuple[int, Peer]]:
        return [(role.rank, self.peers[role.rank]) for role in self.roles]

    def poll(self, timeout: float) -> list[tuple[int, Record]]:
        """Return what the tasks have passed on, and which line is lost."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                if peer.line.open:
                    selector.register(peer.line, selectors.EVENT_READ, rank)
            ready = [key.data for key, _ in selector.select(timeout)]
        records: list[tuple[int, Record]] = []
        for rank in ready:
            peer = self.peers[rank]
            records += [(rank, record) for record in peer.line.receive()]
            if not peer.line.open:
                records.append(
                    (rank, {"death": f"its task on {peer.node} has ended", "cause": "node"})
                )
        return records

    def stop(self) -> None:
        """Ask the trainers to stop at their next step."""
        for rank, peer in self.peers.items():
            if rank != CLUSTER_WORKER:
                peer.line.send(stop=True)

    def kill(self) -> None:
        """Have every task kill the process of its role."""
        for peer in self.peers.values():
            peer.fields = {"address": peer.fields["address"]}
            peer.line.send(kill=True)


@contextmanager
def another_start() -> Iterator[None]:
    """Turn what a bring-up lacked into another start.

    `refuse_without_progress` bounds those.
    """
    try:
        yield
    except ResourceError as error:
        raise RequeueWanted(str(error)) from error


def _name(rank: int) -> str:
    return Role(rank, 0).name
