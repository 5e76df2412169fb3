"""Runs on a real Ray of several nodes: the same bits as a local run, whatever is lost meanwhile."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs import job, store
from deepclust import Recipe, pretrain
from deepclust.files import read_json, write_json
from deepclust.launch import prepare_run
from deepclust.rundir import Run
from tests.jobs.nodes import Nodes, begin, controller, end, events, seated, send, until
from tests.killing import clustering, extracting, redone_steps, stages_done_twice, training
from tests.tiny import assert_same_run, assignments, tiny_recipe, tiny_shards

pytestmark = pytest.mark.slow

Moment = Callable[[Path], bool]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(3)
    yield found
    found.close()


def recipe(shards: Path, *overrides: str) -> Recipe:
    return tiny_recipe(shards, "train.ranks=2", "train.epochs=3", "ray.hang=6", *overrides)


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, of two local ranks."""
    path = tmp_path_factory.mktemp("runs") / "local"
    pretrain(recipe(shards), path)
    return path


def test_two_trainers_and_a_cluster_worker_on_three_nodes_do_what_local_ranks_do(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path
) -> None:
    end(begin(nodes, recipe(shards), tmp_path / "run"))
    assert_same_run(tmp_path / "run", local)
    members = events(tmp_path / "run", "placed")[0]["members"]
    assert [m["who"] for m in members] == ["rank 0", "rank 1", "cluster worker"]
    assert len({m["node"] for m in members}) == 3
    assert store.status(Run(tmp_path / "run")).state == "SUCCEEDED"
    for log in ("rank-00000.log", "rank-00001.log", "cluster-worker.log", "controller.log"):
        assert (tmp_path / "run" / "logs" / log).stat().st_size > 0


FAULTS: list[tuple[str, int, Moment, str]] = [
    ("rank 0", signal.SIGKILL, training, "death"),
    ("rank 1", signal.SIGKILL, extracting, "death"),
    ("cluster worker", signal.SIGKILL, clustering, "death"),
    ("rank 1", signal.SIGSTOP, training, "hang"),
]


@pytest.mark.parametrize(("who", "number", "moment", "cause"), FAULTS)
def test_a_gang_that_loses_a_member_begins_again_and_loses_nothing(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path, who: str, number: int,
    moment: Moment, cause: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    process = begin(nodes, recipe(shards, "data.extract_batch=8"), run)
    until(process, lambda: moment(run))
    send(run, who, number)
    end(process)
    fault = events(run, "fault")
    assert [(f["who"], f["cause"]) for f in fault] == [(who, cause)], fault
    assert stages_done_twice(run) == []
    assert redone_steps(run) <= 12
    assert all(np.array_equal(a, b) for a, b in zip(assignments(run), assignments(local)))
