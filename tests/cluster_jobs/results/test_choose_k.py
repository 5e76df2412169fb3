"""Several numbers of clusters beside each other: what the table and its JSON say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from cluster_jobs.results.choose_k import FILE, compare, parse_ks, summary
from cluster_jobs.results.cluster_file import Options, cluster_features
from deepclust.errors import DataError, RecipeError
from deepclust.run.round_files import read_excluded
from tests.cluster_jobs.synthetic import make_run, reseal
from tests.images import make_shards
from tests.tiny import deepclust


def blobs(folder: Path, count: int = 8, n: int = 800) -> Path:
    """Groups far apart from each other."""
    draws = np.random.default_rng(0)
    centres = 20 * draws.standard_normal((count, 6))
    rows = centres[np.arange(n) % count] + draws.standard_normal((n, 6))
    np.save(folder / "features.npy", rows.astype(np.float32))
    return folder / "features.npy"


def test_the_true_number_of_groups_is_the_most_stable_and_lies_apart(tmp_path: Path) -> None:
    options = Options(init="k-means++")
    compared = compare(blobs(tmp_path), tmp_path / "out", (2, 8, 100), options)
    few, true, many = compared["ks"]
    assert true["ari_seeds"] == pytest.approx(1)
    assert true["silhouette"] > max(few["silhouette"], many["silhouette"])
    assert many["ari_seeds"] < 0.9
    assert few["inertia"] > true["inertia"] > many["inertia"]
    assert (true["smallest"], true["median"]) == (100, 100)
    assert compared == json.loads((tmp_path / "out" / FILE).read_text())
    assert summary(compared).row_count == 3


def test_the_numbers_are_those_of_one_k_and_of_scikit_learn(tmp_path: Path) -> None:
    source = blobs(tmp_path)
    one = cluster_features(source, tmp_path / "one", Options(k=30, whiten=4))
    compared = compare(source, None, (20, 30), Options(whiten=4))["ks"][1]
    assert compared["inertia"] == one["inertia"]
    assert compared["smallest"] == one["sizes"]["min"]
    own = compare(source, None, (8, 9), Options())["ks"][0]
    cluster_features(source, tmp_path / "eight", Options(k=8))
    ids = np.load(tmp_path / "eight" / "assignments.npy")
    assert own["silhouette"] == pytest.approx(silhouette_score(np.load(source), ids), rel=1e-4)


def test_the_command_prints_a_table_and_leaves_nothing_but_the_result(tmp_path: Path) -> None:
    source = blobs(tmp_path)
    done = deepclust("cluster", source, "--k", "4,8", "--out", tmp_path / "out", "--whiten", 4)
    assert "ARI of two seeds" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "out"]


def test_what_cannot_be_compared_is_refused_with_a_fix(tmp_path: Path) -> None:
    source = blobs(tmp_path)
    with pytest.raises(DataError, match=r"--k to at most 800"):
        compare(source, None, (8, 801), Options())
    with pytest.raises(RecipeError, match="give one number to --k"):
        compare(source, None, (8, 9), Options(ids=source))


def test_a_run_stands_for_the_features_of_its_last_round_without_those_it_excluded(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", make_shards(tmp_path / "shards", n=120), rounds=2)
    rows = run / "rounds" / "0001" / "features" / "rows.npy"
    rows.write_bytes(blobs(tmp_path, n=120).read_bytes())
    reseal(rows.parent)
    excluded = list(read_excluded(rows.parent))
    assert excluded
    np.save(tmp_path / "kept.npy", np.delete(np.load(rows), excluded, axis=0))
    of_run, of_kept = (
        compare(source, None, (4, 8), Options())["ks"] for source in (run, tmp_path / "kept.npy")
    )
    assert [one["inertia"] for one in of_run] == [one["inertia"] for one in of_kept]
    with pytest.raises(RecipeError, match="no --whiten"):
        compare(run, None, (4, 8), Options(whiten=4))


@pytest.mark.parametrize("text", ["", "a", "5,", "0,5", "-1", "1.5"])
def test_a_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"as in --k 50,100,200"):
        parse_ks(text)


def test_a_list_is_sorted_and_each_number_counts_once() -> None:
    assert parse_ks("100, 50,100") == (50, 100)
    assert parse_ks(None) == ()
