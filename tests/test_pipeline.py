"""The whole chain on drawn images: real shards, real FAISS-tested k-means, real training."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust import EpochPlan, load_backbone, pretrain
from deepclust.errors import DataError, RecipeError, RequeueWanted, RunDiffersError
from deepclust.launch.start import resume, run_stage
from deepclust.run.directory import Run, is_done
from tests.forks import in_fork
from tests.images import draw
from tests.tiny import (
    assert_resumes_undisturbed,
    assert_same_run,
    assignments,
    final_weights,
    run_disturbed,
    stop_at,
    tiny_recipe,
    tiny_shards,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "undisturbed"
    pretrain(tiny_recipe(shards), path)
    return path


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in Run(run).events() if event["event"] == name]


def test_a_run_leaves_rounds_checkpoints_and_weights(undisturbed: Path) -> None:
    run = Run(undisturbed)
    assert run.rounds() == [0, 1]
    for number in run.rounds():
        sizes = np.bincount(assignments(undisturbed)[number][0], minlength=8)
        assert sizes.min() > 0
        assert sizes.sum() == 300
    assert [folder.name for folder in run.checkpoints()] == ["00000000", "00000012", "00000024"]
    assert not (run.round(0) / "features").exists()  # keep.features: 1
    assert is_done(run.round(1) / "features")
    backbone = load_backbone(undisturbed / "export" / "backbone.safetensors")
    assert backbone(draw(0, 16, 16)[None].float()).shape == (1, backbone.dim)


def test_the_features_are_unit_rows_in_half_precision(undisturbed: Path) -> None:
    rows = np.load(Run(undisturbed).round(1) / "features" / "rows.npy")
    assert rows.dtype == np.float16
    assert rows.shape == (300, 8)
    assert np.allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=2e-3)


@pytest.mark.parametrize("settings", [["data.workers=2"], ["data.crop_on=device"]])
def test_the_same_recipe_gives_the_same_run_whoever_reads_and_crops(
    shards: Path, undisturbed: Path, tmp_path: Path, settings: list[str]
) -> None:
    pretrain(tiny_recipe(shards, *settings), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_reading_by_block_of_shards_resumes_exactly_too(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "data.read=block", "data.workers=1")
    assert_resumes_undisturbed(recipe, tmp_path, 15)


def test_a_single_rank_may_have_a_cluster_worker_of_its_own(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    pretrain(tiny_recipe(shards, "cluster.where=worker"), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_stopped_in_mid_epoch_and_resumed_is_undisturbed(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequeueWanted, match=r"step 1[68]"):
        pretrain(tiny_recipe(shards), tmp_path / "run", stop_at(15))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
    assert len(events(tmp_path / "run", "clustered")) == 2


def test_stage_by_stage_is_undisturbed(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(RequeueWanted):
        pretrain(tiny_recipe(shards), tmp_path / "run", stop_at(3))
    for stage in ("train", "extract", "cluster"):
        run_stage(tmp_path / "run", stage)
    run = Run(tmp_path / "run")
    assert run.rounds() == [0, 1]
    assert run.metrics("train")[-1]["step"] == 12
    resume(run.path)
    assert_same_run(run.path, undisturbed)


def test_two_ranks_cluster_and_batch_as_one_does(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    pretrain(tiny_recipe(shards, "train.ranks=2", "train.accumulate=2"), tmp_path / "run")
    one, two = assignments(undisturbed), assignments(tmp_path / "run")
    assert np.array_equal(one[0], two[0])
    plan = EpochPlan.build(one[0], seed=0, epoch=0, global_batch=24)
    halves = [plan.for_rank(rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves, axis=1).ravel(), plan.ids)
    assert Run(tmp_path / "run").metrics("train")[-1]["step"] == 24


def compiled_and_disturbed(recipe: str, folder: Path, step: int) -> None:
    """Both runs with every graph that torch traces, but without machine code, which takes long.

    Ranks are forks of this process. Each that traces a graph leaves a file.
    """

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        (folder / f"traced-{os.getpid()}").touch()
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compile = functools.partial(torch.compile, backend=backend)
    run_disturbed(recipe, folder, step)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_run_is_stopped_resumed_and_exported(
    shards: Path, tmp_path: Path, ranks: int
) -> None:
    compiled = ("train.compile=true", "train.accumulate=2", "train.epochs=1")
    recipe = tiny_recipe(shards, *compiled, f"train.ranks={ranks}")
    in_fork(compiled_and_disturbed, recipe.dump(), tmp_path, 5)
    assert len(list(tmp_path.glob("traced-*"))) >= ranks
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    backbone = load_backbone(tmp_path / "stopped" / "export" / "backbone.safetensors")
    assert backbone(draw(0, 16, 16)[None].float()).shape == (1, backbone.dim)


def test_three_ranks_stopped_and_resumed_are_undisturbed(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "train.ranks=3", "cluster.where=ranks")
    assert_resumes_undisturbed(recipe, tmp_path, 6)


def test_ranks_that_cluster_together_give_the_workers_run(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "train.ranks=2")
    for where in ("worker", "ranks"):
        pretrain(recipe.replace(f"cluster.where={where}"), tmp_path / where)
    assert_same_run(tmp_path / "ranks", tmp_path / "worker")


def test_k_means_may_start_in_two_levels(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, "cluster.init=two-level", "train.epochs=1"), tmp_path / "run")
    assert np.bincount(assignments(tmp_path / "run")[0][0], minlength=8).min() > 0


@pytest.mark.parametrize("head", ["match", "centroids"])
def test_other_head_policies_resume_exactly_too(shards: Path, tmp_path: Path, head: str) -> None:
    recipe = tiny_recipe(shards, f"method.head={head}", "train.head_momentum=0.9")
    assert_resumes_undisturbed(recipe, tmp_path, 15)


def test_rounds_can_be_counted_in_steps(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, "cluster.every=7 steps", "train.epochs=1"), tmp_path / "run")
    assert Run(tmp_path / "run").rounds() == [0, 1]
    assert Run(tmp_path / "run").metrics("train")[-1]["step"] == 12


def test_matched_clusters_keep_their_head_rows(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, "method.head=match", "train.lr=1e-6")
    pretrain(recipe, tmp_path / "run")
    first, second = (labels[0] for labels in assignments(tmp_path / "run"))
    assert (first == second).mean() > 0.5  # ids continue, though k-means starts from new centroids
    assert np.load(Run(tmp_path / "run").round(1) / "assignments" / "kept.npy").any()


def test_a_finished_run_stays_as_it_is(undisturbed: Path) -> None:
    before = (undisturbed / "events.jsonl").read_text()
    resume(undisturbed)
    assert (undisturbed / "events.jsonl").read_text() == before


def test_pretrain_on_a_run_prints_the_resume_command(shards: Path, undisturbed: Path) -> None:
    with pytest.raises(RecipeError, match=f"deepclust resume {undisturbed}"):
        pretrain(tiny_recipe(shards), undisturbed)


def test_resume_refuses_another_recipe_and_names_the_key(undisturbed: Path) -> None:
    with pytest.raises(RunDiffersError, match=r"cluster\.k: 8 -> 9"):
        resume(undisturbed, "cluster.k=9")


def test_a_finished_run_can_be_made_longer(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, "train.epochs=1"), tmp_path / "run")
    resume(tmp_path / "run", "train.epochs=2")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_new_run_starts_from_another_ones_weights(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for name, source in {
        "run": undisturbed,
        "checkpoint": Run(undisturbed).checkpoints()[-1],
        "export": undisturbed / "export" / "backbone.safetensors",
    }.items():
        recipe = tiny_recipe(shards, f"init.weights={source}", "train.epochs=1", "train.lr=1e-9")
        pretrain(recipe, tmp_path / name)
        weights, theirs = final_weights(tmp_path / name), final_weights(undisturbed)
        name = next(n for n in weights if n.startswith("model/backbone") and n.endswith("weight"))
        assert np.allclose(weights[name], theirs[name], atol=1e-6)


def test_a_new_run_starts_from_assignments_and_joins_them_by_key(
    undisturbed: Path, tmp_path: Path
) -> None:
    fewer = tiny_shards(tmp_path / "shards", n=300)
    (fewer / "shard-000002.tar").unlink()
    source = Run(undisturbed).round(1)
    recipe = tiny_recipe(fewer, f"init.assignments={source}", "train.epochs=1")
    pretrain(recipe, tmp_path / "run")
    assert np.array_equal(assignments(tmp_path / "run")[0][0], assignments(undisturbed)[1][0][:200])


def test_fewer_images_than_a_batch_is_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than one batch"):
        pretrain(tiny_recipe(shards, "train.batch=301"), tmp_path / "run")


def test_training_learns_the_pseudo_labels(undisturbed: Path) -> None:
    records = [r for r in Run(undisturbed).metrics("train") if r["round"] == 1]
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(0 <= record["waiting"] <= 1 for record in records)


def test_dropout_and_views_depend_on_the_step_alone(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)  # the caller's random state plays no part, and is not ours to keep
    pretrain(tiny_recipe(shards, "train.epochs=1"), tmp_path / "a")
    torch.manual_seed(2)
    pretrain(tiny_recipe(shards, "train.epochs=1"), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
