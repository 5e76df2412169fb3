"""The map of features: groups stay apart, a run has the same map again, few rows are no error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster_jobs.report.map import FEWEST, feature_map, flat
from deepclust.run.directory import Run
from tests.cluster_jobs.synthetic import make_run
from tests.images import make_shards


def groups(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of three groups far from each other, and the group of each."""
    draw = np.random.default_rng(0)
    group = np.arange(n) % 3
    rows = 10 * np.eye(3, 16)[group] + draw.normal(size=(n, 16))
    return rows.astype(np.float32), group


@pytest.mark.parametrize("n", [60, FEWEST + 40])
def test_groups_stay_apart_and_the_map_is_the_same_again(n: int) -> None:
    rows, group = groups(n)
    way, places = flat(rows, seed=3)
    assert way == ("PCA" if n < FEWEST else way)
    centres = np.stack([places[group == one].mean(0) for one in range(3)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
    assert (nearest == group).all()
    assert np.array_equal(flat(rows, seed=3)[1], places)


def test_a_run_has_a_map_only_with_features_on_disk(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_shards(tmp_path / "shards", n=96, classes=3))
    chart = feature_map(Run(run))
    stage = run / "rounds" / "0002" / "features"
    assert (chart is not None) == (stage / "rows.npy").exists()
    if chart is not None:
        assert "PCA" in chart.reading
    assert feature_map(Run(make_run(tmp_path / "new", tmp_path / "shards", rounds=0))) is None
