"""A round's files: several heads, matched ids, rows that are not whitened, progress, old words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepclust import Recipe, open_index
from deepclust.data.read.loader import Loader
from deepclust.files import read_json
from deepclust.recipe.declare import Refresh
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.run.round_files import find_whitening
from deepclust.stages import cluster
from deepclust.stages.extract import ExtractContext, extract
from deepclust.stages.progress import StageProgress
from deepclust.stages.project import project
from deepclust.world import World
from tests.tiny import tiny_recipe


class Recorder:
    """A report that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.signs = 0

    def event(self, name: str, **fields: Any) -> None:
        """Keep the name."""
        self.events.append(name)

    def progress(self, **fields: Any) -> None:
        """Keep the record."""
        self.records.append(fields)

    def alive(self) -> None:
        """Count it."""
        self.signs += 1


def embed(images: torch.Tensor) -> torch.Tensor:
    """Features that need no network: every fourth pixel of a channel."""
    return images[:, 0, ::4, ::4].flatten(1).float() / 255


def make_round(run_dir: Path, shards: Path, number: int, refresh: Refresh) -> Recorder:
    """Extract, whiten if asked, project and cluster a round in this process."""
    report, recipe, world = Recorder(), tiny_recipe(shards), World()
    index = open_index(shards)
    with hold(run_dir) as token:
        run = Run(run_dir, token)
        context = cluster.make_context(run, recipe, index, world.device, report, world)
        context = replace(context, refresh=refresh)
        loader = Loader(index, 0)
        extraction = ExtractContext(
            run, number, world, index, loader, recipe.data, report, lambda: False
        )
        extract(extraction, embed)
        cluster.advance(context, number)
        project(extraction, find_whitening(run.round(number)))
        cluster.advance(context, number)
        loader.close()
    return report


@pytest.fixture(scope="module")
def three_heads(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = tmp_path_factory.mktemp("heads")
    for number in (0, 1):
        make_round(run_dir, shards, number, Refresh(heads=3, keeps_ids=True))
    return Run(run_dir)


def test_a_round_writes_and_reads_all_its_heads(three_heads: Run) -> None:
    targets = cluster.read_targets(three_heads, 1)
    assert targets.assignments.shape == (3, 300)
    assert targets.assignments.dtype == np.int32
    assert targets.centroids.shape == (3, 8, 8)
    distances = np.load(three_heads.round(1) / "assignments" / "distances.npy")
    rows = np.load(three_heads.round(1) / "features" / "rows.npy").astype(np.float64)
    for own, centroids, squared in zip(
        targets.assignments, targets.centroids, distances, strict=True
    ):
        assert np.bincount(own, minlength=8).min() > 0
        np.testing.assert_allclose(((rows - centroids[own]) ** 2).sum(1), squared, atol=1e-5)


def test_statistics_have_head_0_on_top_and_all_heads_below(three_heads: Run) -> None:
    facts = read_json(three_heads.round(1) / "assignments" / "statistics.json")
    assert len(facts["heads"]) == 3
    assert {key: facts[key] for key in facts["heads"][0]} == facts["heads"][0]
    assert len({head["inertia"] for head in facts["heads"]}) == 3


def test_ids_are_matched_head_by_head(three_heads: Run) -> None:
    before, now = (cluster.read_targets(three_heads, number) for number in (0, 1))
    assert before.kept is None
    assert now.kept is not None
    assert now.kept.shape == (3, 8)
    for old, new in zip(before.assignments, now.assignments, strict=True):
        table = np.zeros((8, 8), int)
        np.add.at(table, (old, new), 1)
        assert np.trace(table) == max(
            np.trace(table[:, np.roll(np.arange(8), shift)]) for shift in range(8)
        )


def test_one_head_is_head_0_of_several(three_heads: Run, shards: Path, tmp_path: Path) -> None:
    make_round(tmp_path, shards, 0, Refresh())
    one, three = (cluster.read_targets(run, 0) for run in (Run(tmp_path), three_heads))
    np.testing.assert_array_equal(one.assignments[0], three.assignments[0])
    assert "heads" not in read_json(tmp_path / "rounds/0000/assignments/statistics.json")


def test_rows_that_are_not_whitened_are_raw_unit_rows(shards: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    make_round(tmp_path, shards, 0, Refresh(whiten=False, spherical=True))
    rows = np.load(run.round(0) / "features" / "rows.npy").astype(np.float32)
    assert rows.shape == (300, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=2e-3)
    assert rows.min() > -1e-3  # pixels, not centred
    targets = cluster.read_targets(run, 0)
    assert targets.whitening is None
    assert not (run.round(0) / "whitening").exists()
    np.testing.assert_allclose(np.linalg.norm(targets.centroids[0], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal((rows @ targets.centroids[0].T).argmax(1), targets.assignments[0])


def test_every_long_stage_shows_its_progress(shards: Path, tmp_path: Path) -> None:
    report = make_round(tmp_path, shards, 0, Refresh())
    last = {record["stage"]: record for record in report.records}
    assert list(last) == ["extract", "whiten", "project", "cluster"]
    for record in last.values():
        assert record["done"] == record["of"]
        assert record["eta"] == 0
        assert record["round"] == 0
    assert last["cluster"]["inertia"] > 0
    assert last["cluster"]["moved"] >= 0
    assert report.signs > 20


def test_progress_is_reported_once_a_second_and_by_rank_0_alone() -> None:
    report = Recorder()
    for world in (World(), World(rank=1, size=2)):
        progress = StageProgress(report, world, "extract", 3)
        for done in range(1, 11):
            progress.show(done, 10)
    assert [record["done"] for record in report.records] == [1, 10]
    assert report.signs == 20


def test_gang_is_read_as_ranks(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "cluster.where=ranks")
    old = tmp_path / "old.yaml"
    old.write_text(recipe.dump().replace("where: ranks", "where: gang"))
    assert "where: gang" in old.read_text()
    assert Recipe.load(old).flat() == recipe.flat()
    assert recipe.clusters_inline


@pytest.mark.parametrize(("device", "given_back"), [("cuda:1", 1), ("cpu", 0)])
def test_the_memory_of_a_round_is_given_back_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, given_back: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    for name in ("make_task", "refine_seeds", "replace", "publish", "_seed_notes"):
        monkeypatch.setattr(cluster, name, lambda *given, **more: None)
    monkeypatch.setattr(cluster, "cluster_round", lambda task: ([None], 0.0))
    monkeypatch.setattr(cluster.ClusterContext, "warn", lambda *given: None)
    monkeypatch.setattr(cluster, "make_task", lambda *given: SimpleNamespace(rows=None))
    refresh = SimpleNamespace(kind="k-means")
    context = cluster.ClusterContext(
        Run(tmp_path),
        None,
        refresh,
        0,
        None,
        None,
        torch.device(device),
        Recorder(),  # type: ignore[arg-type]
    )
    cluster.cluster_features(context, 0)
    assert len(calls) == given_back


@pytest.mark.parametrize(
    ("k", "n", "words"),
    [
        (100, 1000, None),
        (101, 1000, "9.9 a cluster.*cluster.k=100 or less gives 10"),
        (3, 19, "More images would do"),
    ],
)
def test_a_k_that_is_large_for_the_images_is_warned_of_with_one_that_would_do(
    k: int, n: int, words: str | None
) -> None:
    notes = cluster.note_of_k(k, n)
    assert not notes if words is None else re.search(words, notes[0])
