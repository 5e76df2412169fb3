"""`cluster.overlap`: k-means of the next round while the ranks train on, one boundary later."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from cluster_jobs.results.evaluate import labelled_features
from deepclust import Recipe, open_index, pretrain
from deepclust.errors import RecipeError, RequeueWanted
from deepclust.launch.start import prepare_run, resume, run_stage
from deepclust.run.directory import Run, is_done
from deepclust.run.round_files import read_whitening
from deepclust.trained.saved import fresh_embedder
from tests.killing import Moment, extracting, kill_when, pause_when, stages_done_twice, start
from tests.tiny import assert_same_run, assignments, deepclust, tiny_recipe

OVERLAP = ("cluster.overlap=true", "train.epochs=4")  # rounds 0 0 1 2; 12 steps an epoch
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def overlapped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "overlapped"
    pretrain(tiny_recipe(shards, *OVERLAP, "keep.features=9", "keep.checkpoints=9"), path)
    return path


def trained_on(run: Path) -> dict[int, int]:
    """The round of every epoch."""
    return {record["segment"]: record["round"] for record in Run(run).metrics("train")}


def features(run: Run, number: int, step: int) -> np.ndarray:
    """What a round's features are if they are made from the weights of a step."""
    embed = fresh_embedder(run.recipe)
    weights = load_file(run.path / "checkpoints" / f"{step:08d}" / "model.safetensors")
    embed.method.load_state_dict(weights)
    rows, _ = labelled_features(embed, open_index(run.recipe.data.shards), run.recipe.data)
    return np.asarray(read_whitening(run.round(number))(rows))


@slow
def test_a_round_is_trained_on_one_boundary_after_its_features_were_made(overlapped: Path) -> None:
    assert trained_on(overlapped) == {0: 0, 1: 0, 2: 1, 3: 2}
    assert not Run(overlapped).round(3).exists()  # nobody would have trained on it
    events = [(e["event"], e.get("round")) for e in Run(overlapped).events()]
    chain = [one for one in events if one[0] in ("features", "training")]
    assert chain[2:] == [
        ("features", 1), ("training", 0), ("features", 2), ("training", 1), ("training", 2)
    ]  # fmt: skip


@slow
def test_the_features_come_from_the_weights_at_the_boundary_before(overlapped: Path) -> None:
    run = Run(overlapped)
    rows = np.load(run.round(2) / "features" / "rows.npy").astype(np.float32)
    assert np.allclose(rows, features(run, 2, step=24), atol=2e-3)
    assert not np.allclose(rows, features(run, 2, step=36), atol=2e-2)


@slow
def test_until_the_first_late_adoption_overlap_changes_nothing(
    shards: Path, overlapped: Path, tmp_path: Path
) -> None:
    pretrain(tiny_recipe(shards), tmp_path / "run")
    plain, ours = assignments(tmp_path / "run"), assignments(overlapped)
    assert np.array_equal(plain[0], ours[0])
    assert np.array_equal(plain[1], ours[1])  # both after an epoch on round 0


@slow
def test_a_pending_round_needs_no_kept_features(
    shards: Path, overlapped: Path, tmp_path: Path
) -> None:
    pretrain(tiny_recipe(shards, *OVERLAP, "keep.features=0"), tmp_path / "run")
    assert_same_run(tmp_path / "run", overlapped)
    assert not list((tmp_path / "run" / "rounds").glob("*/features"))


@slow
def test_two_ranks_go_through_the_same_rounds(
    shards: Path, overlapped: Path, tmp_path: Path
) -> None:
    pretrain(tiny_recipe(shards, *OVERLAP, "train.ranks=2"), tmp_path / "run")
    assert trained_on(tmp_path / "run") == trained_on(overlapped)
    assert np.array_equal(assignments(tmp_path / "run")[0], assignments(overlapped)[0])


@slow
def test_rounds_of_steps_overlap_too(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, *OVERLAP, "cluster.every=14 steps"), tmp_path / "run")
    assert trained_on(tmp_path / "run") == {0: 0, 1: 0, 2: 1, 3: 2}
    assert Run(tmp_path / "run").metrics("train")[-1]["step"] == 48


@slow
@pytest.mark.parametrize("head", ["match", "centroids"])
def test_every_head_policy_resumes_exactly(shards: Path, tmp_path: Path, head: str) -> None:
    recipe = tiny_recipe(shards, *OVERLAP, f"method.head={head}", "train.head_momentum=0.9")
    pretrain(recipe, tmp_path / "straight")
    stop_at(recipe, tmp_path / "stopped", step=27)  # on round 1, with round 2 begun
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def stop_at(recipe: Recipe, run: Path, step: int) -> None:
    """Start a run, and ask it to stop when it tells of a step."""

    def show(record: dict[str, Any]) -> None:
        if record.get("progress") and record.get("step") == step:
            signal.raise_signal(signal.SIGUSR2)

    with pytest.raises(RequeueWanted):
        pretrain(recipe, run, show)


@slow
def test_a_run_made_longer_says_which_round_came_late(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, *OVERLAP[:1], "train.epochs=3"), tmp_path / "run")
    resume(tmp_path / "run", "train.epochs=5")
    assert trained_on(tmp_path / "run") == {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}
    warnings = [e["text"] for e in Run(tmp_path / "run").events() if e["event"] == "warning"]
    assert [text[:7] for text in warnings if "made longer" in text] == ["round 2"]


@pytest.mark.parametrize("stage", ["extract", "cluster", "train"])
def test_a_stage_alone_is_refused_with_the_command_that_works(tmp_path: Path, stage: str) -> None:
    prepare_run(tiny_recipe(tmp_path, *OVERLAP), tmp_path / "run")
    with pytest.raises(RecipeError, match=rf"cluster\.overlap.*deepclust resume {tmp_path}/run"):
        run_stage(tmp_path / "run", stage)


@pytest.fixture(scope="module")
def undisturbed(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        deepclust("pretrain", recipe(many_shards, folder, ranks), "--run", folder / f"run-{ranks}")
    return {ranks: folder / f"run-{ranks}" for ranks in (1, 2)}


def recipe(many_shards: Path, folder: Path, ranks: int) -> Path:
    """20 steps an epoch, a checkpoint every 10: 00000020 is boundary 1, 00000030 between two."""
    settings = (f"train.ranks={ranks}", "train.batch=60", "train.checkpoint=10 steps")
    tiny_recipe(many_shards, *OVERLAP, *settings).save(folder / "recipe.yaml")
    return folder / "recipe.yaml"


def pending(run: Path) -> bool:
    """The features of round 1 are there and the ranks train on, on round 0."""
    folder = Run(run).round(1)
    return is_done(folder / "features") and not is_done(folder / "assignments")


def pending_between_boundaries(run: Path) -> bool:
    """Beyond a checkpoint in the middle of the epoch, and round 1 is still pending."""
    return pending(run) and any(r["step"] >= 33 for r in Run(run).metrics("train"))


def waited_for(run: Path) -> bool:
    """The ranks wait at boundary 2 for round 1."""
    return pending(run) and is_done(run / "checkpoints" / "00000040")


def whitened(run: Path) -> bool:
    """The cluster worker has done its part of round 1's features, and not begun its k-means."""
    return is_done(Run(run).round(1) / "whitening")


@slow
@pytest.mark.parametrize(
    ("moment", "step", "ranks"),
    [
        (extracting, 20, 1), (pending, 20, 2), (pending_between_boundaries, 30, 2),
        (waited_for, 40, 1),
    ],
)  # fmt: skip
def test_a_killed_run_resumes_to_the_same_bits(
    many_shards: Path,
    undisturbed: dict[int, Path],
    tmp_path: Path,
    moment: Moment,
    step: int,
    ranks: int,
) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(many_shards, tmp_path, ranks), "--run", run)
    if step > 20:  # a k-means that takes longer than the kill
        pause_when(process, run, whitened, "cluster worker")
    assert kill_when(process, run, moment, delay=0.0)
    deepclust("resume", run)
    assert [e["step"] for e in Run(run).events() if e["event"] == "restored"] == [step]
    assert_same_run(run, undisturbed[ranks])
    assert stages_done_twice(run) == []
