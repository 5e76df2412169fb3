"""k-means: Lloyd against a slow reference and FAISS, fixed rows, seeding, and stopping."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.options import Progress
from deepclust.clustering.tile_sizes import MOST_COMPILED, compiled_tile_rows
from deepclust.errors import DataError, NumericalError, RecipeError, ResourceError


def blobs(n: int, dim: int, groups: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    centres = 3 * draws.standard_normal((groups, dim))
    return (centres[draws.integers(0, groups, n)] + draws.standard_normal((n, dim))).astype(
        np.float32
    )


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((x.astype(np.float64)[:, None] - centroids.astype(np.float64)) ** 2).sum(2)


def slow_kmeans(x: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd in float64, one cluster at a time; an empty cluster stays where it is."""
    centroids = centroids.astype(np.float64)
    for _ in range(iterations):
        labels = distances(x, centroids).argmin(1)
        for j in np.unique(labels):
            centroids[j] = x[labels == j].astype(np.float64).mean(0)
    return centroids


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equals_a_slow_reference(backend: str) -> None:
    x = blobs(600, 5, 8)
    found = kmeans(x, 8, iterations=6, init=x[:8], backend=backend)
    np.testing.assert_allclose(found.centroids, slow_kmeans(x, x[:8], 6), atol=1e-5)
    np.testing.assert_array_equal(found.assignments, distances(x, found.centroids).argmin(1))
    np.testing.assert_allclose(found.distances, distances(x, found.centroids).min(1), rtol=1e-5)
    assert found.inertia == pytest.approx(distances(x, found.centroids).min(1).sum(), rel=1e-6)
    assert found.assignments.dtype == np.int32
    assert 1 <= len(found.history) <= 6


@pytest.mark.parametrize("spherical", [False, True])
def test_inertia_is_that_of_faiss_from_the_same_start(spherical: bool) -> None:
    x = blobs(5000, 24, 40)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    peer = faiss.Kmeans(24, 60, niter=20, spherical=spherical, max_points_per_centroid=10**6)
    peer.train(x, init_centroids=x[:60].copy())
    ours = kmeans(x, 60, init=x[:60], spherical=spherical)
    assert ours.inertia <= 1.001 * distances(x, peer.centroids).min(1).sum()


def test_both_backends_give_the_same_clusters() -> None:
    x = blobs(3000, 16, 30)
    a, b = (kmeans(x, 50, seed=4, backend=backend) for backend in ("torch", "faiss"))
    np.testing.assert_array_equal(a.assignments, b.assignments)
    np.testing.assert_array_equal(a.centroids, b.centroids)


def test_no_empties_means_that_inertia_never_rises() -> None:
    history = kmeans(blobs(2000, 8, 20), 20, iterations=15).history
    inertia = [step.inertia for step in history]
    assert not any(step.empties for step in history)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertia))
    assert history[0].moved == 2000
    assert history[-1].moved < 500


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 12),
    grid=st.integers(1, 4),
    seed=st.integers(0, 99),
    empty=st.sampled_from(["split", "relocate"]),
)
def test_every_cluster_has_a_point_or_too_few_are_distinct(
    n: int, k: int, grid: int, seed: int, empty: str
) -> None:
    x = np.random.default_rng(seed).integers(0, grid, (n, 2)).astype(np.float32)
    distinct = len(np.unique(x, axis=0))
    if distinct < k:
        with pytest.raises(DataError):
            kmeans(x, k, iterations=3, seed=seed, empty=empty)
        return
    found = kmeans(x, k, iterations=3, seed=seed, empty=empty)
    assert (np.bincount(found.assignments, minlength=k) > 0).all()
    best = distances(x, found.centroids).min(1)
    np.testing.assert_allclose(found.distances, best, rtol=1e-5, atol=1e-6)


def test_seeds_decide_and_threads_do_not() -> None:
    x = blobs(3000, 16, 30)
    first = kmeans(x, 40, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = kmeans(x, 40, seed=1)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    np.testing.assert_array_equal(first.assignments, again.assignments)
    assert not np.array_equal(first.centroids, kmeans(x, 40, seed=2).centroids)


def test_zero_iterations_assign_to_the_start() -> None:
    x = blobs(200, 4, 5)
    found = kmeans(x, 5, iterations=0, init=x[:5])
    np.testing.assert_array_equal(found.centroids, x[:5])
    np.testing.assert_array_equal(found.assignments, distances(x, x[:5]).argmin(1))


def test_one_cluster_is_the_mean_and_k_equal_n_is_every_point() -> None:
    x = blobs(50, 3, 4)
    np.testing.assert_allclose(kmeans(x, 1).centroids[0], x.mean(0), atol=1e-5)
    assert kmeans(x, 50).inertia == 0.0


def test_random_start_has_distinct_values() -> None:
    x = np.repeat(blobs(30, 4, 3), 100, axis=0)
    start = kmeans(x, 30, iterations=0).centroids
    assert len(np.unique(start, axis=0)) == 30


def test_k_means_plus_plus_finds_every_far_group() -> None:
    draws = np.random.default_rng(0)
    x = (np.repeat(np.arange(20) * 1000, 50)[:, None] + draws.standard_normal((1000, 2))).astype(
        np.float32
    )
    for seed in range(5):
        found = kmeans(x, 20, iterations=1, init="k-means++", seed=seed)
        assert (np.bincount(found.assignments) == 50).all()


def test_k_means_plus_plus_runs_out_of_distinct_rows() -> None:
    x = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0)
    assert kmeans(x, 4, init="k-means++").inertia == 0.0
    with pytest.raises(DataError, match="only 4"):
        kmeans(x, 5, init="k-means++")


def test_fixed_rows_stay_to_the_bit_and_join_in() -> None:
    x = blobs(1000, 6, 10)
    fixed = (x[:3] + 0.1).astype(np.float32)
    found = kmeans(x, 10, fixed=fixed)
    np.testing.assert_array_equal(found.centroids[:3], fixed)
    assert (np.bincount(found.assignments, minlength=10) > 0).all()
    assert len(found.empty_fixed) == 0


def test_a_fixed_row_that_wins_nothing_is_reported_and_not_moved() -> None:
    x = blobs(500, 6, 10)
    fixed = np.full((2, 6), 1e4, np.float32)
    fixed[0] = x[0]
    for empty in ("split", "relocate"):
        found = kmeans(x, 8, fixed=fixed, empty=empty)
        np.testing.assert_array_equal(found.centroids[:2], fixed)
        np.testing.assert_array_equal(found.empty_fixed, [1])


def test_all_rows_fixed_is_an_assignment() -> None:
    x = blobs(200, 4, 5)
    found = kmeans(x, 5, fixed=x[:5])
    np.testing.assert_array_equal(found.assignments, distances(x, x[:5]).argmin(1))


def test_spherical_centroids_have_unit_norm_and_win_by_inner_product() -> None:
    x = blobs(1000, 8, 10)
    fixed = x[:2]
    found = kmeans(x, 10, spherical=True, fixed=fixed)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    unit = fixed / np.linalg.norm(fixed, axis=1, keepdims=True)
    np.testing.assert_allclose(found.centroids[:2], unit, atol=1e-6)
    again = kmeans(x, 10, spherical=True, fixed=found.centroids[:2])
    np.testing.assert_array_equal(again.centroids[:2], found.centroids[:2])
    np.testing.assert_array_equal(found.assignments, (x @ found.centroids.T).argmax(1))


def test_weights_are_repetitions() -> None:
    x = blobs(300, 4, 5)
    times = np.random.default_rng(0).integers(1, 4, 300)
    weighted = kmeans(x, 5, init=x[:5], weights=times.astype(np.float32))
    repeated = kmeans(np.repeat(x, times, axis=0), 5, init=x[:5])
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)


def test_a_negative_or_missing_weight_is_an_error() -> None:
    x = blobs(10, 2, 2)
    with pytest.raises(DataError, match="weight 3"):
        kmeans(x, 2, weights=np.array([1, 1, 1, -1, 1, 1, 1, 1, 1, 1.0]))
    with pytest.raises(DataError, match="shape"):
        kmeans(x, 2, weights=np.ones(9))


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("empty", ["split", "relocate"])
def test_rows_of_weight_0_change_nothing(init: str, empty: str) -> None:
    x, far = blobs(60, 4, 5), 1000 + blobs(2000, 4, 3)
    every = np.concatenate([x, far])
    weights = np.r_[np.linspace(1, 2, 60), np.zeros(2000)]
    for seed in range(3):
        alone = kmeans(x, 9, init=init, empty=empty, weights=weights[:60], seed=seed)
        beside = kmeans(every, 9, init=init, empty=empty, weights=weights, seed=seed)
        assert np.bincount(beside.assignments[:60], minlength=9).min() > 0
        assert abs(beside.centroids).max() < 100
        assert beside.inertia < 2 * alone.inertia
        np.testing.assert_array_equal(
            beside.assignments, distances(every, beside.centroids).argmin(1)
        )


def test_a_start_draws_rows_by_their_weight() -> None:
    x, weights = np.arange(4, dtype=np.float32)[:, None], np.array([0, 1, 2, 5.0])
    for init in ("random", "k-means++"):
        starts = [
            kmeans(x, 1, iterations=0, init=init, weights=weights, seed=seed).centroids[0, 0]
            for seed in range(400)
        ]
        shares = np.bincount(np.array(starts, int), minlength=4) / 400
        np.testing.assert_allclose(shares, weights / 8, atol=0.08)
        assert shares[0] == 0


def test_equal_weights_change_no_bit() -> None:
    x = blobs(500, 4, 5)
    for init in ("random", "k-means++"):
        a, b = kmeans(x, 9, init=init), kmeans(x, 9, init=init, weights=np.full(500, 0.25))
        np.testing.assert_array_equal(a.centroids, b.centroids)
        assert b.inertia == a.inertia / 4


def test_a_cluster_of_rows_of_weight_0_is_empty_and_is_filled() -> None:
    x = np.array([[0], [1], [2], [50], [51]], np.float32)
    weights = np.array([1, 1, 1, 0, 0.0])
    result = kmeans(x, 3, iterations=0, init=x[[0, 1, 3]], weights=weights)
    assert sorted(result.centroids[:, 0]) == [0, 1, 2]
    assert result.distances.tolist() == [0, 0, 0, 48**2, 49**2]
    assert result.empty_repairs == 1
    small = kmeans(x, 2, init=x[:2], weights=np.array([1, 1, 1, 1, 0.0]), min_size=2)
    assert np.bincount(small.assignments[:4]).tolist() == [2, 2]


def test_weights_of_0_alone_and_too_few_rows_that_weigh_are_errors() -> None:
    x = blobs(10, 2, 2)
    with pytest.raises(DataError, match="all weights are 0"):
        kmeans(x, 2, weights=np.zeros(10))
    with pytest.raises(DataError, match="only 3 of a weight above 0"):
        kmeans(x, 4, weights=np.r_[np.ones(3), np.zeros(7)])


def test_only_free_clusters_need_points() -> None:
    x = blobs(60, 4, 5)
    result = kmeans(x[:10], 50, fixed=x[:50], iterations=0)
    assert result.assignments.tolist() == list(range(10))
    assert len(result.empty_fixed) == 40
    assert kmeans(x[:0], 5, fixed=x[:5]).assignments.shape == (0,)
    assert len(kmeans(x[50:53], 53, fixed=x[:50]).centroids) == 53
    with pytest.raises(DataError, match="2 clusters of at least 2 points beside 50 fixed ones"):
        kmeans(x[:3], 52, fixed=x[:50], min_size=2)


def test_labels_warm_start_is_the_means_of_the_old_clusters() -> None:
    x = blobs(900, 6, 9)
    old = kmeans(x, 9)
    labels = old.assignments.copy()
    labels[::50] = -1
    labels[labels == 8] = 7
    labels.flags.writeable = False
    warm = kmeans(x, 9, iterations=0, labels=labels)
    np.testing.assert_allclose(warm.centroids[3], x[labels == 3].mean(0), atol=1e-5)
    assert (np.bincount(warm.assignments, minlength=9) > 0).all()
    with pytest.raises(RecipeError, match="below k=5"):
        kmeans(x, 5, labels=labels)
    for wrong in (labels - 6, labels + 0.5, labels.astype(np.int64) + 2**32, labels[:-1], -7):
        with pytest.raises(RecipeError, match="900 integers below k=9"):
            kmeans(x, 9, labels=wrong)


def test_without_tolerance_it_stops_only_where_nothing_moves() -> None:
    x = blobs(3000, 4, 5)
    whole = kmeans(x, 30, iterations=500)
    assert whole.history[-1].moved == 0
    assert all(step.moved for step in whole.history[:-1])
    again = kmeans(x, 30, iterations=5, init=whole.centroids)
    np.testing.assert_array_equal(again.centroids, whole.centroids)


def test_tolerance_stops_early() -> None:
    x = blobs(3000, 4, 5)
    assert len(kmeans(x, 30, iterations=50, tol=1e-2).history) < 20 < len(kmeans(x, 30, 50).history)


def test_rows_that_are_not_finite_are_named() -> None:
    x = blobs(3000, 4, 5)
    x[[17, 2999]] = np.nan
    with pytest.raises(NumericalError, match="2 of 3000 feature rows are not finite: row 17, 2999"):
        kmeans(x, 5)


def test_distances_that_overflow_are_an_error() -> None:
    x = blobs(100, 4, 5)
    x[7, 3] = 1e30
    with pytest.raises(NumericalError, match="overflow"):
        kmeans(x, 5)


def test_too_few_points_are_an_error_with_the_fix() -> None:
    with pytest.raises(DataError, match="at most 3"):
        kmeans(blobs(3, 4, 2), 4)
    x = np.repeat(blobs(7, 4, 2), 10, axis=0)
    with pytest.raises(DataError, match=r"8 distinct .* only 7\. .* at most 7"):
        kmeans(x, 8)
    with pytest.raises(DataError, match="only 6"):
        kmeans(x, 8, fixed=x[:1])


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"empty": "ignore"},
        {"backend": "cuml"},
        {"init": "kmeans"},
        {"init": np.zeros((4, 4))},
        {"init": np.full((3, 4), np.nan)},
        {"fixed": np.zeros((4, 4))},
        {"min_size": 0},
        {"k": 2.0},
        {"k": "3"},
        {"k": True},
        {"tol": float("nan")},
        {"tol": -1.0},
        {"tol": "0.1"},
        {"seed": None},
        {"seed": -1},
        {"seed": 1.5},
        {"iterations": 2.5},
        {"device": "gpu"},
    ],
)
def test_an_argument_that_is_not_allowed_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        kmeans(blobs(50, 4, 2), **{"k": 3, **change})


def test_lists_and_numbers_of_numpy_are_taken_as_they_are_meant() -> None:
    x = blobs(50, 4, 2)
    plain = kmeans(x, 3, init=x[:3], fixed=x[:1], weights=np.ones(50))
    lists = kmeans(
        x.tolist(), np.int64(3), init=x[:3].tolist(), fixed=x[:1].tolist(), weights=[1.0] * 50
    )  # type: ignore[arg-type]
    np.testing.assert_array_equal(plain.assignments, lists.assignments)
    warm = kmeans(x.astype(np.longdouble), 3, labels=plain.assignments.tolist())  # type: ignore[arg-type]
    assert warm.assignments.shape == (50,)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((5, 2), complex),
        torch.ones(5, 2, dtype=torch.complex64),
        np.full((5, 2), None),
        np.ma.masked_less(np.eye(5), 1),
        torch.eye(5).to_sparse(),
        np.full((5, 2), "1"),
        [[1, 2], [3]],
        "rows",
        None,
        np.ones(5),
    ],
)
def test_what_is_no_array_of_real_numbers_is_an_error_that_says_so(x: object) -> None:
    with pytest.raises(DataError, match=r"^(x|features) "):
        kmeans(x, 2)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_an_error_with_the_fix() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ResourceError, match="device='cpu'"):
        kmeans(blobs(50, 4, 2), 3, device=missing)


def test_points_carry_the_rows_and_kmeans_says_how_to_read_them() -> None:
    x = blobs(400, 5, 4)
    whole = kmeans(x, 4, init=x[:4], backend="faiss", spherical=True)
    points = kmeans(ArrayPoints(x), 4, init=x[:4], backend="faiss", spherical=True)
    np.testing.assert_array_equal(whole.assignments, points.assignments)
    np.testing.assert_allclose(np.linalg.norm(points.centroids, axis=1), 1, atol=1e-6)


def test_small_numbers_beside_very_large_ones_keep_their_means() -> None:
    draws = np.random.default_rng(0)
    x = np.stack([np.repeat([0, 1.6e9], 2000), draws.uniform(0.2, 0.4, 4000)], 1)
    found = kmeans(x.astype(np.float32), 2)
    assert np.allclose(np.sort(found.centroids[:, 1]), 0.3, atol=0.01)
    tiny = draws.normal(1e-3, 1e-4, (3000, 2)).astype(np.float32)
    found = kmeans(np.concatenate([tiny, [[1e6, 1e6]]]).astype(np.float32), 2)
    nearest = found.centroids[np.abs(found.centroids).sum(1).argmin()]
    np.testing.assert_allclose(nearest, tiny.astype(np.float64).mean(0), rtol=1e-6)


def test_weights_of_very_different_size_still_weigh() -> None:
    x = np.array([[0], [1], [100], [103]], np.float32)
    found = kmeans(x, 2, weights=np.array([1, 1, 1e-12, 2e-12]), init=x[[0, 2]])
    np.testing.assert_allclose(found.centroids[:, 0], [0.5, 102], rtol=1e-6)


def test_a_fixed_centroid_may_give_its_last_point_to_an_empty_one() -> None:
    x = np.array([[0, 0], [0, 0], [10.1, 0]], np.float32)
    fixed = np.array([[0, 0], [10, 0]], np.float32)
    found = kmeans(x, 3, iterations=0, fixed=fixed, init=np.array([[99, 99]], np.float32))
    assert np.bincount(found.assignments, minlength=3).tolist() == [2, 0, 1]
    assert found.empty_fixed.tolist() == [1]


@pytest.mark.parametrize(
    "change", [lambda x: x[::-1], lambda x: x.astype(">f4"), lambda x: x.T.copy().T]
)
def test_arrays_of_any_layout_are_read(change: Callable[[np.ndarray], np.ndarray]) -> None:
    x = blobs(200, 5, 3)
    plain, other = kmeans(np.array(change(x), np.float32), 3), kmeans(change(x), 3)
    np.testing.assert_array_equal(plain.centroids, other.centroids)


def test_progress_names_every_pass_and_changes_nothing() -> None:
    x, seen = blobs(800, 6, 9), []
    watched = kmeans(x, 12, iterations=5, progress=seen.append)
    np.testing.assert_array_equal(watched.assignments, kmeans(x, 12, iterations=5).assignments)
    assert [one.pass_ for one in seen] == list(range(1, len(watched.history) + 2))
    assert [one.inertia for one in seen[:-1]] == [one.inertia for one in watched.history]
    assert [one.moved for one in seen[:-1]] == [one.moved for one in watched.history]
    assert seen[-1].pass_ == seen[-1].of
    assert seen[-1].inertia == pytest.approx(watched.inertia)
    assert seen[-1].eta == 0.0
    assert seen[0].of == 6
    assert seen[0].eta == pytest.approx(5 * seen[0].seconds)


def test_a_clustering_that_settles_early_ends_its_progress() -> None:
    seen: list[Progress] = []
    kmeans(np.eye(3, dtype=np.float32), 3, iterations=50, progress=seen.append)
    assert seen[-1].pass_ == seen[-1].of < 50
    assert seen[-1].moved == 0
    kmeans(np.eye(3, dtype=np.float32), 3, iterations=0, progress=seen.append)
    assert (seen[-1].pass_, seen[-1].of, seen[-1].moved) == (1, 1, 3)


def test_every_tile_is_a_sign_of_life() -> None:
    tiles: list[None] = []
    rows = np.random.default_rng(0).standard_normal((70_000, 32), dtype=np.float32)
    points = ArrayPoints(rows, threads=2, alive=lambda: tiles.append(None))
    kmeans(points, 40, iterations=3)
    assert len(tiles) > 4 * 3  # a scan and at least three passes, of several tiles


@pytest.mark.parametrize(("dim", "k"), [(32, 100), (256, 10_000), (768, 320_000)])
def test_a_tile_of_a_pass_with_bounds_takes_about_half_a_second_at_most(dim: int, k: int) -> None:
    rows = compiled_tile_rows(10**8, dim, k, threads=2)
    assert rows * dim * k <= max(MOST_COMPILED, 64 * dim * k)
