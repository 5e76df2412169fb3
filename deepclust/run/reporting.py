"""What a run reports: metrics to JSONL and TensorBoard, events and progress to the controller.

Rank 0 writes the metrics. Only the controller writes events, so a rank hands them to a `Report`.
In the controller's own process that writes the file, in a spawned rank it writes to a pipe. The
names and fields of events are in `events.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from deepclust.errors import redact
from deepclust.files import disk_errors, open_append
from deepclust.run.directory import Run
from deepclust.run.events import EventName
from deepclust.run.signs import BEAT_S, SignsOfLife
from deepclust.run.varying import Varying


class Report(Protocol):
    """Where a rank's events and progress go."""

    def event(self, name: EventName, **fields: Any) -> None:
        """Report something that happened once.

        It goes to events.jsonl.
        """

    def progress(self, **fields: Any) -> None:
        """Report how far we are.

        It goes to the screen and is not kept.
        """

    def alive(self) -> None:
        """Show that this process still gets somewhere.

        Every loop of a long stage calls it.
        """


class DirectReport:
    """The report of the controller's own process."""

    def __init__(self, run: Run, show: Callable[[dict[str, Any]], None]) -> None:
        self.run = run
        self.show = show

    def event(self, name: EventName, **fields: Any) -> None:
        """Write the event, then show it."""
        _log(name, fields)
        self.run.event(name, **fields)
        self.show({"event": name, **fields})

    def progress(self, **fields: Any) -> None:
        """Show it."""
        _log("step", fields)
        self.show({"progress": True, **fields})

    def alive(self) -> None:
        """Nobody watches the process that is its own controller."""


class PipeReport(SignsOfLife):
    """The report of a spawned rank: JSON lines down a pipe that its supervisor reads.

    A thread sends every second how long ago the last sign of life was. So a process that waits
    in a collective still answers, and one that was stopped does not.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def event(self, name: EventName, **fields: Any) -> None:
        """Hand the event to the supervisor."""
        _log(name, fields)
        self._send({"event": name, **fields})

    def progress(self, **fields: Any) -> None:
        """Hand the progress to the supervisor."""
        _log("step", fields)
        self._send({"progress": True, **fields})

    def failed(self, error: BaseException, exit_code: int) -> None:
        """Report why this process ends, to the supervisor and in our own log."""
        logging.getLogger("deepclust").error("%s: %s", type(error).__name__, error)
        self._send({"result": failure(error, exit_code)})

    def done(self) -> None:
        """Report that this process has done its work.

        Its supervisor need not wait for its exit.
        """
        self._send({"result": {}})

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, and so are we in a moment
            while True:
                self._send({"idle_s": self.idle_s})
                time.sleep(BEAT_S)

    def _send(self, record: dict[str, Any]) -> None:
        line = memoryview(json.dumps(record).encode() + b"\n")
        with self._lock:  # a long line takes several writes
            while line:
                line = line[os.write(self.descriptor, line) :]


def failure(error: BaseException, exit_code: int) -> dict[str, Any]:
    """Return the result of a process that ended with an error."""
    return {"failed": str(error), "kind": type(error).__name__, "exit_code": exit_code}


def _log(name: str, fields: dict[str, Any]) -> None:
    logging.getLogger("deepclust").info("%s %s", name, json.dumps(fields))


class Metrics:
    """Numbers over time, in metrics.jsonl and for TensorBoard."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.board = Board(run.path / "tensorboard")
        self.varying = Varying()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Write one record.

        Numbers that vary also become TensorBoard scalars `kind/name`.
        """
        self.run.metric(kind, step=step, **values)
        steps: dict[int, dict[str, float]] = {}
        for name, points in self.varying.curves(kind, step, values).items():
            for at, value in points:
                steps.setdefault(at, {})[name] = value
        for at, numbers in sorted(steps.items()):
            self.board.write(at, numbers)

    def close(self) -> None:
        """Close the file for TensorBoard."""
        self.board.close()


class Board:
    """A file of scalars for TensorBoard: a copy of metrics.jsonl, which never ends a run.

    Whatever goes wrong with it is logged once, and then nothing more is written. torch's
    SummaryWriter writes in a thread, whose errors reach nobody or stop the caller.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: BinaryIO | None = None
        self.is_broken = False

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Write the scalars of a step, and open the file for the first."""
        if self.is_broken or not numbers:
            return
        try:
            if self.file is None:
                self.file = self._open()
            self._write({"step": step}, numbers)
            self.file.flush()
        except Exception as error:
            self.is_broken = True
            why = f"{type(error).__name__}: {error}"
            logging.getLogger("deepclust").warning("%s is not written: %s", self.folder, why)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        place = f"{int(time.time()):010d}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.file = open_append(self.folder / f"events.out.tfevents.{place}")
        self._write({"file_version": "brain.Event:2"}, {})
        return self.file

    def _write(self, fields: dict[str, Any], numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        event = Event(wall_time=time.time(), **fields)
        for name, value in numbers.items():
            event.summary.value.add(tag=name, simple_value=value)
        RecordWriter(self.file).write(event.SerializeToString())


class AppendingHandler(logging.FileHandler):
    """A log file that is opened without following a link, and that never ends a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out: a storage that fails is named by the files that matter."""

    def close(self) -> None:
        """Close the file, also where its last lines cannot be written."""
        with contextlib.suppress(OSError):
            super().close()

    def _open(self) -> TextIO:  # type: ignore[override]
        return io.TextIOWrapper(open_append(Path(self.baseFilename)), "utf-8", "backslashreplace")


class Formatter(logging.Formatter):
    """Lines of a log without secrets, those of libraries and tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))


def log_to(path: Path, rank: int) -> logging.Logger:
    """Let the package's logger write to a file, each line with time and rank, and return it."""
    logger = logging.getLogger("deepclust")
    for handler in [one for one in logger.handlers if isinstance(one.formatter, Formatter)]:
        logger.removeHandler(handler)  # of an earlier rank, and none of the caller's
        handler.close()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = AppendingHandler(path)
    handler.setFormatter(Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return logger
