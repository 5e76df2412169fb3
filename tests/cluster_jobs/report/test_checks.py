"""Each check of the report: silent when it is too early, calm when all is well, clear when not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster_jobs.report.checks import balanced, checks, filled, learns, settles, spread_out, whole
from cluster_jobs.report.facts import Facts
from cluster_jobs.status import Status
from deepclust.recipe import Recipe

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
