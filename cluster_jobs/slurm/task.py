"""The program of every task of a Slurm job: `srun ... python -m cluster_jobs.slurm.task RUN`.

Task 0 is the head: it waits for the others, brings up what `slurm.launcher` says, controls the run,
takes down what it has started, and decides what becomes of the job. The others serve until the
head is gone, however it went. With the launcher `ray` a task is a node, with `srun` a process.

A USR2 (time limit, preemption) stops the run at a step and queues the job again; a TERM stops it
too, but what follows is for Slurm to decide. A kill tells nobody: then the last commit counts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster_jobs import job, queue
from cluster_jobs.slurm import member, ranks
from cluster_jobs.slurm.allocation import Allocation, allocation, own_address
from cluster_jobs.slurm.daemon import Daemon, alone, private
from cluster_jobs.slurm.meeting import Head, folder, hosting, join
from cluster_jobs.spec import SlurmSpec, slurm_spec
from deepclust import rundir
from deepclust.errors import DeepclustError, RequeueWanted
from deepclust.files import read_json, write_json
from deepclust.launch import HELD_BACK, collected_signals
from deepclust.lock import hold
from deepclust.rundir import Run

END_S = 90.0  # from our wish to end or requeue until Slurm ends us
FRUITLESS = 3  # starts in a row that bring nothing, and then no more
AGAIN = 3  # times that a node's Ray is started again while the head lives
log = logging.getLogger("cluster_jobs")


def main() -> int:
    """Be this task until the run has ended or the job is queued again."""
    path = Path(sys.argv[1])
    with collected_signals() as asked:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        try:
            found, spec = allocation(), slurm_spec(rundir.open_run(path).recipe)
            if spec.launcher == "srun" and found.task:
                return member.main(path, found, spec.start)
            if found.task:
                return follow(path, found, spec)
            job.log_to(path)
            return lead(path, found, spec, asked)
        except DeepclustError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code


def lead(path: Path, found: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """Task 0: the run from bring-up to its end, and the job's end."""
    log.info("job %s, start %d, on %s", found.job, found.restart, ", ".join(found.nodes))
    try:
        if spec.launcher == "ray":
            control_by_ray(path, found, spec, asked)
        else:
            ranks.control(path, found, spec, asked)
    except RequeueWanted as error:
        log.info("stopped: %s", error)
        return after_stop(path, found, spec, asked)
    except DeepclustError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    return 0


def control_by_ray(path: Path, found: Allocation, spec: SlurmSpec, asked: list[int]) -> None:
    """Bring up a Ray of the job's own on all nodes, and run the controller on it."""
    address, notes = own_address(found), folder(path, found)
    with hosting(path, found, address) as head:
        os.environ.update(private(notes) | alone(address))
        daemon = Daemon(found, address, notes, None)
        try:
            with _told(path):
                _bring_up(found, head, daemon, notes, spec.start, lambda: bool(asked))
            os.environ["RAY_ADDRESS"] = daemon.address
            from cluster_jobs.controller import control  # Ray reads its variables when imported

            control(path, asked)
        finally:
            daemon.stop()


def _bring_up(
    found: Allocation, head: Head, daemon: Daemon, notes: Path, patience: float,
    stopping: Callable[[], bool],
) -> None:  # fmt: skip
    """Until every node has come and is part of the Ray; how long that took is written down."""
    clock = [time.time()]
    head.gather(dict(list(enumerate(found.nodes))[1:]), patience, stopping)
    clock.append(time.time())
    daemon.wait(patience)
    for guest in head.guests.values():
        guest.line.send(ray=daemon.address)
    head.hear_all("up", patience, stopping)
    clock.append(time.time())
    parts = {"nodes_s": clock[1] - clock[0], "ray_s": clock[2] - clock[1]}
    write_json(notes / "bring-up.json", {"began": clock[0], **parts})


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What ends us before the controller holds the run stands in its events all the same."""
    try:
        yield
    except DeepclustError as error:
        with hold(path) as token:
            Run(path, token).event("stopped", kind=type(error).__name__, text=str(error))
        raise


def follow(path: Path, found: Allocation, spec: SlurmSpec) -> int:
    """A node's task: its Ray, as long as the head is there."""
    line = join(path, found, spec.start)
    told = line.first(2 * spec.start)
    if told is None:
        return 0  # the head has gone before it came to that
    notes, address = folder(path, found), line.socket.getsockname()[0]
    for _ in range(1 + AGAIN):
        daemon = Daemon(found, address, notes, told["ray"])
        try:
            daemon.wait(spec.start)
            line.send(up=True)
            while daemon.alive and line.open:
                line.hear(1.0)
        except DeepclustError as error:
            line.send(failed=str(error))
        finally:
            daemon.stop()
        if not line.open:
            break
    return 0


def after_stop(path: Path, found: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """What becomes of the job whose run has stopped at a step, as asked."""
    if signal.SIGUSR2 not in asked:
        if not asked:  # by the word in the run
            job.forget_cancel(path)
            log.info("cancelled as asked: job %s ends", found.job)
            queue.scancel(found.job)
            _wait_for_the_end(asked)
        return RequeueWanted.exit_code  # TERM: Slurm has decided what follows
    if found.restart >= spec.requeues:
        log.error("job %s was queued again slurm.requeues=%d times", found.job, spec.requeues)
        return RequeueWanted.exit_code
    seen = queue.look(found.job)
    if seen is not None and seen.state != "RUNNING":  # cancelled meanwhile, or queued by Slurm
        log.info("job %s is %s: it is not queued again by us", found.job, seen)
        return RequeueWanted.exit_code
    if _fruitless(path):
        log.error("%d starts of job %s in a row brought nothing: it ends", FRUITLESS, found.job)
        return RequeueWanted.exit_code
    if problem := queue.requeue(found.job):
        log.error("job %s cannot be queued again: %s", found.job, problem)
        return RequeueWanted.exit_code
    log.info("job %s is queued again", found.job)
    _wait_for_the_end(asked)
    return RequeueWanted.exit_code


def _fruitless(path: Path) -> bool:
    """Whether the last starts ended with nothing more on disk than the one before them."""
    file = path / "slurm" / "fruit.json"
    before = read_json(file) if file.exists() else []
    counted = [*before, list(job.fruit(Run(path)))][-1 - FRUITLESS :]
    write_json(file, counted)
    return len(counted) > FRUITLESS and counted.count(counted[-1]) == len(counted)


def _wait_for_the_end(asked: list[int]) -> None:
    """Slurm ends the step by TERM; to leave before would be an end of our own, in its accounts."""
    had, deadline = asked.count(signal.SIGTERM), time.monotonic() + END_S
    while asked.count(signal.SIGTERM) == had and time.monotonic() < deadline:
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
