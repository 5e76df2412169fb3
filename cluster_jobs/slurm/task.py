"""The program of every task of a Slurm job: `srun ... python -m cluster_jobs.slurm.task RUN`.

Task 0 is the head: it waits for the others, brings up what `slurm.launcher` says, controls the run
and takes down what it has started. The others serve until the head is gone, however it went. With
the launcher `ray` a task is a node, with `srun` a process.

USR2 and TERM (time limit, preemption) stop the run at a step. By the exit code the job script
decides what becomes of the job. After a kill it queues the job again, and the last commit counts.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from cluster_jobs import job_file
from cluster_jobs.slurm import srun_transport, srun_worker
from cluster_jobs.slurm.allocation import Allocation, own_address, read_allocation
from cluster_jobs.slurm.layout import FIRST_NODE
from cluster_jobs.slurm.ray_daemon import Daemon, alone, private
from cluster_jobs.slurm.rendezvous import Head, folder, hosting, join, leave
from cluster_jobs.slurm.spec import SlurmSpec, slurm_spec
from cluster_jobs.slurm.srun_transport import another_start
from deepclust.errors import DeepclustError, RequeueWanted, ResourceError, RunHeldError
from deepclust.files import read_json, write_json
from deepclust.launch.policy import WITHOUT_PROGRESS, Policy, progress_on_disk
from deepclust.launch.signals import HELD_BACK, collected_signals
from deepclust.launch.start import is_finished
from deepclust.launch.supervisor import Supervisor
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold

CANCELLED = 130  # exit code, after `deepclust cancel`
LOST = 0  # among the signals: a node has left
WATCH_S = 1.0
SILENT = 3  # times in a row that Ray's head cannot be reached
LEAVE_S = 5.0  # for a controller that ends by itself
AGAIN = 3  # times that a node's Ray is started again while the head lives
log = logging.getLogger("cluster_jobs")


def main() -> int:
    """Be this task until the run has ended or the job is queued again."""
    path = Path(sys.argv[1])
    with collected_signals() as asked:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        try:
            run, own = directory.open_run(path), read_allocation()
            spec = slurm_spec(run.recipe)
            if is_finished(run):  # and the job was queued again for what came after
                return 0
            if spec.launcher == "srun" and own.task:
                return srun_worker.main(path, own, spec.start)
            if own.task:
                return follow(path, own, spec, asked)
            job_file.log_to(path)
            return lead(path, own, spec, asked)
        except DeepclustError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code


def lead(path: Path, allocation: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """Task 0: the run from bring-up to its end, and the job's end."""
    nodes, code = ", ".join(allocation.nodes), Path(__file__).parents[2]
    log.info("job %s, start %d, on %s; code in %s", allocation.job, allocation.restart, nodes, code)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for every task
    try:
        with _stop_recorded(path):
            refuse_without_progress(path, allocation)
            with another_start():
                address = own_address(allocation)
        with hosting(path, allocation, address) as head:
            if spec.launcher == "ray":
                control_by_ray(path, allocation, spec, head, asked)
            else:
                srun_transport.control(path, allocation, spec, head, asked)
    except RequeueWanted as error:
        log.info("stopped: %s", error)
        return after_stop(path, asked)
    except DeepclustError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except Exception:
        # another start may mend it, and `refuse_without_progress` bounds those
        log.exception("unexpected")
        return RequeueWanted.exit_code
    finally:
        leave(path, allocation)
    return 0


def control_by_ray(
    path: Path, allocation: Allocation, spec: SlurmSpec, head: Head, asked: list[int]
) -> None:
    """Bring up a Ray of the job's own on all nodes, and run the controller on it."""
    address, notes = head.address, folder(path, allocation)
    os.environ.update(private(notes) | alone(address))
    daemon, over = Daemon(allocation, address, notes, None), Event()
    try:
        with _stop_recorded(path), another_start():
            _bring_up(allocation, head, daemon, spec.start, lambda: job_file.stopping(path, asked))
        Thread(target=_watch, args=(head, daemon, asked, over), daemon=True).start()
        os.environ["RAY_ADDRESS"] = daemon.address
        from cluster_jobs.ray.controller import control  # Ray reads its variables when imported

        first = {} if spec.gpus else {FIRST_NODE: 1.0}  # where nodes differ, wherever there is room
        control(path, asked, {"stop": spec.stop, "worker_resources": first})
    finally:
        over.set()
        daemon.stop()


def _watch(head: Head, daemon: Daemon, asked: list[int], over: Event) -> None:
    """Stop when a node leaves the job: it does not come back, so the job is queued again.

    Nor does Ray's head. Its users hang for a minute, and are then ended by Ray.
    """
    silent = 0
    while not over.wait(WATCH_S) and silent < SILENT and daemon.alive:
        silent = 0 if daemon.listens else silent + 1
        for peer in head.peers.values():
            peer.line.receive()
            if not peer.line.open:
                log.error("%s has left the job", peer.node)
                asked.append(LOST)
                return
    if not over.wait(LEAVE_S):
        log.error("Ray's head has ended")
        daemon.stop()
        os._exit(RequeueWanted.exit_code)


def _bring_up(
    allocation: Allocation,
    head: Head,
    daemon: Daemon,
    patience: float,
    stopping: Callable[[], bool],
) -> None:
    """Wait until every node has come and is part of the Ray."""
    head.gather(dict(list(enumerate(allocation.nodes))[1:]), patience, stopping)
    head.note("all here")
    daemon.wait(patience)
    for peer in head.peers.values():
        peer.line.send(ray=daemon.address)
    head.await_all("up", patience, stopping)
    head.note("Ray is up")


@contextmanager
def _stop_recorded(path: Path) -> Iterator[None]:
    """Write into the events what ends us before the controller holds the run."""
    try:
        yield
    except DeepclustError as error:
        with suppress(RunHeldError), hold(path) as token:
            supervisor = Supervisor(Run(path, token), Policy(), lambda: False)
            supervisor.event("stopped", kind=type(error).__name__, text=str(error))
            supervisor.alarms.settle()
        raise


def follow(path: Path, allocation: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """Keep this node's Ray up as long as the head is there."""
    line = join(path, allocation, spec.start)
    order = line.first(2 * spec.start) if line else None
    if line is None or order is None:
        return 0  # the head has gone before it came to that
    notes, address = folder(path, allocation), line.socket.getsockname()[0]
    for tries in range(1 + AGAIN):
        daemon = Daemon(allocation, address, notes, order["ray"])
        try:
            daemon.wait(spec.start)
            line.send(up=True)
            while daemon.alive and line.open:
                line.receive(1.0)
        except DeepclustError as error:
            sys.stderr.write(f"error: {error}\n")
            if tries == AGAIN:
                line.send(failed=str(error))
        finally:
            daemon.stop()
        if asked or not line.open:
            break
    return 0


def after_stop(path: Path, asked: list[int]) -> int:
    """Return the exit code for the job script of a run that has stopped at a step."""
    if signal.SIGINT in asked:
        job_file.forget_cancel(path)
        return CANCELLED
    if asked and asked[0] != LOST:  # nothing went wrong, so nothing is counted
        _counts(path).unlink(missing_ok=True)
    return RequeueWanted.exit_code


def refuse_without_progress(path: Path, allocation: Allocation) -> None:
    """Raise `ResourceError` when this job's last starts have made no progress on disk."""
    file, now = _counts(path), list(progress_on_disk(Run(path)))
    before = read_json(file) if file.exists() else {}
    counted = [*(before["progress"] if before.get("job") == allocation.job else []), now]
    recent = counted[-WITHOUT_PROGRESS - 1 :]
    write_json(file, {"job": allocation.job, "progress": recent})
    if len(recent) > WITHOUT_PROGRESS and all(one == now for one in recent):
        texts = [event["text"] for event in Run(path).events() if event["event"] == "stopped"]
        raise ResourceError(
            f"{WITHOUT_PROGRESS} starts of job {allocation.job} in a row made no progress; their "
            f"output is in {job_file.output(path)}. The last ended with: "
            f"{texts[-1] if texts else 'nothing'}"
        )


def _counts(path: Path) -> Path:
    return path / "slurm" / "progress.json"


if __name__ == "__main__":
    sys.exit(main())
