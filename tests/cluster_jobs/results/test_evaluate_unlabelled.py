"""`deepclust evaluate RUN` needs no labels: it scores a run on its own images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster_jobs.evaluations import read_scores
from cluster_jobs.results.evaluate_unlabelled import evaluate_unlabelled
from deepclust.files import write_json
from deepclust.run.directory import Run
from tests.tiny import deepclust


@pytest.fixture
def run(final_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(final_run, tmp_path / "run"))


def test_a_run_is_scored_without_labels_and_the_record_is_beside_that_with_labels(
    run: Path,
) -> None:
    step = max(int(folder.name) for folder in Run(run).checkpoints())
    labelled = {"train": "a", "test": "b", "scores": {"knn": {"top1": 0.5}}}
    write_json(run / "evaluations" / f"{step:08d}.json", {"step": step, **labelled})
    scores = json.loads(deepclust("evaluate", run, "--json").stdout)
    assert set(scores) == {"crops", "crops_clusters", "neighbours", "rounds"}
    crops, together = scores["crops"], scores["crops_clusters"]
    assert crops["cosine_of_others"] < crops["interval"][0] <= crops["cosine"] <= 1
    assert crops["found"] > 10 * crops["found_by_chance"]
    assert together["same_of_others"] < together["interval"][0]
    assert scores["neighbours"]["by_chance"] < scores["neighbours"]["interval"][0]
    assert scores["neighbours"]["with_step"] < step
    assert scores["rounds"]["images"] == 300
    read, _ = read_scores(Run(run))
    assert {"knn", *scores} == {one.evaluator for one in read}
    assert read[0].evaluator == "knn"
    assert evaluate_unlabelled(run, print, print) == scores


def test_one_checkpoint_and_no_round_before_are_told_and_the_rest_is_scored(run: Path) -> None:
    for folder in Run(run).checkpoints()[:-1]:
        shutil.rmtree(folder)
    told: list[str] = []
    scores = evaluate_unlabelled(run, told.append, lambda scores: None)
    assert set(scores) == {"crops", "crops_clusters", "rounds"}
    assert any("keep.checkpoints=3" in text for text in told)


def test_one_set_of_shards_alone_or_an_evaluator_without_any_is_refused(run: Path) -> None:
    assert "--test SHARDS" in deepclust("evaluate", run, "--train", run, code=2).stderr
    assert "leave --with" in deepclust("evaluate", run, "--with", "knn", code=2).stderr
