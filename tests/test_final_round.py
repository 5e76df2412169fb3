"""The round after the last step: it belongs to the exported weights, and changes nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deepclust import load_backbone, pipeline, pretrain
from deepclust.errors import RequeueWanted
from deepclust.launch.start import resume
from deepclust.recipe import Recipe
from deepclust.run import final_round
from deepclust.run.directory import Run
from deepclust.stages import cluster
from tests.tiny import (
    assert_predicts_its_assignments,
    assert_same_run,
    assignments,
    final_weights,
    tiny_recipe,
)


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Recipe:
    return tiny_recipe(shards, "cluster.final=true")


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    pretrain(recipe, run)
    return run


def test_a_run_ends_with_a_round_of_the_weights_that_it_exports(finished: Path) -> None:
    run = Run(finished)
    assert run.rounds() == [0, 1, 2]
    assert [final_round.step_of(run, number) for number in run.rounds()] == [None, None, 24]
    last = [event["event"] for event in run.events() if event["event"] in ("exported", "clustered")]
    assert last[-2:] == ["exported", "clustered"]
    assert load_backbone(finished / "export" / "backbone.safetensors").dim == 384


def test_the_final_round_changes_no_weights(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    pretrain(recipe.replace("cluster.final=false"), tmp_path / "run")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(finished)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    pairs = zip(assignments(tmp_path / "run"), assignments(finished), strict=False)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert Run(tmp_path / "run").rounds() == [0, 1]


def test_a_run_stopped_in_its_final_round_resumes_it(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cluster.cluster_features

    def stopped(context: cluster.ClusterContext, number: int) -> None:
        if number == 2:
            raise RequeueWanted("stopped")
        honest(context, number)

    monkeypatch.setattr(cluster, "cluster_features", stopped)
    with pytest.raises(RequeueWanted):
        pretrain(recipe, tmp_path / "run")
    monkeypatch.setattr(cluster, "cluster_features", honest)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_damaged_final_round_is_made_again_without_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run = Run(tmp_path / "run")
    kept = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(line for line in kept if "finished" not in line))
    (run.round(2) / "centroids" / "centroids.npy").write_bytes(b"nothing")
    monkeypatch.setattr(pipeline, "train_segment", None)  # it must not be called
    resume(run.path)
    assert_same_run(run.path, finished)


def test_a_longer_run_drops_it_and_makes_another_one(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    once = recipe.replace("train.epochs=1", "cluster.every=2 epochs")
    pretrain(once, tmp_path / "run")
    assert Run(tmp_path / "run").rounds() == [0, 1]
    resume(tmp_path / "run", "train.epochs=2")
    run = Run(tmp_path / "run")
    assert [final_round.step_of(run, number) for number in run.rounds()] == [None, 24]
    pretrain(recipe.replace("cluster.every=2 epochs"), tmp_path / "straight")
    assert_same_run(run.path, tmp_path / "straight")


def test_it_belongs_to_averaged_weights_too(recipe: Recipe, tmp_path: Path, shards: Path) -> None:
    pretrain(recipe.replace("train.average_from=1", "cluster.overlap=false"), tmp_path / "run")
    assert_predicts_its_assignments(tmp_path / "run", shards, tmp_path)


def test_seeds_stay_as_they_were_in_the_last_round_of_training(final_run: Path) -> None:
    run = Run(final_run)
    pinned = [
        (run.round(number) / "centroids" / "prototypes.json").read_text().count('"pinned": true')
        for number in run.rounds()
    ]
    assert pinned == [1, 1, 1]  # release_after=1 would release round 2, which nobody trains on
