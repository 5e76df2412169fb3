"""The pipe transport: the processes of a worker group on the machine of who starts them.

They are forks of a warm process where there is one (`warm.py`), and else new interpreters.
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from deepclust.data.owned_folder import make_folder
from deepclust.files import disk_errors, open_append
from deepclust.launch.endings import Record
from deepclust.launch.role import CLUSTER_WORKER, Role
from deepclust.launch.signals import held_back
from deepclust.launch.warm import RANK, Fork, Warm
from deepclust.run.directory import Run

TAIL_LINES = 15
WHY: dict[int, str] = {  # of signals that nobody has to send
    signal.SIGBUS: " (SIGBUS): a file of the index or of the run was cut short while it was in use",
    signal.SIGKILL: " (SIGKILL): by somebody, or for want of memory",
    signal.SIGSEGV: " (SIGSEGV): a fault in a library",
}
EXIT_POLL_S = 0.2  # a process that dies may leave its pipe open in one of its children


class WorkerProcess:
    """A child process with a role, and the end of its pipe that we read."""

    def __init__(self, run: Run, role: Role, warm: Warm | None = None) -> None:
        """Start it, with its readers in a process group, so that all can be killed together."""
        name = role.name.replace(" ", "-")
        self.role, self.output = role, run.path / "logs" / f"{name}.out"
        self._pipe, writing = os.pipe()
        self._rest = b""
        self.has_ended = self._has_result = False
        words = []
        options = {
            "run": run.path, "token": run.token, "attempt": run.attempt,
            "rank": role.rank, "size": role.size, "rendezvous": role.rendezvous,
            "stage": role.stage or "", "gpu": "" if role.gpu is None else role.gpu,
            "threads": "" if role.threads is None else role.threads,
            "parent": os.getpid(), "pipe": writing,
        }  # fmt: skip
        for option, value in options.items():
            words += [f"--{option}", str(value)]
        with disk_errors(self.output), held_back(), open_append(self.output) as out:
            self.process = _start(warm, role.name, words, out.fileno(), writing)
        os.close(writing)
        os.set_blocking(self._pipe, False)

    def fileno(self) -> int:
        """Return the descriptor of the pipe, for selectors."""
        return self._pipe

    @property
    def place(self) -> Record:
        """Where it is, for the event `placed`."""
        return {"who": self.role.name, "host": platform.node(), "pid": self.process.pid}

    def read(self) -> list[Record]:
        """Return what it has reported, and last, once, its end."""
        code = self.process.poll()  # before the pipe is read, so that nothing comes after the end
        records = self._lines()
        self._has_result |= any("result" in record for record in records)
        if code is not None and not self.has_ended:
            self.has_ended = True
            if not self._has_result:
                records.append(self._end(code))
        return records

    def _lines(self) -> list[Record]:
        data = b""
        with suppress(BlockingIOError):
            while block := os.read(self._pipe, 1 << 16):
                data += block
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [dict(json.loads(line)) for line in lines]

    def _end(self, code: int) -> Record:
        if code == 0:
            return {"result": {}}
        if code < 0:
            return {"death": f"was killed by signal {-code}{WHY.get(-code, '')}"}
        tail = self.output.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return {"death": "\n".join([f"ended with exit code {code}; its output ends with:", *tail])}

    def stop(self) -> None:
        """Ask it to stop at its next step."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        """Kill it and its readers, even stopped ones."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._pipe)


def _start(
    warm: Warm | None, name: str, words: list[str], out: int, pipe: int
) -> Fork | subprocess.Popen[bytes]:
    """Start a rank program in a new process group; its output goes to `out`."""
    if warm is not None:
        try:
            return warm.fork(f"{RANK}:forked", words, [out, out, pipe], name)
        except OSError:  # a new interpreter works, or says in its output why not
            pass
    command = [sys.executable, "-P", "-m", RANK, *words]
    return subprocess.Popen(command, stdout=out, stderr=out, pass_fds=[pipe], process_group=0)


class Pipes:
    """The transport of a group whose processes are all on this machine."""

    def __init__(self, run: Run, warm: Warm | None = None) -> None:
        self.run, self.warm = run, warm
        self.processes: list[WorkerProcess] = []
        self.selector = selectors.DefaultSelector()
        self.folder = make_folder(Path(tempfile.gettempdir()), "deepclust-group")

    def start(self, roles: list[Role]) -> list[Record]:
        """Start a child for every role.

        They meet at a file.
        """
        rendezvous = str(self.folder / "rendezvous")
        for role in roles:
            process = WorkerProcess(self.run, replace(role, rendezvous=rendezvous), self.warm)
            self.processes.append(process)
            self.selector.register(process, selectors.EVENT_READ, process)
        return [process.place for process in self.processes]

    def poll(self, timeout: float) -> list[tuple[int, Record]]:
        """Return what the children have reported, and whose process has ended."""
        self.selector.select(min(timeout, EXIT_POLL_S))
        records = []
        for process in [p for p in self.processes if not p.has_ended]:
            records += [(process.role.rank, record) for record in process.read()]
            if process.has_ended:
                self.selector.unregister(process)
        return records

    def stop(self) -> None:
        """Ask the trainers to stop at their next step."""
        for process in self.processes:
            if process.role.rank != CLUSTER_WORKER:
                process.stop()

    def kill(self) -> None:
        """Kill every child."""
        self.selector.close()
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
