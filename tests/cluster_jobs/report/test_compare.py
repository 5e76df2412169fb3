"""Several runs on one page: what differs, their scores, and a sweep against what was swept."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs.report import write_comparison
from cluster_jobs.report.charts import curves_chart
from cluster_jobs.report.compare import _swept, compare, differing
from deepclust.errors import RecipeError
from tests.cluster_jobs.synthetic import evaluate, make_run
from tests.images import make_shards


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with one key that differs, of which one is evaluated."""
    folder = tmp_path_factory.mktemp("sweep")
    shards = make_shards(folder / "shards", n=96, classes=3)
    made = [make_run(folder / name, shards) for name in ("train.lr=0.05", "train.lr=0.5")]
    recipe = made[1] / "recipe.yaml"
    _, text = recipe.read_text().split("\n", 1)  # without the seal of its keys
    old = next(line for line in text.splitlines() if line.strip().startswith("lr:"))
    recipe.write_text(text.replace(old, "  lr: 0.9", 1))
    evaluate(made[0])
    return made


def test_only_keys_that_differ_are_columns() -> None:
    assert differing([{"a": 1, "b": 2, "data.workers": 1}, {"a": 1, "b": 3, "c": 4}]) == ["b", "c"]
    assert differing([{"a": 1}, {"a": 1}]) == []


def test_scores_are_side_by_side_and_drawn_against_what_was_swept(runs: list[Path]) -> None:
    page = compare(runs)
    assert page.keys == ["train.lr"]
    assert [run.name for run in page.runs] == ["train.lr=0.05", "train.lr=0.5"]
    scores = dict(page.scores)
    assert scores["NMI to the previous round, last round"] == [scores_of_last(runs)] * 2
    assert scores["knn top1"][1] is None
    swept = next(chart for chart in page.charts if chart.title.endswith("by train.lr"))
    assert swept.columns[0] == "train.lr"
    assert swept.rows[-1][0] == "0.9"


def test_seeds_of_a_sweep_are_averaged_and_no_run_of_many_is_left_out() -> None:
    flat: list[dict[str, object]] = [{"cluster.k": k, "seed": s} for k in (5, 50) for s in (0, 1)]
    (chart,) = _swept(["seed", "cluster.k"], flat, [("knn top1", [0.2, 0.4, None, 0.9])])
    assert chart.rows == [["5", "0.3"], ["50", "0.9"]]
    xs = np.arange(3.0)
    many = curves_chart("t", "", "x", [(f"run{i:02}", xs, xs + i) for i in range(12)])
    assert all(f"run{i:02}" in many.svg for i in range(12))


def scores_of_last(runs: list[Path]) -> float:
    """Return what the first run's last round has."""
    from cluster_jobs.report.facts import gather
    from deepclust.run.directory import Run

    return gather(Run(runs[0])).rounds[-1]["nmi_previous"]


def test_the_page_is_one_file_without_an_address(runs: list[Path], tmp_path: Path) -> None:
    text = write_comparison(runs, tmp_path / "both.html").read_text()
    assert "train.lr=0.5" in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)


def test_a_run_twice_or_another_suffix_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "a.html")
    with pytest.raises(RecipeError, match="one HTML page"):
        write_comparison(runs, tmp_path / "a.pdf")
