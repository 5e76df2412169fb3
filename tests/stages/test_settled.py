"""A cluster worker waits until the first rank of its attempt has settled which rounds stand."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepclust import pipeline, pretrain
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.run.settled import is_settled, settle
from deepclust.stages import cluster
from tests.forks import in_fork
from tests.tiny import assert_same_run, tiny_recipe

WORKER = (
    "cluster.where=worker", "cluster.final=true", "cluster.every=2 epochs", "train.epochs=1",
    "keep.features=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain(tiny_recipe(shards, *WORKER), folder)
    return folder


def in_k_means(finished: Path, run: Path) -> Path:
    """A copy of a run as a kill in the k-means of its final round leaves it."""
    shutil.copytree(finished, run)
    for stage in ("assignments", "centroids"):
        shutil.rmtree(run / "rounds" / "0001" / stage)
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(line for line in lines if "finished" not in line))
    return run


def resume_with(slow: str, seconds: float, run: Path, *overrides: str) -> None:
    """Resume where a function of the chain takes so much longer; ranks are forks of this."""
    place, name = {"restore": (pipeline, "restore"), "k-means": (cluster, "refine_seeds")}[slow]
    honest = getattr(place, name)

    def late(*arguments: Any) -> Any:
        time.sleep(seconds)
        return honest(*arguments)

    setattr(place, name, late)
    resume(run, *overrides)


def test_a_final_round_that_is_dropped_is_not_clustered_meanwhile(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    run = in_k_means(finished, tmp_path / "run")
    in_fork(resume_with, "k-means", 2.0, run, "train.epochs=3")
    pretrain(tiny_recipe(shards, *WORKER, "train.epochs=3"), tmp_path / "straight")
    assert_same_run(run, tmp_path / "straight")


def test_damaged_features_are_made_again_before_the_worker_reads_them(
    finished: Path, tmp_path: Path
) -> None:
    run = in_k_means(finished, tmp_path / "run")
    rows = run / "rounds" / "0001" / "features" / "rows.npy"
    data = rows.read_bytes()
    rows.unlink()
    rows.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    in_fork(resume_with, "restore", 1.0, run)
    assert_same_run(run, finished)


def test_what_another_attempt_has_settled_does_not_count(tmp_path: Path) -> None:
    with hold(tmp_path) as token:
        first = Run(tmp_path, token, attempt=1)
        assert not is_settled(first)
        settle(first)
    assert is_settled(first)
    assert not is_settled(replace(first, attempt=2))
    (tmp_path / "settled.json").write_text("{")  # it is written again before it counts
    assert not is_settled(first)
