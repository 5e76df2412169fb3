"""Checkpoints are written by a thread, from copies of the tensors, while the training goes on.

`put` copies the tensors to the host and returns. The thread writes, hashes and renames. One
checkpoint is being written at most: the next `put` waits for it. What goes wrong in the thread is
raised by the next `poll` (at every step), `put` or `settle`.

With slices of parameters (`world.Owned`) the thread of each rank writes a file. The thread of rank
0 looks for the hashes beside these files, and publishes when all are there. Collectives are called
in the main thread alone, by `put` and `settle`. A kill before the rename leaves a scratch folder
that the next holder of the run deletes, and the checkpoint before it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from deepclust.copies import snapshot
from deepclust.files import disk_errors, file_hash, sync, write_json, write_tensors
from deepclust.run.checkpoint import OwnedTensors, State, Tensors
from deepclust.run.directory import Run, is_done, prune
from deepclust.world import ALONE, World

HASH = ".blake2b"  # beside an owner's file while it waits for its place
LOOK_S = 0.02  # between two looks for the other ranks' files

Parts = dict[str, Tensors]
Check = Callable[[State, Tensors], None]


@dataclass(frozen=True)
class Job:
    """A checkpoint that is being written: its copies, and the scratch folder of the slices."""

    state: State
    folder: Path
    parts: Parts
    owned: OwnedTensors
    scratch: Path

    def file(self, rank: int) -> Path:
        """Return the file of a rank's slices."""
        return self.scratch / f"owned-{rank:05d}.safetensors"


class CheckpointWriter:
    """Writes the checkpoints of a run and keeps the newest `keep`.

    `done(step)` is called in the caller's thread on the rank that publishes. `check(state,
    weights)` may refuse what a checkpoint would hold.
    """

    def __init__(
        self,
        run: Run,
        keep: int,
        world: World = ALONE,
        done: Callable[[int], None] = lambda step: None,
        check: Check = lambda state, weights: None,
    ) -> None:
        self.run, self.keep, self.world, self.done, self.check = run, keep, world, done, check
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._job: Job | None = None
        self._written: Future[None] = Future()
        self._published: Future[None] = Future()
        self._said = False
        self._ending = threading.Event()  # the other ranks' files are waited for no longer

    def put(self, state: State, parts: Parts, owned: OwnedTensors | None = None) -> bool:
        """Begin a checkpoint, once the one before is there; return False if the step has one.

        With `owned` (this rank's slices, by names that all ranks have) every rank calls, else rank
        0 alone. `parts` are rank 0's.
        """
        self.settle()
        folder = self.run.path / "checkpoints" / f"{state.step:08d}"
        # a writer of an earlier attempt cannot know the name; a new holder sweeps `.*.tmp`
        name = f".owned-{folder.name}-{self.run.token}-{secrets.token_hex(4)}.tmp"
        exists = is_done(folder)
        if owned:
            exists, name = self.world.broadcast_object((exists, name))
        if exists:
            return False
        self._job = _copied(Job(state, folder, parts, owned or {}, folder.with_name(name)))
        self._said = False
        self._written = self._pool.submit(self._write, self._job)
        self._published = self._pool.submit(self._publish, self._job, self._written)
        return True

    def poll(self) -> None:
        """Raise what kept this rank's thread from writing; no rank waits for another."""
        if self._job is None or self._said or not self._published.done():
            return
        self._published.result()
        self._tell(self._job)

    def settle(self) -> None:
        """Wait until the checkpoint is there, or raise what kept it from that, on all ranks."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            self._agree(job, self._written)
            self._agree(job, self._published)
        except BaseException:
            self._ending.set()
            if self.world.is_first:
                self._pool.shutdown()
                shutil.rmtree(job.scratch, ignore_errors=True)
            raise
        self._tell(job)

    def close(self) -> None:
        """End the thread: what it can finish without other ranks it finishes first."""
        self._ending.set()
        self._pool.shutdown()

    def _agree(self, job: Job, future: Future[None]) -> None:
        """Wait for this rank's thread, then for all; raise on all ranks when one has failed."""
        if not job.owned:
            return future.result()
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        self.world.barrier()  # without a time limit: disks differ
        self.world.raise_all(error, f"checkpoint {job.folder}")

    def _tell(self, job: Job) -> None:
        if self.world.is_first and not self._said:
            self.done(job.state.step)
        self._said = True

    def _write(self, job: Job) -> None:
        """Refuse or write this rank's slices (in the thread)."""
        slices = {name: tensor for name, (tensor, _) in job.owned.items()}
        self.check(job.state, job.parts.get("model", {}) | slices)
        if job.owned:
            _write_owned(job.file(self.world.rank), job.owned, self.run.alive)

    def _publish(self, job: Job, written: Future[None]) -> None:
        """Publish on rank 0, when all ranks have written (in the thread)."""
        written.result()
        if not self.world.is_first:
            return
        files = [job.file(rank) for rank in range(self.world.size)] if job.owned else []
        while not all(file.with_suffix(HASH).exists() for file in files):
            if self._ending.wait(LOOK_S):
                return
        _commit(self.run, job, files, self.keep)
        shutil.rmtree(job.scratch, ignore_errors=True)


def save(
    run: Run,
    state: State,
    parts: Parts,
    keep: int,
    owned: OwnedTensors | None = None,
    world: World = ALONE,
) -> bool:
    """Write a checkpoint unless this step has one, wait for it, and keep the newest `keep`.

    Return whether it was written. Who calls is as for `put`.
    """
    writer = CheckpointWriter(run, keep, world)
    try:
        begun = writer.put(state, parts, owned)
        writer.settle()
        return begun
    finally:
        writer.close()


def _copied(job: Job) -> Job:
    """Return the job with copies of all its tensors, made with one wait for the device."""
    given = [value for tensors in job.parts.values() for value in tensors.values()]
    copies = iter(snapshot([*given, *(tensor for tensor, _ in job.owned.values())]))
    parts = {part: {name: next(copies) for name in names} for part, names in job.parts.items()}
    owned = {name: (next(copies), own) for name, (_, own) in job.owned.items()}
    return Job(job.state, job.folder, parts, owned, job.scratch)


def _commit(run: Run, job: Job, written: list[Path], keep: int) -> None:
    """Publish what is given, and the owners' files, in one rename."""

    def fill(partial: Path) -> None:
        for name, tensors in job.parts.items():
            write_tensors(partial / f"{name}.safetensors", tensors, alive=run.alive)
        for file in written:
            os.rename(file, partial / file.name)
        write_json(partial / "state.json", asdict(job.state))

    hashes = {file.name: file.with_suffix(HASH).read_text() for file in written}
    inputs = {"step": job.state.step, "round": job.state.round}
    run.commit(job.folder, fill, inputs, hashes=hashes)
    prune(run.checkpoints(), keep, run.alive)


def _write_owned(file: Path, owned: OwnedTensors, alive: Callable[[], None]) -> None:
    tensors = {name: tensor for name, (tensor, _) in owned.items()}
    ranges = {name: asdict(own) for name, (_, own) in owned.items()}
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"owned": json.dumps(ranges)}, alive)
        sync(file, alive)  # on this rank's machine, where rank 0 cannot flush it
        # rank 0 would hash for all, one by one; it looks for this file, so it appears whole
        half = file.with_suffix(".half")
        half.write_text(file_hash(file, alive))
        half.rename(file.with_suffix(HASH))
