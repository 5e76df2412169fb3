"""kNN during training: it changes no bit, ranks and resumes score alike, and the best stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from cluster_jobs.report import write_report
from cluster_jobs.results.baselines import Beside
from cluster_jobs.results.evaluate import evaluate_run
from cluster_jobs.results.export import export_run
from cluster_jobs.results.predict import predict
from cluster_jobs.status import status
from deepclust import Recipe, open_index, pretrain
from deepclust.errors import DataError, RecipeError
from deepclust.launch.start import resume
from deepclust.run.best import find_best, keep_best, load_best
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.run.reporting import Metrics
from deepclust.seeds.table import load as load_seeds
from deepclust.stages import during
from deepclust.stages.during import open_watched
from deepclust.stages.schedule import Timeline
from deepclust.world import ALONE
from tests.forks import in_fork
from tests.images import make_shards
from tests.tiny import assert_same_run, run_disturbed, tiny_recipe, tiny_shards

EVERY = "train.evaluate=5 steps"
STEPS = {5, 10, 12}  # the last step is one too


def scores(run: Path) -> dict[int, tuple[float, int]]:
    """Return score and best step of every evaluation of a run, by step."""
    return {r["step"]: (r["top1"], r["best"]) for r in Run(run).metrics("evaluate")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("during") / "shards", n=150)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return labelled images of many classes, so that scores go up and down."""
    folder = tmp_path_factory.mktemp("during") / "hard"
    return make_shards(folder, n=150, shards=2, classes=50, size=16)


def pretrain_text(text: str, folder: Path) -> None:
    pretrain(Recipe.parse(yaml.safe_load(text)), folder)


def train_in(folder: Path, recipe: Recipe) -> None:
    in_fork(pretrain_text, recipe.dump(), folder)


def run_both(text: str, folder: Path) -> None:
    plain = Recipe.parse(yaml.safe_load(text))
    pretrain(plain, folder / "plain")
    pretrain(plain.replace(EVERY), folder / "watched")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["deepcluster", "simclr"])
def test_evaluations_change_no_bit_of_a_run(
    shards: Path, tmp_path: Path, ranks: int, method: str
) -> None:
    changes = [f"train.ranks={ranks}", f"method.name={method}"]
    recipe = tiny_recipe(shards, *changes, *(["cluster=null"] if method == "simclr" else []))
    in_fork(run_both, recipe.dump(), tmp_path)
    assert_same_run(tmp_path / "plain", tmp_path / "watched")
    assert scores(tmp_path / "watched").keys() == STEPS


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_and_resumed_run_has_the_same_scores_and_the_same_best(
    hard: Path, tmp_path: Path, ranks: int
) -> None:
    recipe = tiny_recipe(hard, "train.evaluate=2 steps", f"train.ranks={ranks}")
    in_fork(run_disturbed, recipe.dump(), tmp_path, 7)
    one, other = tmp_path / "straight", tmp_path / "stopped"
    assert scores(one) == scores(other)
    assert len({top1 for top1, _ in scores(one).values()}) > 1
    best, same = find_best(Run(one)), find_best(Run(other))
    assert best is not None
    assert same is not None
    assert (best.step, best.top1, best.data) == (same.step, same.top1, same.data)
    weights, others = (load_file(b.folder / "model.safetensors") for b in (best, same))
    assert all(np.array_equal(weights[name], others[name]) for name in weights)


def cut_short(text: str, folder: Path) -> None:
    """Run twice: straight on, and killed before the record of a step that has its checkpoint."""
    recipe, honest = Recipe.parse(yaml.safe_load(text)), Metrics.record
    pretrain(recipe, folder / "straight")

    def failing(self: Metrics, kind: str, step: int, **values: Any) -> None:
        if kind == "evaluate" and step == 10:
            raise KeyboardInterrupt
        honest(self, kind, step, **values)

    Metrics.record = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, folder / "cut")
    Metrics.record = honest  # type: ignore[method-assign]
    resume(folder / "cut")


def test_an_evaluation_that_a_kill_cut_short_is_made_again(hard: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(hard, EVERY, "train.checkpoint=5 steps")
    in_fork(cut_short, recipe.dump(), tmp_path)
    assert scores(tmp_path / "cut") == scores(tmp_path / "straight")
    assert scores(tmp_path / "cut").keys() == STEPS


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_score_is_that_of_evaluate_and_the_best_can_be_used(
    hard: Path, tmp_path: Path, ranks: int
) -> None:
    other = make_shards(tmp_path / "other", n=60, shards=1, classes=50, size=16)
    recipe = tiny_recipe(
        hard, "train.evaluate=3 steps", f"train.evaluate_data={other}", "keep.checkpoints=1",
        "train.epochs=1", f"train.ranks={ranks}", "cluster.every=3 steps",
    )  # fmt: skip
    run = tmp_path / "run"
    train_in(run, recipe)
    told: list[str] = []
    asked = (str(hard), str(other), ["knn"], told.append)
    last = evaluate_run(run, *asked, beside=Beside(baselines=False))
    assert scores(run)[6][0] == last["knn"]["top1"]
    best = find_best(Run(run))
    assert best is not None
    assert best.top1 == max(top1 for top1, _ in scores(run).values())
    then = evaluate_run(run, *asked, beside=Beside(baselines=False), best=True)
    assert then["knn"]["top1"] == best.top1
    assert any(f"step {best.step}, the best by kNN" in text for text in told)
    now = status(Run(run))
    assert (now.knn, now.best_knn, now.best_step) == (scores(run)[6][0], best.top1, best.step)
    page = write_report(run, tmp_path / "report.html").read_text()
    assert f"The checkpoint of step {best.step} is kept in best/" in page
    file = export_run(run, tmp_path / "best.safetensors", best=True).path
    kept = load_file(best.folder / "model.safetensors")
    exported = load_file(file)
    assert exported
    assert all(
        any(value.shape == one.shape and np.array_equal(value, one) for one in kept.values())
        for value in exported.values()
    )


def test_predict_by_the_best_weights_uses_the_round_that_they_made(
    hard: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(hard, EVERY, "cluster.every=5 steps", "cluster.final=true")
    train_in(tmp_path / "run", recipe)
    run = Run(tmp_path / "run")
    rounds = {0: 0, 5: 1, 10: 2, 12: 3}
    best = find_best(run)
    assert best is not None
    told: list[str] = []
    counts = predict(run.path, str(hard), tmp_path / "table.parquet", emit=told.append, best=True)
    assert counts["round"] == rounds[best.step]
    assert told == []


def test_a_run_that_was_not_evaluated_has_no_best(shards: Path, tmp_path: Path) -> None:
    train_in(tmp_path / "run", tiny_recipe(shards, "train.epochs=1"))
    with pytest.raises(RecipeError, match="was not evaluated"):
        load_best(Run(tmp_path / "run"))


def test_a_better_one_takes_the_place_of_the_best(shards: Path, tmp_path: Path) -> None:
    train_in(tmp_path / "run", tiny_recipe(shards, "train.checkpoint=3 steps"))
    run = Run(tmp_path / "run")
    steps = [int(folder.name) for folder in run.checkpoints()]
    with hold(run.path) as token:
        for step, top1 in zip(steps[-2:], (0.25, 0.5), strict=True):
            keep_best(Run(run.path, token), step, top1, "x")
    best = find_best(run)
    assert best is not None
    assert (best.step, best.top1) == (steps[-1], 0.5)
    assert [folder.name for folder in (run.path / "best").iterdir()] == [best.folder.name]
    assert load_best(run).state.step == steps[-1]


def watched(recipe: Recipe, folder: Path) -> during.Watched:
    kept = open_watched(recipe, open_index(recipe.data.shards), Run(folder), ALONE)
    assert kept is not None
    return kept


def test_no_query_is_in_the_bank_and_both_are_drawn_by_the_seed(
    shards: Path, tmp_path: Path
) -> None:
    one, same = (watched(tiny_recipe(shards, EVERY), tmp_path) for _ in range(2))
    other = watched(tiny_recipe(shards, EVERY, "seed=1"), tmp_path)
    assert one.digest == same.digest != other.digest
    assert (len(one.queries.labels), len(one.bank.labels)) == (30, 120)
    assert not set(one.queries.sample_ids.tolist()) & set(one.bank.sample_ids.tolist())
    labels = np.asarray(open_index(shards).labels)
    assert np.array_equal(labels[one.queries.sample_ids], one.queries.labels)


def test_no_labelled_seed_is_a_query(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(shards, EVERY, "seeds.labels=shards", "seeds.per_class=20")
    assert recipe.seeds is not None
    taken = load_seeds(open_index(shards), recipe.seeds, recipe.seed).table.sample_ids
    queries = watched(recipe, tmp_path).queries.sample_ids
    assert len(queries) == 30
    assert not set(queries.tolist()) & set(np.asarray(taken).tolist())


def test_shards_without_labels_need_others(tmp_path: Path, shards: Path) -> None:
    bare = make_shards(tmp_path / "bare", n=60, shards=1, size=16, labels=False)
    recipe = tiny_recipe(bare, EVERY)
    with pytest.raises(DataError, match=r"no labels to evaluate on.*train\.evaluate_data"):
        watched(recipe, tmp_path)
    kept = watched(recipe.replace(f"train.evaluate_data={shards}"), tmp_path)
    assert (len(kept.bank.labels), len(kept.queries.labels)) == (120, 30)
    with pytest.raises(DataError, match=r"train\.evaluate_data: .*bare has no labels"):
        watched(recipe.replace(f"train.evaluate_data={bare}"), tmp_path)


def test_data_to_evaluate_on_need_a_time_to_do_it(shards: Path) -> None:
    with pytest.raises(RecipeError, match=r"set train\.evaluate"):
        tiny_recipe(shards, f"train.evaluate_data={shards}")


@pytest.mark.parametrize(
    ("every", "due"), [("5 steps", [5, 10, 15, 20]), ("1 epoch", [10, 20]), ("3 epochs", [20])]
)
def test_the_recipe_says_when(shards: Path, every: str, due: list[int]) -> None:
    recipe = tiny_recipe(shards, f"train.evaluate={every}", "train.batch=15")
    timeline, state, times = Timeline.of(recipe, 150), State(), []
    while not timeline.finished(state):
        state = state.after_step(15)
        if state.offset == 10:
            state = state.after_segment()
        if timeline.evaluate_due(state):
            times.append(state.step)
    assert times == due
