"""The rank program: what every process of a run executes, wherever it was started.

`python -m deepclust.launch.worker`, or a fork of a warm process, is a trainer rank or the cluster
worker of a worker group. With one rank and inline clustering the launcher calls `work` in its own
process. The program dies with its parent, logs to its own file, and sends events to its supervisor.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepclust import pipeline
from deepclust.data.images import decode, gpu_decode
from deepclust.data.images.probes import decoder_hash, name_of
from deepclust.data.read import worker_processes
from deepclust.data.read.loader import resolve_read
from deepclust.data.shards.index import Index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import (
    DataError,
    DeepclustError,
    ResourceError,
    RunDiffersError,
    lack_of_memory,
    redact,
)
from deepclust.files import disk_errors, read_record, write_json
from deepclust.launch.devices import (
    check_shared,
    clustering_device,
    make_present,
    threads_of,
    training_device,
)
from deepclust.launch.role import CLUSTER_WORKER, Role, die_with
from deepclust.recipe import Recipe
from deepclust.run import decoder
from deepclust.run.decoder import Decoder
from deepclust.run.directory import Run
from deepclust.run.reporting import PipeReport, Report, log_to
from deepclust.stages import cluster
from deepclust.stages.build import Context
from deepclust.stages.data_index import idle_weights, open_data_index
from deepclust.world import World, close_process_group, join

BEGAN = {"fingerprint": str, "n": int, "shards": int, "read": str}  # of data.json


def work(run: Run, role: Role, report: Report, stopping: Callable[[], bool]) -> None:
    """Take a role and do its work until the run is finished."""
    with disk_errors(run.path):
        try:
            _work(run, role, report, stopping)
        except Exception as error:
            if (lack := lack_of_memory(error)) is not None:
                raise lack from error
            raise


def _work(run: Run, role: Role, report: Report, stopping: Callable[[], bool]) -> None:
    run, asked = replace(run, alive=report.alive), stopping
    stopping = _beating(report, stopping)
    recipe = run.recipe
    log_to(run.path / "logs" / role.log_name, role.rank)
    torch.set_num_threads(threads_of(recipe, role))
    index, read = open_data(run, recipe, keeps=not role.is_cluster_worker)
    if role.rank == 0:
        new = () if run.rounds() else (*index.notes(labels=False), *idle_weights(recipe))
        for note in (*new, *decode.notes()):
            report.event("warning", text=note)
    if role.is_cluster_worker:
        device = clustering_device(recipe, role)
        alone = cluster.make_context(run, recipe, index, device, report, World())
        make_present(alone.device)  # the one that was tried and works
        cluster.serve(alone, stopping)
        return
    device = training_device(recipe, role)
    if recipe.data.decode == "gpu":
        gpu_decode.check(device)
    world = join(role.rank, role.size, role.rendezvous, device, recipe.train.timeout)
    if recipe.data.decode == "gpu":
        check_decoder(run, world, report)
    job = None
    if recipe.cluster is not None and recipe.cluster.where == "ranks":
        check_shared(recipe, device)
        job = cluster.make_context(run, recipe, index, device, report, world)
    elif recipe.cluster is not None and world.is_first and clusters_here(recipe, role):
        place = clustering_device(recipe, role)
        job = cluster.make_context(run, recipe, index, place, report, World())
    report.alive()  # from here on, silence is a hang
    context = Context(recipe, run, world, index, read, report, job, stopping, role.stage, asked)
    try:
        pipeline.run(context)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{device} is out of memory: lower train.batch, or raise train.accumulate or "
            f"train.ranks ({error})"
        ) from error
    close_process_group()


def clusters_here(recipe: Recipe, role: Role) -> bool:
    """Return whether the first rank clusters in its own process."""
    return recipe.clusters_inline or not role.has_worker


def _beating(report: Report, stopping: Callable[[], bool]) -> Callable[[], bool]:
    """Return `stopping` as a sign of life too: who asks could stop, so it is not stuck."""

    def asked() -> bool:
        report.alive()
        return stopping()

    return asked


def check_decoder(run: Run, world: World, report: Report) -> None:
    """Compare what this rank's GPU makes of known JPEGs with what the run began with.

    Raises `RunDiffersError` where that is something else, and `ResourceError` where ranks differ.
    """

    def tell(text: str) -> None:
        report.event("warning", text=text)

    here = Decoder(decoder_hash(world.device), name_of(world.device))
    pair = [decoder.settle(run, here, tell), here] if world.is_first else []
    parts = world.broadcast_object([[one.hash, one.by] for one in pair])
    began, first = (Decoder(*part) for part in parts)
    decoder.check(run, began, first, here)


def open_data(run: Run, recipe: Recipe, keeps: bool = True) -> tuple[Index, str]:
    """Return the index of the run's shards and how they are read, which decides plans' order.

    `keeps`: what they are is written down if the run begins. A cluster worker, which no rank waits
    for then, could write after the first rank has added to it. Raises `RunDiffersError` when they
    are not those that the run began with.
    """
    file = run.path / "data.json"
    began = _read_began(file)
    try:
        index = open_data_index(recipe.data, run.path)
    except DataError as error:
        if began is None or isinstance(error, UnreachableError):
            raise
        moved = f"If they were moved: deepclust resume {run.path} data.shards=NEW_PLACE"
        if "not those that were indexed" in str(error):
            text = f"the data of {run.path} have changed: {error} {moved}"
            raise RunDiffersError(text) from error
        # they may be away for a while, or the index is damaged: nothing is known of the data
        raise DataError(f"the data of {run.path} cannot be opened: {error} {moved}") from error
    facts: dict[str, Any] = {
        "fingerprint": index.fingerprint, "n": len(index), "shards": len(index.shards)
    }  # fmt: skip
    if began is None:
        mirror = recipe.data.stage is not None
        began = facts | {"read": resolve_read(index, recipe.data.read, mirror)}
        if keeps:
            write_json(file, began)
    if any(facts[key] != began[key] for key in facts):
        changed = [f"{k}: {began[k]} before, {facts[k]} now" for k in facts if began[k] != facts[k]]
        raise RunDiffersError(
            f"the data of {run.path} differ from those it began with ({'; '.join(changed)}). "
            "Restore the old shards, or start a new run. If they are the old ones, "
            f"{file} is damaged: delete it and resume."
        )
    return index, str(began["read"])


def _read_began(file: Path) -> dict[str, Any] | None:
    """Return what the data were when the run began, or None for a run that begins now."""
    if not file.exists():
        return None
    try:
        return read_record(file, BEGAN)
    except DataError as error:
        raise DataError(f"{error} Delete that file and resume: it is made again") from error


def is_local(rendezvous: str) -> bool:
    """Return whether all ranks are on this machine, so that gloo needs the loopback only."""
    return not rendezvous.startswith("tcp://") or rendezvous.startswith("tcp://127.")


def forked(words: list[str], files: list[int]) -> int:
    """Be the program with these arguments in a fork of a warm process (`launch.warm`)."""
    (pipe,) = files  # its number here; the last of an option counts
    return main([*words, "--parent", str(os.getppid()), "--pipe", str(pipe)])


def readers_beside(run: Path, rank: int) -> None:
    """Have the fork server of a rank's readers, if it has any, while this is a fresh fork."""
    with suppress(DeepclustError):  # which the work finds too, and reports
        if rank != CLUSTER_WORKER and Run(run).recipe.data.readers():
            worker_processes.fork_the_fork_server()


def main(words: list[str] | None = None) -> int:
    """Run one role in this process.

    `launch.local` gives the arguments.
    """
    parser = argparse.ArgumentParser()
    for name in ("--run", "--token", "--rendezvous"):
        parser.add_argument(name, required=True)
    parser.add_argument("--stage", default="")
    for name in ("--gpu", "--threads"):
        parser.add_argument(name, default="")
    for name in ("--attempt", "--rank", "--size", "--parent", "--pipe"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args(words)
    die_with(args.parent)
    if words is not None:
        readers_beside(Path(args.run), args.rank)
    # A file that is cut short while it is mapped ends with a signal. Descriptor 2 is another one
    # while an image is decoded (`complaints.py`).
    faulthandler.enable(os.dup(2))
    asked: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked.append(received))
    if sys.platform == "linux" and is_local(args.rendezvous):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(signal.valid_signals()))  # held back by it
    report = PipeReport(args.pipe)
    run = Run(Path(args.run), args.token, args.attempt)
    gpu, threads = (int(text) if text else None for text in (args.gpu, args.threads))
    role = Role(args.rank, args.size, args.rendezvous, args.stage or None, gpu, threads)
    try:
        work(run, role, report, lambda: bool(asked))
    except DeepclustError as error:
        report.failed(error, error.exit_code)
        os._exit(error.exit_code)  # closing the process group could wait for ranks that wait for us
    except BaseException as error:
        sys.stderr.write(redact(traceback.format_exc()))
        sys.stderr.flush()
        report.failed(error, 1)
        os._exit(1)
    report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
