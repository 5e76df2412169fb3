"""The program of every task of a Slurm job: `srun ... python -m cluster_jobs.slurm.task RUN`.

Task 0 is the head: it waits for the others, brings up what `slurm.launcher` says, controls the run
and takes down what it has started. The others serve until the head is gone, however it went. With
the launcher `ray` a task is a node, with `srun` a process.

USR2 and TERM (time limit, preemption) stop the run at a step. The exit code tells the job script
(`ENDED` in executors/slurm.py) what becomes of the job; a kill tells nobody but that script, which
queues the job again, and the last commit counts.
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
from cluster_jobs.slurm.allocation import Allocation, allocation, own_address
from cluster_jobs.slurm.layout import FIRST_NODE
from cluster_jobs.slurm.ray_daemon import Daemon, alone, private
from cluster_jobs.slurm.rendezvous import Head, folder, hosting, join, leave
from cluster_jobs.slurm.spec import SlurmSpec, slurm_spec
from deepclust.errors import DeepclustError, RequeueWanted, ResourceError, RunHeldError
from deepclust.files import read_json, write_json
from deepclust.launch.policy import FRUITLESS
from deepclust.launch.start import HELD_BACK, collected_signals, is_finished
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
            run, found = directory.open_run(path), allocation()
            spec = slurm_spec(run.recipe)
            if is_finished(run):  # and the job was queued again for what came after
                return 0
            if spec.launcher == "srun" and found.task:
                return srun_worker.main(path, found, spec.start)
            if found.task:
                return follow(path, found, spec, asked)
            job_file.log_to(path)
            return lead(path, found, spec, asked)
        except DeepclustError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code


def lead(path: Path, found: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """Task 0: the run from bring-up to its end, and the job's end."""
    nodes, code = ", ".join(found.nodes), Path(__file__).parents[2]
    log.info("job %s, start %d, on %s; code in %s", found.job, found.restart, nodes, code)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection for every task
    try:
        with _told(path):
            refuse_fruitless(path, found)
            with another_try():
                address = own_address(found)
        with hosting(path, found, address) as head:
            if spec.launcher == "ray":
                control_by_ray(path, found, spec, head, asked)
            else:
                srun_transport.control(path, found, spec, head, asked)
    except RequeueWanted as error:
        log.info("stopped: %s", error)
        return after_stop(path, asked)
    except DeepclustError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except Exception:  # none of ours: another start may mend it, and `refuse_fruitless` bounds that
        log.exception("unexpected")
        return RequeueWanted.exit_code
    finally:
        leave(path, found)
    return 0


def control_by_ray(
    path: Path, found: Allocation, spec: SlurmSpec, head: Head, asked: list[int]
) -> None:
    """Bring up a Ray of the job's own on all nodes, and run the controller on it."""
    address, notes = head.address, folder(path, found)
    os.environ.update(private(notes) | alone(address))
    daemon, over = Daemon(found, address, notes, None), Event()
    try:
        with _told(path), another_try():
            _bring_up(found, head, daemon, spec.start, lambda: job_file.stopping(path, asked))
        Thread(target=_watch, args=(head, daemon, asked, over), daemon=True).start()
        os.environ["RAY_ADDRESS"] = daemon.address
        from cluster_jobs.ray.controller import control  # Ray reads its variables when imported

        first = {} if spec.gpus else {FIRST_NODE: 1.0}  # where nodes differ, wherever there is room
        control(path, asked, {"stop": spec.stop, "worker_resources": first})
    finally:
        over.set()
        daemon.stop()


def _watch(head: Head, daemon: Daemon, asked: list[int], over: Event) -> None:
    """A node that leaves the job does not come back to it: stop, and let it be queued again.

    Nor does Ray's head, and whoever uses it hangs for a minute, and is then ended by Ray.
    """
    silent = 0
    while not over.wait(WATCH_S) and silent < SILENT and daemon.alive:
        silent = 0 if daemon.listens else silent + 1
        for peer in head.peers.values():
            peer.line.hear()
            if not peer.line.open:
                log.error("%s has left the job", peer.node)
                asked.append(LOST)
                return
    if not over.wait(LEAVE_S):
        log.error("Ray's head is gone")
        daemon.stop()
        os._exit(RequeueWanted.exit_code)


def _bring_up(
    found: Allocation, head: Head, daemon: Daemon, patience: float, stopping: Callable[[], bool]
) -> None:
    """Until every node has come and is part of the Ray."""
    head.gather(dict(list(enumerate(found.nodes))[1:]), patience, stopping)
    head.note("all here")
    daemon.wait(patience)
    for peer in head.peers.values():
        peer.line.send(ray=daemon.address)
    head.hear_all("up", patience, stopping)
    head.note("Ray is up")


@contextmanager
def another_try() -> Iterator[None]:
    """What a bring-up lacked may be there the next time; `refuse_fruitless` bounds that."""
    try:
        yield
    except ResourceError as error:
        raise RequeueWanted(str(error)) from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What ends us before the controller holds the run stands in its events all the same."""
    try:
        yield
    except DeepclustError as error:
        with suppress(RunHeldError), hold(path) as token:
            Run(path, token).event("stopped", kind=type(error).__name__, text=str(error))
        raise


def follow(path: Path, found: Allocation, spec: SlurmSpec, asked: list[int]) -> int:
    """A node's task: its Ray, as long as the head is there."""
    line = join(path, found, spec.start)
    told = line.first(2 * spec.start) if line else None
    if line is None or told is None:
        return 0  # the head has gone before it came to that
    notes, address = folder(path, found), line.socket.getsockname()[0]
    for tries in range(1 + AGAIN):
        daemon = Daemon(found, address, notes, told["ray"])
        try:
            daemon.wait(spec.start)
            line.send(up=True)
            while daemon.alive and line.open:
                line.hear(1.0)
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
    """What the job script is told of a run that has stopped at a step."""
    if signal.SIGINT in asked:
        job_file.forget_cancel(path)
        return CANCELLED
    if asked and asked[0] != LOST:  # nothing went wrong, so nothing is counted
        _counts(path).unlink(missing_ok=True)
    return RequeueWanted.exit_code


def refuse_fruitless(path: Path, found: Allocation) -> None:
    """Raise `ResourceError` when this job's last starts have brought nothing to the disk."""
    file, now = _counts(path), list(job_file.progress(Run(path)))
    before = read_json(file) if file.exists() else {}
    counted = [*(before["fruit"] if before.get("job") == found.job else []), now]
    write_json(file, {"job": found.job, "fruit": counted[-FRUITLESS - 1 :]})
    if len(counted) > FRUITLESS and all(one == now for one in counted[-FRUITLESS - 1 :]):
        said = [event["text"] for event in Run(path).events() if event["event"] == "stopped"]
        raise ResourceError(
            f"{FRUITLESS} starts of job {found.job} in a row brought nothing; their output is in "
            f"{job_file.output(path)}. The last said: {said[-1] if said else 'nothing'}"
        )


def _counts(path: Path) -> Path:
    return path / "slurm" / "fruit.json"


if __name__ == "__main__":
    sys.exit(main())
