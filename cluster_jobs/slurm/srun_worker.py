"""The program of a task under the launcher `srun`: it starts the process of its role, and kills it.

It connects to the head, starts the rank program when it is given a role, and passes on what that
reports. It computes nothing, and a warm process beside it imports torch (`launch.warm`), so it
answers whatever becomes of the rank. It ends, with its rank, when the head says so or is gone.
"""

from __future__ import annotations

import selectors
import signal
import sys
from pathlib import Path
from typing import Any

from cluster_jobs.slurm.allocation import Allocation, read_allocation
from cluster_jobs.slurm.rendezvous import Line, join
from deepclust.launch.local import EXIT_POLL_S, WorkerProcess
from deepclust.launch.ports import free_port
from deepclust.launch.role import Role, die_with
from deepclust.launch.warm import Warm, warmed
from deepclust.run.directory import Run


def main(run_dir: Path, task: Allocation, patience: float) -> int:
    """Serve the head until it closes the line."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the head too, which decides for all
    with warmed() as warm:  # while the tasks meet, torch is imported
        line = join(run_dir, task, patience)
        if line is not None:
            serve(line, run_dir, warm)
    return 0  # the job ends as the head does, and srun reports the worst of all


def serve(line: Line, run_dir: Path, warm: Warm | None = None) -> None:
    """Do what the head orders: start a role, ask its process to stop, kill it."""
    process: WorkerProcess | None = None
    address = line.socket.getsockname()[0]
    line.send(ready=free_port(address))
    while line.open:
        wait(line, process)
        for order in line.receive():
            if "role" in order:
                process = start(run_dir, order, warm)
                line.send(process=process.process.pid)
            elif "stop" in order and process is not None:
                process.stop()
            elif "kill" in order:
                end(process)
                process = None
                line.send(ready=free_port(address))
        for record in process.read() if process is not None else ():
            line.send(**record)
    end(process)
    line.close()


def wait(line: Line, process: WorkerProcess | None) -> None:
    """Wait a moment for an order, or for a report of the process."""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        if process is not None and not process.has_ended:
            selector.register(process, selectors.EVENT_READ)
        selector.select(EXIT_POLL_S)


def start(run_dir: Path, order: dict[str, Any], warm: Warm | None) -> WorkerProcess:
    """Start the process of the role in the order."""
    run = Run(run_dir, order["token"], order["attempt"])
    return WorkerProcess(run, Role(**order["role"]), warm)


def end(process: WorkerProcess | None) -> None:
    """Kill the process, if there is one."""
    if process is not None:
        process.kill()


if __name__ == "__main__":
    die_with(int(sys.argv[2]))  # a child of the head ends with it
    sys.exit(main(Path(sys.argv[1]), read_allocation(), float(sys.argv[3])))
