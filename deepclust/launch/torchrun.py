"""A rank that `torchrun` has started, and how the ranks hear of the run that rank 0 holds.

`torchrun ... deepclust pretrain` starts the command once for each rank. Rank 0 makes the run, holds
its lock and clusters. The others wait until it says which attempt that is. Faults are torchrun's
affair: it ends all ranks when one ends, and `--max-restarts` begins again where the run stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from deepclust.errors import FollowedError, RecipeError, redact
from deepclust.launch.role import Role
from deepclust.launch.signals import collected_signals
from deepclust.recipe import Recipe
from deepclust.run.directory import Run

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS = "env://"
ANNOUNCED, HEARD = "deepclust/run", "deepclust/heard"  # of the store that the ranks share
LAST_WORDS_S = 5.0
PATIENCE = timedelta(minutes=10)  # for rank 0 to make the run


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks that torchrun has started."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    is_restart: bool = False

    @property
    def role(self) -> Role:
        """The role of the rank; rank 0 clusters, since torchrun starts no cluster worker."""
        return Role(self.rank, self.size, RENDEZVOUS, gpu=self.local_rank, has_worker=False)

    def fitted(self, recipe: Recipe) -> Recipe:
        """Return the recipe with torchrun's number of ranks.

        Raises `RecipeError` where it asks for another number, or for a cluster worker.
        """
        if recipe.train.ranks not in (1, self.size):
            raise RecipeError(
                f"train.ranks={recipe.train.ranks}, but torchrun has started WORLD_SIZE="
                f"{self.size} ranks: leave train.ranks out, or start as many"
            )
        cluster = recipe.cluster
        if cluster is not None and (cluster.overlap or cluster.where == "worker"):
            key = "cluster.overlap=true" if cluster.overlap else "cluster.where=worker"
            raise RecipeError(
                f"{key} needs a cluster worker, which torchrun does not start: drop it, or run "
                f"deepclust pretrain with train.ranks={self.size} and without torchrun"
            )
        return recipe.replace(f"train.ranks={self.size}")

    def announce(self, run: Run) -> None:
        """Tell the other ranks which attempt of the run they are part of."""
        self._tell(token=run.token, attempt=run.attempt)
        self._stay_here()

    def _stay_here(self) -> None:
        """Let gloo use the loopback where all ranks are on this machine, as ours do."""
        if self.local_size == self.size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the other ranks when the block ends, also by an error; they wait for an attempt."""
        try:
            yield
        except BaseException as error:
            self._tell(failed=redact(str(error)) or type(error).__name__)
            raise
        self._tell(finished=True)

    def _tell(self, **facts: Any) -> None:
        """Tell the others, unless they have been informed of an attempt: they look no more."""
        text, store = json.dumps(facts), _store()
        if store.compare_set(ANNOUNCED, "", text).decode() != text or "token" in facts:
            return
        deadline = time.monotonic() + LAST_WORDS_S  # the store may end with this process
        while store.add(HEARD, 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    def follow(self, run_dir: Path) -> Run:
        """Be a rank of the run that rank 0 announces, until it is finished, and return the run."""
        from deepclust.launch.in_process import borrowed_process  # imports torch
        from deepclust.launch.worker import work
        from deepclust.run.reporting import DirectReport

        facts = json.loads(_store().get(ANNOUNCED))
        _store().add(HEARD, 1)
        if "failed" in facts:
            raise FollowedError(f"rank 0 did not begin: {facts['failed']}")
        if "finished" in facts:
            return Run(run_dir)
        self._stay_here()
        run = Run(run_dir, facts["token"], facts["attempt"])
        with collected_signals() as signals, borrowed_process():
            work(run, self.role, DirectReport(run, lambda record: None), lambda: bool(signals))
        return run


def place() -> Place | None:
    """Return the place that the environment gives this process, or None where it is alone.

    Raises `RecipeError` for an environment that is not whole.
    """
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    if missing := [name for name in NAMES if name not in given]:
        raise RecipeError(
            f"RANK and WORLD_SIZE are set, as torchrun does, but not {', '.join(missing)}: start "
            "with torchrun, or unset RANK and WORLD_SIZE to run on this machine alone"
        )
    rank, size, local = (_number(name, given[name]) for name in NAMES[:3])
    if rank >= size:
        raise RecipeError(
            f"RANK={rank} is not below WORLD_SIZE={size}: unset both, or use torchrun"
        )
    local_size = _number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    restarts = _number("RESTARTS", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Place(rank, size, local, local_size, restarts > 0)


def is_follower() -> bool:
    """Return whether another process leads the run that this one is a rank of."""
    here = place()
    return here is not None and here.rank > 0


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise RecipeError(f"{name}={text!r} is not a number: unset it, or start with torchrun")
    return int(text)


@cache  # rank 0 may be its server
def _store() -> Any:
    """Return the store that all ranks share."""
    from deepclust.world import store_of_environment  # imports torch

    return store_of_environment(PATIENCE)
