"""Labels of rows: the nearest and the second centroid, tile by tile, in memory that stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.trained import labelling
from deepclust.trained.labelling import Distances, Labels, Nearest, label

NAMES = ("clusters", "distances", "seconds", "margins")


def drawn(n: int, k: int, d: int = 16) -> tuple[np.ndarray, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=draw).half().numpy()
    return rows, torch.randn(1, k, d, generator=draw)


def assert_same(one: Labels, other: Labels) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_labels_are_those_of_all_distances() -> None:
    rows, centroids = drawn(300, 40)
    squares = torch.cdist(torch.from_numpy(rows).double(), centroids[0].double()).square().numpy()
    found = label(Nearest(centroids), rows)
    order = np.argsort(squares, 1)
    np.testing.assert_array_equal(found.clusters, order[:, 0])
    np.testing.assert_array_equal(found.seconds, order[:, 1])
    least = np.sort(squares, 1)
    np.testing.assert_allclose(found.distances, least[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.margins, least[:, 1] - least[:, 0], rtol=1e-3, atol=1e-4)


def test_labels_do_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centroids = drawn(300, 40)
    whole = label(Nearest(centroids, spherical=True), rows)
    monkeypatch.setattr(labelling, "CELLS", 7 * 40)
    assert_same(whole, label(Nearest(centroids, spherical=True), rows))


def test_one_cluster_has_no_second() -> None:
    found = label(Nearest(drawn(5, 1)[1]), drawn(5, 1)[0])
    assert found.seconds.tolist() == [-1] * 5
    assert np.isnan(found.margins).all()
    assert len(label(Nearest(drawn(5, 3)[1]), drawn(0, 3)[0]).clusters) == 0


def test_the_scores_of_every_tile_are_in_the_same_memory() -> None:
    rows, centroids = drawn(50, 30)
    distances, tile = Distances(centroids[0]), torch.from_numpy(rows).float()
    first = distances(tile)
    wanted = centroids[0].square().sum(1) - 2 * (tile @ centroids[0].T)
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)
    assert distances(tile[:20]).data_ptr() == first.data_ptr()
