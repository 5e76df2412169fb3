"""The launcher `srun`: ranks and cluster worker as tasks of the step, without Ray.

Task 0 holds the run and controls; its own place is a child, the other tasks take theirs themselves.
Each has a line to it, down which its news comes. One that is lost stops all, and the job is queued
again: it continues from the last commit.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.slurm.allocation import Allocation
from cluster_jobs.slurm.layout import Layout, Slot, layout
from cluster_jobs.slurm.rendezvous import Head, Peer
from cluster_jobs.slurm.spec import SlurmSpec, slurm_spec
from deepclust.errors import DeepclustError, FollowedError, RequeueWanted, ResourceError, error_of
from deepclust.launch.policy import AFTERMATH_S, MAY_PASS, UNEXPECTED
from deepclust.launch.role import CLUSTER_WORKER
from deepclust.launch.start import HELD_BACK
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold

NEWS_S = 0.5
log = logging.getLogger("cluster_jobs")


def control(path: Path, found: Allocation, spec: SlurmSpec, head: Head, asked: list[int]) -> None:
    """Bring the run to its end. Raises the errors of `deepclust.errors`."""
    with hold(path) as token:
        run = Run(path)
        lives = sum(event["event"] == "started" for event in run.events())
        run = Run(path, token, lives + 1)
        directory.sweep(path)
        roles = layout(run.recipe)
        _event(run, "started", pid=os.getpid(), ranks=roles.ranks, job=found.job)
        try:
            WorkerGroup(run, found, roles, head, asked).live(spec)
        except BaseException as error:
            _event(run, "stopped", kind=type(error).__name__, text=str(error) or "interrupted")
            job_file.forget_cancel(path)
            raise
        _event(run, "finished", epochs=run.recipe.train.epochs)


class WorkerGroup:
    """The tasks with a place, from their coming to their end."""

    def __init__(
        self, run: Run, found: Allocation, roles: Layout, head: Head, asked: list[int]
    ) -> None:
        self.run, self.found, self.roles, self.head, self.asked = run, found, roles, head, asked
        self.places: dict[int, Slot] = {
            node * roles.tasks + slot: place
            for node, places in enumerate(roles.nodes)
            for slot, place in enumerate(places)
            if place is not None
        }
        self.stop_asked: float | None = None
        self.stop_s = slurm_spec(run.recipe).stop

    def live(self, spec: SlurmSpec) -> None:
        """Start our own place, see all come, give the orders, and watch."""
        words = [sys.executable, "-u", "-P", "-m", "cluster_jobs.slurm.srun_worker"]
        words += [str(self.run.path), str(os.getpid()), str(spec.start)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # until it ignores them
        try:
            child = subprocess.Popen(words, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            nodes, tasks = self.found.nodes, self.roles.tasks
            everyone = {task: nodes[task // tasks] for task in range(len(nodes) * tasks)}
            try:
                self.head.gather(everyone, spec.start, self._stopping)
                self.head.hear_all("ready", spec.start, self._stopping)
            except ResourceError as error:  # may be here the next time
                raise RequeueWanted(str(error)) from error
            self.head.note("all here")
            self._order(everyone)
            self._watch()
        finally:
            self.head.close()
            _leave(child)

    def _order(self, everyone: dict[int, str]) -> None:
        """Tell every task who it is; one without a place is let go."""
        peers = self.head.peers
        for task, node in everyone.items():
            if peers[task].node != node:
                raise ResourceError(
                    f"task {task} is on {peers[task].node}, and not on {node}: srun must fill a "
                    "node before the next (--distribution=block)"
                )
        first = next(task for task, place in self.places.items() if place.rank == 0)
        said = peers[first].said
        rendezvous = f"tcp://{said['address']}:{said['ready']}"
        for task in [task for task in peers if task not in self.places]:
            peers.pop(task).line.close()
        for task, place in self.places.items():
            peers[task].line.send(
                rank=place.rank, size=self.roles.ranks, gpu=place.gpu, rendezvous=rendezvous,
                token=self.run.token, attempt=self.run.attempt,
            )  # fmt: skip
        placed = [
            {"who": self._name(g), "node": g.node, "pid": g.said["pid"]} for g in peers.values()
        ]
        _event(self.run, "placed", members=placed)

    def _watch(self) -> None:
        """Until every rank is through. Raises what ended it otherwise."""
        ranks = [self.head.peers[t] for t, p in self.places.items() if p.rank != CLUSTER_WORKER]
        with selectors.DefaultSelector() as selector:
            for peer in self.head.peers.values():
                selector.register(peer.line, selectors.EVENT_READ, peer)
            while not all("done" in peer.said for peer in ranks):
                self._hear(selector)
                self._pass_the_wish_on(ranks)
                stopped = [g.said.get("kind") == RequeueWanted.__name__ for g in ranks]
                if all(stopped):
                    raise RequeueWanted(ranks[0].said["failed"])
                if any(self._bad(peer) for peer in self.head.peers.values()):
                    self._aftermath(selector)
                    raise self._why()

    def _hear(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(NEWS_S):
            peer: Peer = key.data
            for record in peer.line.hear():
                self._take(peer, record)
            if not peer.line.open:
                selector.unregister(peer.line)

    def _take(self, peer: Peer, record: dict[str, Any]) -> None:
        if "event" in record:
            fields = {key: value for key, value in record.items() if key != "event"}
            _event(self.run, record["event"], **fields)
        elif "progress" not in record:
            peer.said |= record

    def _pass_the_wish_on(self, ranks: list[Peer]) -> None:
        if self.stop_asked is None and self._stopping():
            self.stop_asked = time.monotonic()
            for peer in ranks:
                peer.line.send(stop=True)
        if self.stop_asked is not None and time.monotonic() - self.stop_asked > self.stop_s:
            raise RequeueWanted(f"it did not stop within {self.stop_s:g} s and was killed")

    def _stopping(self) -> bool:
        return job_file.stopping(self.run.path, self.asked)

    def _aftermath(self, selector: selectors.BaseSelector) -> None:
        """Hear the others out: who breaks a process group is not always heard first."""
        deadline = time.monotonic() + AFTERMATH_S
        while time.monotonic() < deadline and selector.get_map():
            self._hear(selector)

    def _bad(self, peer: Peer) -> bool:
        """Lost, or ended with an error of its own."""
        failed = "failed" in peer.said and peer.said["kind"] != RequeueWanted.__name__
        return failed or (not peer.line.open and "done" not in peer.said)

    def _why(self) -> DeepclustError:
        """The error that was told, if no other start would mend it; else that all begin again."""
        bad = [peer for peer in self.head.peers.values() if self._bad(peer)]
        meant = [g for g in bad if g.said.get("exit_code", UNEXPECTED) not in MAY_PASS]
        if meant:
            return error_of(meant[0].said["exit_code"], meant[0].said["failed"])
        lost = [peer for peer in bad if not peer.line.open]
        followed = FollowedError.__name__
        peer = (lost or sorted(bad, key=lambda g: g.said.get("kind") == followed))[0]
        how = f"failed: {peer.said['failed']}" if "failed" in peer.said else "was lost"
        output = f"{job_file.output(self.run.path)}/*_{peer.task}_log.out"
        text = f"{self._name(peer)} on {peer.node} {how}; its output: {output}"
        _event(self.run, "fault", who=self._name(peer), cause="death", text=text)
        return RequeueWanted(text)

    def _name(self, peer: Peer) -> str:
        rank = self.places[peer.task].rank
        return "cluster worker" if rank == CLUSTER_WORKER else f"rank {rank}"


def _event(run: Run, name: str, **fields: Any) -> None:
    run.event(name, **fields)
    log.info("%s %s", name, fields)


def _leave(child: subprocess.Popen[bytes]) -> None:
    """Our own place ends with its line; if it does not, by us."""
    try:
        child.wait(AFTERMATH_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
