"""A process of the gang under the launcher `srun`: the role that the layout gives to this task.

It goes to the head, hears who it is, and does the role's work, the same rank program as everywhere.
What it tells goes down its line. It leaves when the head says so, or is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from cluster_jobs.slurm.allocation import Allocation, allocation, free_ports
from cluster_jobs.slurm.rendezvous import Line, join
from deepclust.errors import DeepclustError
from deepclust.launch.role import Role, die_with
from deepclust.run.directory import Run


def main(run: Path, found: Allocation, patience: float) -> int:
    """Do this task's work, if it has any, and wait until the head lets us go."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the head too, which decides for all
    line = join(run, found, patience)
    if line is None:
        return 0
    line.send(ready=free_ports(line.socket.getsockname()[0], 1)[0])
    order = line.first(None)
    if order is None:
        return 0
    stop = threading.Event()
    listener = threading.Thread(target=_listen, args=(line, stop), daemon=True)
    listener.start()
    _work(run, order, line, stop)
    listener.join()
    return 0


def _listen(line: Line, stop: threading.Event) -> None:
    """Hear the wish to stop, and the end of the head, which is ours."""
    while line.open:
        for record in line.hear(None):
            if "stop" in record:
                stop.set()
    # a process group that others have left may never close. With 0: the job ends as the
    # head did, and srun reports the worst of all
    os._exit(0)


def _work(run: Path, order: dict[str, object], line: Line, stop: threading.Event) -> None:
    from deepclust.launch.worker import work
    from deepclust.run.reporting import PipeReport  # torch and all

    if str(order["rendezvous"]).startswith("tcp://127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    role = Role(order["rank"], order["size"], order["rendezvous"], gpu=order["gpu"])  # type: ignore
    report = PipeReport(line.fileno())
    try:
        work(Run(run, str(order["token"]), order["attempt"]), role, report, stop.is_set)  # type: ignore
    except DeepclustError as error:
        report.failed(error, error.exit_code)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        report.failed(error, 1)
    else:
        line.send(done=True)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))  # a child of the head ends with it
    sys.exit(main(Path(sys.argv[1]), allocation(), float(sys.argv[3])))
