"""Seeds and two levels in real runs: artifacts, any number of ranks, kills, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster_jobs.results.evaluate import evaluate_run
from deepclust import Recipe, open_index, pretrain
from deepclust.errors import NumericalError, RecipeError, RunDiffersError
from deepclust.files import read_json
from deepclust.launch.start import resume
from deepclust.methods.base import Targets
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run, manifest
from deepclust.seeds.table import SeedTable, load
from deepclust.stages.batches import Feed
from deepclust.stages.cluster import read_targets
from deepclust.stages.schedule import Timeline
from deepclust.world import ALONE
from tests.images import draw, encode, write_tar
from tests.killing import MOMENTS, kill_when, stages_done_twice, start
from tests.tiny import assert_same_run, assignments, deepclust, tiny_recipe, tiny_shards

pytestmark = pytest.mark.slow

SEEDS = ("seeds.labels=shards", "seeds.per_class=5")
RICH = (*SEEDS, "seeds.prototypes=2", "seeds.momentum=0.5", "seeds.force=true", "cluster.k=14")
REFINED = "seeds.refine=3"
DEEPER = ("method={name: deepercluster}", "cluster.k=18", "cluster.supers=6")


def recipe(shards: Path, *overrides: str) -> Recipe:
    return tiny_recipe(shards, *overrides)


def read(run: Path, number: int, name: str) -> Any:
    file = Run(run).round(number) / name
    return read_json(file) if file.suffix == ".json" else np.load(file)


def warnings(run: Path) -> str:
    return "\n".join(e["text"] for e in Run(run).events() if e["event"] == "warning")


@pytest.fixture(scope="module")
def seeded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "seeded"
    pretrain(recipe(shards, *SEEDS), path)
    return path


def test_pinned_centroids_are_the_prototypes_to_the_bit(seeded: Path) -> None:
    for number in (0, 1):
        pins = read(seeded, number, "centroids/prototypes.npy")
        saved = read(seeded, number, "centroids/centroids.npy")[0]
        assert saved[:4].tobytes() == pins.tobytes()
        np.testing.assert_allclose(np.linalg.norm(saved, axis=1), 1, atol=1e-5)


def test_prototypes_are_means_of_the_labelled_rows(seeded: Path) -> None:
    facts = read(seeded, 1, "centroids/prototypes.json")
    assert facts["pinned"]
    assert [c["class"] for c in facts["clusters"]] == [f"class {i}" for i in range(4)]
    assert [c["labelled"] for c in facts["clusters"]] == [5] * 4
    assert [c["cluster"] for c in facts["clusters"]] == [c["class_id"] for c in facts["clusters"]]


def test_the_report_of_the_seeds_agrees_with_the_labels(seeded: Path) -> None:
    facts = read(seeded, 1, "assignments/seeds.json")
    labels = assignments(seeded)[1][0]
    sizes = np.bincount(labels, minlength=8)
    assert [c["size"] for c in facts["clusters"]] == sizes[:4].tolist()
    assert facts["share"] == pytest.approx(sizes[:4].sum() / 300)
    assert facts["held_out"] == 280
    assert np.sum(facts["confusion"]) == 280
    assert facts["accuracy"] > 0.8
    assert facts["purity"] > 0.8
    statistics = read(seeded, 1, "assignments/statistics.json")
    for name in ("share", "purity", "recall", "accuracy"):
        assert statistics[f"seeded_{name}"] == facts[name]
    assert sizes.min() > 0


def test_stages_say_which_labels_made_them(seeded: Path, shards: Path, tmp_path: Path) -> None:
    inputs = manifest(Run(seeded).round(1) / "assignments")["inputs"]
    pretrain(recipe(shards, *SEEDS, "seed=1", "train.epochs=1"), tmp_path / "other")
    other = manifest(Run(tmp_path / "other").round(0) / "centroids")["inputs"]
    assert inputs["seeds"] != other["seeds"]


@pytest.mark.parametrize(
    "options", [(*RICH, REFINED), (*DEEPER, *SEEDS, "seeds.force=true", REFINED)]
)
def test_every_place_and_number_of_ranks_clusters_alike(
    shards: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    pretrain(recipe(shards, *options, "train.epochs=1"), tmp_path / "alone")
    two = recipe(shards, *options, "train.ranks=2")
    for where in ("worker", "ranks"):
        pretrain(two.replace(f"cluster.where={where}"), tmp_path / where)
    assert_same_run(tmp_path / "ranks", tmp_path / "worker")
    one, both = assignments(tmp_path / "alone"), assignments(tmp_path / "ranks")
    np.testing.assert_array_equal(one[0], both[0])
    for name in ("centroids/prototypes.npy", "centroids/centroids.npy", "assignments/forced.npy"):
        alone, ranks = (read(tmp_path / run, 0, name) for run in ("alone", "ranks"))
        assert alone.tobytes() == ranks.tobytes(), name


def test_a_run_killed_between_centroids_and_assignments_resumes_to_the_same_bits(
    many_shards: Path, tmp_path: Path
) -> None:
    recipe(many_shards, *RICH, "train.batch=60").save(tmp_path / "recipe.yaml")
    deepclust("pretrain", tmp_path / "recipe.yaml", "--run", tmp_path / "whole")
    process = start("pretrain", tmp_path / "recipe.yaml", "--run", tmp_path / "killed")
    kill_when(process, tmp_path / "killed", MOMENTS["between centroids and assignments"], 0.0)
    assert process.returncode == -signal.SIGKILL
    deepclust("resume", tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert stages_done_twice(tmp_path / "killed") == []
    for name in ("centroids/prototypes.npy", "assignments/seeds.json"):
        killed, whole = (read(tmp_path / run, 1, name) for run in ("killed", "whole"))
        assert np.array_equal(killed, whole), name


def test_other_labels_are_refused_by_a_run_that_has_begun(shards: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("key,class\n0000000,a\n0000001,b\n")
    pretrain(recipe(shards, f"seeds.labels={table}", "train.epochs=1"), tmp_path / "run")
    assert "are not used for evaluation" in warnings(tmp_path / "run")
    table.write_text("key,class\n0000000,a\n0000002,b\n")
    with pytest.raises(RunDiffersError, match=r"labels of .*labels\.csv are not those"):
        resume(tmp_path / "run", "train.epochs=2")


def test_more_prototypes_than_clusters_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"4 classes .*prototypes=3 need cluster.k of at least 12"
    ):
        pretrain(recipe(shards, *SEEDS, "seeds.prototypes=3"), tmp_path / "flat")
    deeper = (*DEEPER, "cluster.supers=3", *SEEDS)
    with pytest.raises(RecipeError, match=r"need cluster.supers of at least 4"):
        pretrain(recipe(shards, *deeper), tmp_path / "deeper")


def test_a_labelled_image_that_cannot_be_read_is_left_out_and_reported(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "shards")
    broken = encode(draw(0, 16, 16))[:90]
    write_tar(folder / "shard-000003.tar", [("x.cls", b"0"), ("x.png", broken)])
    table = tmp_path / "labels.parquet"
    keys, classes = ["0000000", "0000004", "0000001", "x"], ["a", "a", "b", "a"]
    pq.write_table(pa.table({"key": keys, "class": classes}), table)
    pretrain(recipe(folder, f"seeds.labels={table}", "train.epochs=1"), tmp_path / "run")
    assert "1 of 4 labelled samples are excluded" in warnings(tmp_path / "run")
    clusters = read(tmp_path / "run", 0, "centroids/prototypes.json")["clusters"]
    assert [(c["class"], c["labelled"]) for c in clusters] == [("a", 2), ("b", 1)]
    rows = read(tmp_path / "run", 0, "features/rows.npy").astype(np.float64)[[0, 4]]
    mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
    pins = read(tmp_path / "run", 0, "centroids/prototypes.npy")
    np.testing.assert_allclose(pins[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_bad_labels_stop_all_ranks_with_their_own_error(shards: Path, tmp_path: Path) -> None:
    together = ("train.ranks=2", "train.epochs=1", *SEEDS, "seeds.prototypes=3")
    with pytest.raises(RecipeError, match=r"seeds\.prototypes=3"):
        pretrain(recipe(shards, *together), tmp_path / "worker")


def test_seeds_may_be_clustered_while_training_goes_on(shards: Path, tmp_path: Path) -> None:
    options = (*SEEDS, "seeds.momentum=0.9", "cluster.overlap=true", "train.epochs=3")
    for name in ("one", "other"):
        pretrain(recipe(shards, *options), tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "other")
    assert read(tmp_path / "one", 1, "assignments/seeds.json")["purity"] > 0.5


def test_released_prototypes_are_a_start_and_move(shards: Path, tmp_path: Path) -> None:
    pretrain(recipe(shards, *SEEDS, "seeds.release_after=0"), tmp_path / "run")
    for number, pinned in ((0, True), (1, False)):
        pins = read(tmp_path / "run", number, "centroids/prototypes.npy")
        saved = read(tmp_path / "run", number, "centroids/centroids.npy")[0, :4]
        assert np.array_equal(pins, saved) == pinned
        assert read(tmp_path / "run", number, "centroids/prototypes.json")["pinned"] == pinned
        assert read(tmp_path / "run", number, "assignments/seeds.json")["purity"] > 0.7


def test_forced_samples_are_in_their_classs_cluster_and_listed(
    shards: Path, tmp_path: Path
) -> None:
    few = (*RICH, "seeds.per_class=30")
    for name, force in (("force", "true"), ("free", "false")):
        pretrain(recipe(shards, *few, f"seeds.force={force}", "train.epochs=1"), tmp_path / name)
    forced, free = (assignments(tmp_path / name)[0][0] for name in ("force", "free"))
    listed = read(tmp_path / "force", 0, "assignments/forced.npy")
    np.testing.assert_array_equal(listed, np.flatnonzero(forced != free))
    assert len(listed)
    class_of = [
        c["class_id"] for c in read(tmp_path / "force", 0, "centroids/prototypes.json")["clusters"]
    ]
    np.testing.assert_array_equal(np.array(class_of)[forced[listed]], listed % 4)
    rows = read(tmp_path / "force", 0, "features/rows.npy").astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = read(tmp_path / "force", 0, "centroids/centroids.npy")[0]
    distances = read(tmp_path / "force", 0, "assignments/distances.npy")[0]
    np.testing.assert_allclose(distances, ((rows - centroids[forced]) ** 2).sum(1), atol=1e-5)
    statistics = read(tmp_path / "force", 0, "assignments/statistics.json")
    assert statistics["seeds_forced"] == len(listed)
    assert statistics["inertia"] == pytest.approx(distances.mean(), rel=1e-5)


def test_every_batch_has_its_share_of_labelled_samples_in_their_classs_cluster(
    shards: Path, tmp_path: Path
) -> None:
    few = (*SEEDS, "seeds.share=0.25", "train.epochs=1")
    run = pretrain(recipe(shards, *few), tmp_path / "run")
    labelled = read(run.path, 0, "assignments/labelled.npy")
    assert len(labelled) == 20
    np.testing.assert_array_equal(assignments(run.path)[0][0][labelled], labelled % 4)
    targets, index = read_targets(run, 0), open_index(shards)
    table = load(index, run.recipe.seeds, run.recipe.seed).table
    feed = Feed(run.recipe, index, "offset", ALONE, table)
    plan = feed.plan(Timeline.of(run.recipe, len(index)), State(round=0), targets)
    batches = plan.ids.reshape(plan.steps, 24)
    assert plan.steps == 12
    assert (np.isin(batches, labelled).sum(1) >= 6).all()


def test_evaluation_judges_the_prototypes_of_the_runs_own_shards_only(
    seeded: Path, shards: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    names = ["prototypes", "knn"]
    own = evaluate_run(seeded, str(shards), str(shards), names, emit=messages.append)
    assert own["prototypes"]["top1"] > 0.5
    assert messages == []
    others = str(tiny_shards(tmp_path / "others", n=120))
    foreign = evaluate_run(seeded, others, str(shards), names, emit=messages.append)
    assert "prototypes" not in foreign
    assert foreign["knn"]
    assert "are not the shards" in messages[0]


def test_a_small_share_is_one_labelled_sample_a_batch(shards: Path) -> None:
    index = open_index(shards)
    wanted = recipe(shards, *SEEDS, "seeds.share=0.001")
    ids = np.zeros((1, len(index)), np.int32)
    none = np.zeros((1, 8, 8), np.float32)
    targets = Targets(0, Path("a.npy"), ids, none, None, None)
    table = SeedTable(np.arange(4), np.zeros(4, np.int32), ["a"])
    feed = Feed(wanted, index, "offset", ALONE, table)
    plan = feed.plan(Timeline.of(wanted, len(index)), State(round=0), targets)
    assert (np.isin(plan.ids.reshape(plan.steps, 24), np.arange(4)).sum(1) >= 1).all()


def test_pinning_may_begin_in_a_later_round(shards: Path, tmp_path: Path) -> None:
    run = pretrain(recipe(shards, *SEEDS, "seeds.pin_from=1"), tmp_path / "run")
    assert not (run.round(0) / "centroids" / "prototypes.npy").exists()
    pins = read(run.path, 1, "centroids/prototypes.npy")
    assert np.array_equal(read(run.path, 1, "centroids/centroids.npy")[0, :4], pins)


def test_pinned_clusters_keep_ids_and_head_rows_when_the_others_are_matched(
    shards: Path, tmp_path: Path
) -> None:
    options = (*SEEDS, "method.head=match", "train.lr=1e-6")
    pretrain(recipe(shards, *options), tmp_path / "run")
    first, second = (labels[0] for labels in assignments(tmp_path / "run"))
    assert (first == second).mean() > 0.5
    assert read(tmp_path / "run", 1, "assignments/kept.npy")[0, :4].all()
    pins = read(tmp_path / "run", 1, "centroids/prototypes.npy")
    assert np.array_equal(read(tmp_path / "run", 1, "centroids/centroids.npy")[0, :4], pins)


def test_two_levels_leave_super_clusters_and_their_sizes(shards: Path, tmp_path: Path) -> None:
    pretrain(recipe(shards, *DEEPER), tmp_path / "run")
    labels = assignments(tmp_path / "run")[1][0]
    statistics = read(tmp_path / "run", 1, "assignments/statistics.json")
    assert statistics["super_sizes"] == np.bincount(labels // 3, minlength=6).tolist()
    assert len(statistics["level_seconds"]) == 2
    assert read(tmp_path / "run", 1, "centroids/super_centroids.npy").shape == (6, 8)
    assert np.bincount(labels, minlength=18).min() > 0


def test_one_cluster_is_rotnet_and_not_a_collapse(shards: Path, tmp_path: Path) -> None:
    alone = ("method={name: deepercluster}", "cluster.k=1", "train.epochs=1")
    pretrain(recipe(shards, *alone), tmp_path / "run")
    assert not assignments(tmp_path / "run")[0].any()
    with pytest.raises(NumericalError, match="collapsed"):
        pretrain(recipe(shards, "cluster.max_share=0.01"), tmp_path / "collapsed")


def test_a_pinned_cluster_without_samples_is_reported(shards: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    every = [f"{i:07d},one" for i in range(0, 299, 2)] + ["0000001,two"]
    table.write_text("\n".join(["key,class", *every]))
    pretrain(
        recipe(shards, f"seeds.labels={table}", "cluster.k=120", "train.epochs=1"), tmp_path / "r"
    )
    empty = np.bincount(assignments(tmp_path / "r")[0][0], minlength=120) == 0
    is_reported = "pinned clusters won no sample" in warnings(tmp_path / "r")
    assert empty[:2].any() == is_reported
    assert not empty[2:].any()
    assert read(tmp_path / "r", 0, "assignments/statistics.json")["empty"] == empty.sum()
