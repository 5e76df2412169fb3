"""Baselines beside the scores of a run: what they measure, what they cost, where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster_jobs.display import scores_lines
from cluster_jobs.evaluations import read_scores as facts_scores
from cluster_jobs.results import evaluate as of_run
from cluster_jobs.results.baselines import Beside
from cluster_jobs.results.evaluate import evaluate_run, labelled_features
from deepclust import open_index, pretrain
from deepclust.errors import RecipeError
from deepclust.evaluate import baselines as measured
from deepclust.evaluate import evaluate_features
from deepclust.run.directory import Run
from deepclust.run.scores import flat_scores
from deepclust.trained.saved import fresh_embedder
from tests.tiny import tiny_recipe, tiny_shards

NAMES = ["knn", "spherical_clusters"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"), n=120)


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny_recipe(shards, "train.epochs=1"), path)
    return path


@pytest.fixture(scope="module")
def scores(run_dir: Path, shards: Path) -> dict[str, Any]:
    return evaluate_run(run_dir, str(shards), str(shards), NAMES)


def test_random_weights_are_those_of_the_run_before_its_first_step(
    run_dir: Path, shards: Path, scores: dict[str, Any]
) -> None:
    recipe, index = Run(run_dir).recipe, open_index(shards)
    rows = labelled_features(fresh_embedder(recipe), index, recipe.data)
    expected = evaluate_features(rows, rows, NAMES, dim=recipe.clustering.dim)
    assert scores["baselines"]["random_weights"] == expected


def test_pixels_are_means_over_places_of_what_the_network_sees(
    run_dir: Path, shards: Path, scores: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, index = Run(run_dir).recipe, open_index(shards)
    rows = labelled_features(lambda images: images.float().flatten(1), index, recipe.data)
    assert scores["baselines"]["pixels"]["knn"] == evaluate_features(rows, rows, ["knn"])["knn"]
    monkeypatch.setattr(measured, "SIDE", 8)
    images = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(1, 3, 16, 16)
    halves = images.float().reshape(1, 3, 8, 2, 8, 2).mean((3, 5))
    torch.testing.assert_close(measured.pixels(images), halves.flatten(1))


def test_the_majority_is_the_share_of_the_commonest_class(
    shards: Path, scores: dict[str, Any]
) -> None:
    labels = np.asarray(open_index(shards).labels)
    assert scores["baselines"]["majority"]["top1"] == np.bincount(labels).max() / len(labels)


def test_baselines_are_measured_once(
    run_dir: Path, shards: Path, scores: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_run, "fresh_embedder", None)  # cannot be called
    again = evaluate_run(run_dir, str(shards), str(shards), ["knn"])["baselines"]
    assert again["pixels"] == {"knn": scores["baselines"]["pixels"]["knn"]}
    (kept,) = (run_dir / "evaluations" / "baselines").glob("*.json")
    whole = kept.read_text()
    kept.write_text("{")
    monkeypatch.undo()
    assert evaluate_run(run_dir, str(shards), str(shards), NAMES) == scores
    assert kept.read_text() == whole


def test_baselines_use_a_sample_of_many_images_and_say_so(
    run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (measured, of_run.baselines.__globals__):
        setter = monkeypatch.setitem if isinstance(module, dict) else monkeypatch.setattr
        setter(module, "MOST_ROWS", 50)
    scores = evaluate_run(run_dir, str(shards), str(shards), ["knn"])
    assert scores["baselines"]["rows"] == {"train": 50.0, "test": 50.0}
    assert "(pixels and random weights: 50 training and 50 test images)" in scores_lines(scores)
    assert 0 < scores["baselines"]["this_network"]["knn"]["top1"] <= 1
    assert "baseline this_network knn" in flat_scores(scores)


def test_the_network_is_not_scored_again_where_baselines_have_all_rows(
    scores: dict[str, Any],
) -> None:
    assert "this_network" not in scores["baselines"]


def test_without_baselines_there_are_none_and_others_need_no_images(
    run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate_run(run_dir, str(shards), str(shards), ["knn"], beside=Beside(baselines=False))
    assert set(alone) == {"knn"}
    monkeypatch.setattr(of_run, "fresh_embedder", None)
    toy = evaluate_run(run_dir, str(shards), str(shards), ["tests.toys.evaluator"])
    assert set(toy["baselines"]) == {"majority"}


def test_baselines_that_cannot_be_measured_cost_no_score(
    run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise OSError("the disk went away")

    told: list[str] = []
    monkeypatch.setattr(of_run, "baselines", breaks)
    scores = evaluate_run(run_dir, str(shards), str(shards), ["knn"], told.append)
    assert scores["knn"]["top1"] > 0
    assert "warning: there are no baselines: the disk went away" in told


def test_every_score_has_a_line_with_its_interval(scores: dict[str, Any]) -> None:
    lines = scores_lines(scores)
    for start in ("knn: top1 ", "baseline majority: top1 0.", "baseline pixels knn: top1 "):
        (line,) = (one for one in lines if one.startswith(start))
        assert " ± 0.0" in line
    assert flat_scores({"baselines": {"majority": 1}}) == {"baseline majority": 1}
    assert flat_scores({"baselines": 3}) == {"baselines": 3}


def test_a_network_of_unknown_layers_is_refused_before_images_are_read(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(net: object) -> None:
        raise RecipeError("its layers are not known")

    monkeypatch.setattr("deepclust.evaluate.layers._modules", unknown)
    with pytest.raises(RecipeError, match="not known"):
        evaluate_run(run_dir, "/no/shards", "/no/shards", ["knn"], beside=Beside(layers=True))


def test_every_layer_is_probed_on_request(run_dir: Path, shards: Path) -> None:
    beside = Beside(baselines=False, layers=True)
    scores = evaluate_run(run_dir, str(shards), str(shards), ["knn"], beside=beside)
    assert len(scores["layers"]) > 1
    for name, values in scores["layers"].items():
        assert values["rows"] == 120
        assert 0.25 < values["top1"] <= 1
        assert any(line.startswith(f"layer {name}: top1") for line in scores_lines(scores))
    assert facts_scores(Run(run_dir))[0]
