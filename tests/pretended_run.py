"""A small run of a method on the pretended device, and its waits by phase.

`python -m tests.pretended_run METHOD [RANKS [KEY=VALUE ...]]` shows where a run waits for the card.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepclust import pretrain
from deepclust.clustering import two_level
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.sharded_points import ShardedPoints
from deepclust.launch import worker
from deepclust.methods.embed import Embedder
from deepclust.run.directory import Run
from deepclust.stages import extract, round_kmeans, train
from tests.forks import in_fork
from tests.methods.cases import CASES
from tests.pretended_device import Log, pretended
from tests.tiny import tiny_recipe

STEP, EXTRACT, BATCH, KMEANS, PASS = "step", "extract", "batch", "k-means", "pass"
PARTS = (
    ("step", STEP, STEP),
    ("batch of extraction", EXTRACT, BATCH),
    ("pass of k-means", KMEANS, PASS),
)  # names in the table, phases, and the calls by which they are divided
RESULT = "pretended.json"


@contextlib.contextmanager
def phases(log: Log) -> Iterator[None]:
    """Name the phases of a run, and count their calls."""
    with contextlib.ExitStack() as stack:

        def name(owner: Any, function: str, phase: str) -> None:
            inner = getattr(owner, function)

            @functools.wraps(inner)
            def timed(*args: Any, **kwargs: Any) -> Any:
                with log.within(phase):
                    return inner(*args, **kwargs)

            stack.enter_context(patch.object(owner, function, timed))

        def count(owner: Any, function: str, phase: str, within: str) -> None:
            inner = getattr(owner, function)

            @functools.wraps(inner)
            def counted(*args: Any, **kwargs: Any) -> Any:
                log.calls[phase] += log.phase == within
                return inner(*args, **kwargs)

            stack.enter_context(patch.object(owner, function, counted))

        name(train, "train_step", STEP)
        name(extract, "_fill", EXTRACT)  # without the pivot's batch and what is committed
        count(Embedder, "_apply", BATCH, EXTRACT)
        for level in (round_kmeans, two_level):
            name(level, "solve_kmeans", KMEANS)
        for points in (ArrayPoints, ShardedPoints):
            count(points, "assign_to", PASS, KMEANS)
        yield


def table_of(log: Log) -> dict[str, int]:
    """Waits and kernels of a step, of a batch and of a pass: on average, rounded up.

    The waits of a step are the most of one.
    """
    waits = {name: _share(log.count(phase), log.calls[call]) for name, phase, call in PARTS}
    kernels = {
        f"kernels of a {name}": _share(log.kernels[phase], log.calls[call])
        for name, phase, call in PARTS
    }
    return {**waits, "step": log.most.get(STEP, 0), **kernels}


def _share(count: int, calls: int) -> int:
    return math.ceil(count / calls) if calls else 0


def run_method(name: str, ranks: int, shards: Path, folder: Path, *overrides: str) -> Any:
    """Run a method whole on the pretended device, and return its table and its waits."""
    given = tiny_recipe(
        shards, f"method.name={name}", *CASES[name], "train.device=cuda", f"train.ranks={ranks}",
        *overrides,
    )  # fmt: skip
    with pretended() as log, phases(log), _told(log):
        pretrain(given, folder / "run")
    return json.loads((folder / "run" / RESULT).read_text())


@contextlib.contextmanager
def _told(log: Log) -> Iterator[None]:
    """Write down what rank 0 has seen, also where it is a process of its own."""
    inner: Callable[..., None] = worker._work

    def work(run: Run, role: Any, *args: Any) -> None:
        inner(run, role, *args)
        if role.rank == 0:
            waits = sorted((phase, where, n) for (phase, where), n in log.waits.items())
            told = {"table": table_of(log), "waits": waits, "kernels": Counter(log.kernels),
                    "calls": Counter(log.calls)}  # fmt: skip
            (run.path / RESULT).write_text(json.dumps(told))

    with patch.object(worker, "_work", work):
        yield


def main(name: str, ranks: str = "1", *overrides: str) -> None:
    """Run a method on new shards and print what it waits for."""
    from tests.pretended_run import run_method as run  # a fork knows no `__main__`
    from tests.tiny import tiny_shards

    with tempfile.TemporaryDirectory() as made:
        folder, shards = Path(made), tiny_shards(Path(made, "shards"))
        # new interpreters, as ranks of a run are, would have no pretended device
        told = in_fork(run, name, int(ranks), shards, folder, *overrides)
    for phase, where, n in told["waits"]:
        print(f"{phase:10} {n:6d}  {where}")
    print(told["table"], told["calls"], told["kernels"])


if __name__ == "__main__":
    main(*sys.argv[1:])
