"""What the report says of labels: each round's numbers, and classes that no label describes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cluster_jobs.report import write_report
from cluster_jobs.report.facts import gather
from cluster_jobs.report.seeds import unlabelled
from deepclust.run.directory import Run
from tests.cluster_jobs.synthetic import make_run, pin
from tests.images import make_shards


def test_every_seeded_round_has_a_row_and_others_have_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_shards(tmp_path / "shards", n=96, classes=3))
    for number in (1, 2):
        pin(run, number, ["cat", "<dog>"])
    seeds = gather(Run(run)).seeds
    assert seeds is not None
    assert [one["round"] for one in seeds["rounds"]] == [1, 2]
    assert {one["labelled"] for one in seeds["rounds"]} == {4}
    assert {one["free"] for one in seeds["rounds"]} == {1.0}  # an image of another class, free
    text = write_report(run, tmp_path / "report.html").read_text()
    assert "What the labels did, by round" in text
    assert "<dog>" not in text


def test_each_class_without_a_label_has_the_free_cluster_that_fits_it_best() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 30, 20, 10])
    clusters = np.array([0] * 40 + [1] * 20 + [2] * 10 + [1] * 15 + [2] * 5 + [0] * 10, np.int32)
    index = SimpleNamespace(labels=labels, class_names=["a", "b", "c", "d"])
    found = unlabelled(index, clusters, ["a", None, None])  # type: ignore[arg-type]
    assert [(one["class"], one["cluster"]) for one in found] == [("b", 1), ("c", 2), ("d", None)]
    assert [one["recall"] for one in found] == [20 / 30, 5 / 20, 0]
    assert found[0]["purity"] == 20 / 35


def test_without_labels_or_free_clusters_nothing_is_matched() -> None:
    clusters = np.zeros(4, np.int32)
    bare = SimpleNamespace(labels=None, class_names=None)
    assert unlabelled(bare, clusters, ["a"]) == []  # type: ignore[arg-type]
    all_known = SimpleNamespace(labels=np.zeros(4, int), class_names=["a"])
    assert unlabelled(all_known, clusters, ["a"]) == []  # type: ignore[arg-type]
