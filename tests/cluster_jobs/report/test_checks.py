"""Each check of the report: silent when it is too early, calm when all is well, clear when not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster_jobs import comparison
from cluster_jobs.display import status_table
from cluster_jobs.evaluations import Score, read_scores
from cluster_jobs.report.checks import (
    balanced,
    beats_baselines,
    checks,
    filled,
    knows_seeds,
    learns,
    settles,
    spread_out,
    whole,
)
from cluster_jobs.report.facts import Facts
from cluster_jobs.status import Status, status
from deepclust.evaluate import baselines
from deepclust.files import write_json
from deepclust.recipe import Recipe
from deepclust.run.directory import Run

FINE = {
    "loss": 2.0, "largest_share": 0.02, "nmi_previous": 0.6, "forced": 0, "excluded": 0, "n": 1000,
}  # fmt: skip


def facts(*rounds: dict[str, Any], k: int = 100) -> Facts:
    tree = {
        "data": {"shards": "s"}, "backbone": {"name": "alexnet"},
        "cluster": {"k": k}, "train": {"epochs": 1},
    }  # fmt: skip
    status = Status("r", "RUNNING", "train", 0, 0.0, 1, 1, 1.0, 1.0, None, "")
    return Facts(
        name="r", status=status, recipe=Recipe.parse(tree), recipe_text="", essentials=[],
        tiles=[], rounds=list(rounds), heads=[], seeds=None, train=[], scores=[], exports=[],
        commands=[], answered=None, labels=[],
    )  # fmt: skip


def simclr(loss: float) -> Facts:
    """A run without clusters, at this loss; a guess among 2 x 256 - 1 costs 6.24."""
    tree = {
        "data": {"shards": "s"}, "backbone": {"name": "alexnet"},
        "method": {"name": "simclr"}, "train": {"epochs": 1},
    }  # fmt: skip
    return replace(facts(), recipe=Recipe.parse(tree), train=[{"loss": loss}])


def test_a_healthy_run_passes_all() -> None:
    first = {**FINE, "nmi_previous": None}
    found = checks(facts(first, {**FINE, "nmi_previous": 0.4}, FINE))
    assert len(found) == 4
    assert all(check.good for check in found)


def test_nothing_is_said_before_the_first_round() -> None:
    assert checks(facts()) == []


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        (
            learns,
            {"loss": 4.6},
            "guess, 4.61: the network does not learn. Try another train.lr, or a smaller",
        ),
        (balanced, {"largest_share": 0.5}, "50.0%"),
        (filled, {"forced": 30}, "30 images"),
        (whole, {"excluded": 7}, "7 of 1,000"),
    ],
)
def test_a_problem_is_reported_with_its_numbers(
    check: Any, change: dict[str, Any], words: str
) -> None:
    found = check(facts({**FINE, **change}))
    assert not found.good
    assert words in found.text


def test_falling_agreement_between_rounds_is_reported() -> None:
    rounds = [{**FINE, "nmi_previous": value} for value in (None, 0.7, 0.5)]
    assert not settles(facts(*rounds)).good
    assert settles(facts(*rounds[:2])).good
    assert settles(facts(rounds[0])) is None


def test_two_clusters_of_equal_size_are_not_a_collapse() -> None:
    assert balanced(facts({**FINE, "largest_share": 0.5}, k=2)).good


def test_one_collapsing_head_of_several_is_reported() -> None:
    heads = [FINE, {**FINE, "largest_share": 0.6}]
    result = balanced(replace(facts(FINE), heads=heads))
    assert not result.good
    assert "60.0%" in result.text


def test_statistics_that_a_round_lacks_are_not_checked() -> None:
    lacking = {**FINE, "largest_share": None, "excluded": None, "forced": None}
    assert [check(facts(lacking)) for check in (balanced, whole, filled)] == [None] * 3


def test_a_run_without_clusters_is_not_advised_to_use_fewer_clusters() -> None:
    (stuck,) = checks(simclr(6.24))
    assert not stuck.good
    assert stuck.text.endswith("Try another train.lr.")
    assert [check.good for check in checks(simclr(3.0))] == [True]


def test_a_collapse_is_told_from_the_metrics_alone() -> None:
    fine = {"loss": 1.0, "spread": 0.9, "mean_entropy": 0.2, "entropy_of_mean": 0.7}
    assert spread_out(simclr(1.0)) is None
    assert spread_out(replace(facts(), train=[fine] * 9)).good
    found = spread_out(replace(facts(), train=[{**fine, "spread": 0.01}] * 9))
    assert not found.good
    assert found.text.startswith("All images have nearly the same projection (spread 0.010")


def scored(top1: float, step: int = 5000, state: str = "RUNNING", **beside: float) -> Facts:
    """A run whose newest evaluation has these scores, intervals of .02 around those of kNN."""

    def score(name: str, value: float) -> Score:
        near = [value - 0.01, value + 0.01]
        return Score(
            name, "top1", value, "step", near if name != "baseline majority" else None, step
        )

    scores = [score("knn", top1), *(score(f"baseline {k}", v) for k, v in beside.items())]
    return replace(facts(), scores=scores, status=replace(facts().status, state=state))


@pytest.mark.parametrize(
    ("run", "good", "words"),
    [
        (scored(0.3, **{"pixels knn": 0.4}), False, "Worse than pixels: knn top-1 is 30.0%"),
        (scored(0.3, **{"random_weights knn": 0.4}), False, "Worse than random weights"),
        (scored(0.3, majority=0.4), False, "Worse than the commonest class"),
        (scored(0.5, majority=0.1, **{"pixels knn": 0.4}), True, "40.0% for pixels"),
        (scored(0.395, **{"pixels knn": 0.4}), None, ""),  # inside of the interval
        (scored(0.405, **{"pixels knn": 0.4}), None, ""),
        (scored(0.3, step=20, **{"pixels knn": 0.4}), None, ""),  # too early
        (scored(0.3, step=20, state="SUCCEEDED", **{"pixels knn": 0.4}), False, "Worse"),
        (scored(0.3), None, ""),  # no baselines
        (scored(0.3, **{"pixels linear": 0.4}), None, ""),  # of another evaluator
        (facts(), None, ""),
    ],
)
def test_a_run_is_judged_by_its_baselines_where_it_can_be(
    run: Facts, good: bool | None, words: str
) -> None:
    result = beats_baselines(run)
    if good is None:
        assert result is None
    else:
        assert result.good is good
        assert words in result.text


def test_the_file_of_an_evaluation_is_read_for_its_baselines(tmp_path: Path) -> None:
    scores = {
        "knn": {"top1": 0.2, "top1_interval": [0.19, 0.21]},
        "baselines": {
            "majority": {"top1": 0.1}, "rows": {"train": 9, "test": 9},
            "pixels": {"knn": {"top1": 0.3}}, "random": {"knn": {"top1": 0.25}},
        },
    }  # fmt: skip
    record = {"step": 500, "train": "a", "test": "b", "scores": scores}
    write_json(tmp_path / "evaluations" / "00000500.json", record)
    result = beats_baselines(replace(facts(), scores=read_scores(Run(tmp_path))[0]))
    assert result.text.startswith("Worse than pixels: knn top-1 is 20.0%, and 30.0%")

    # more training rows than baselines have: the score on the same rows counts
    scores["knn"] = {"top1": 0.4}
    scores["baselines"]["this_network"] = {"knn": {"top1": 0.2, "interval": [0.19, 0.21]}}
    write_json(tmp_path / "evaluations" / "00000500.json", record)
    result = beats_baselines(replace(facts(), scores=read_scores(Run(tmp_path))[0]))
    assert result.text.startswith("Worse than pixels: knn top-1 is 20.0%, and 30.0%")


def test_status_says_what_is_worse_than_pixels_in_red(tmp_path: Path) -> None:
    scores = {
        "knn": {"top1": 0.2, "interval": [0.19, 0.21]},
        "baselines": {"pixels": {"knn": {"top1": 0.3}}},
    }  # fmt: skip
    record = {"step": 500, "train": "a", "test": "b", "scores": scores}
    facts().recipe.save(tmp_path / "recipe.yaml")
    file = tmp_path / "evaluations" / "00000500.json"
    write_json(file, record)
    worse = "Worse than pixels: knn top-1 is 20.0%, and 30.0% for pixels"
    assert status(Run(tmp_path)).worse == worse
    screen = io.StringIO()
    console = Console(file=screen, width=300, force_terminal=True, color_system="standard")
    console.print(status_table([status(Run(tmp_path))]))
    assert f"\x1b[31m{worse}" in screen.getvalue()

    write_json(file, {**record, "step": 20})  # too early
    assert status(Run(tmp_path)).worse is None
    write_json(file, {**record, "scores": {"knn": {"top1": "high"}}})
    now = status(Run(tmp_path))
    assert now.state == "PENDING"
    assert "the scores cannot be read" in now.worse


def test_the_name_of_a_networks_own_rows_is_that_of_the_baselines() -> None:
    assert comparison.OWN == baselines.OWN


def seeded(accuracy: float | None, row: int) -> Facts:
    record = {
        "accuracy": accuracy, "held_out": 2 * row, "classes": ["a", "b"],
        "confusion": [[row, 0, 0], [0, row, 0]],
    }  # fmt: skip
    return replace(facts({**FINE, "largest_share": 0.6}), seeds=record)


def test_a_seeded_run_is_judged_by_its_held_out_labels() -> None:
    good, bad = knows_seeds(seeded(0.9, 50)), knows_seeds(seeded(0.5, 50))
    assert good.good
    assert "100 held-out labels 90.0%" in good.text
    assert not bad.good
    assert "seeds.pin_from" in bad.text
    assert balanced(seeded(0.9, 50)) is None  # classes may be of any size


def test_a_seeded_run_without_enough_held_out_labels_is_not_judged_by_them() -> None:
    for run in (seeded(0.9, 10), seeded(None, 50), seeded(0.55, 50), facts(FINE)):
        assert knows_seeds(run) is None
    assert balanced(seeded(None, 50)) is not None


def test_a_loss_is_not_judged_before_enough_steps_and_the_end_of_the_warm_up() -> None:
    def at(step: int, epoch: float, state: str = "RUNNING", warmup: float = 0.0) -> Facts:
        run = simclr(6.24)
        recipe = run.recipe.model_copy(
            update={"train": run.recipe.train.model_copy(update={"warmup": warmup})}
        )
        line = {"loss": 6.24, "step": step, "epoch": epoch}
        return replace(run, train=[line], recipe=recipe, status=replace(run.status, state=state))

    assert learns(at(20, 1)) is None
    assert not learns(at(20, 1, "SUCCEEDED")).good
    assert not learns(at(200, 1)).good
    assert learns(at(200, 1, warmup=2)) is None


def test_the_first_steps_of_a_round_with_a_fresh_classifier_are_not_judged() -> None:
    rounds = [{**FINE, "round": 0, "loss": 2.0}, {**FINE, "round": 1, "loss": 4.6}]
    train = [{"loss": 1, "step": step, "round": 1, "epoch": 9} for step in (1000, 1010)]
    assert learns(replace(facts(*rounds), train=train)).good
    train[1]["step"] = 1100
    assert not learns(replace(facts(*rounds), train=train)).good
