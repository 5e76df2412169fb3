"""PCA-whitening: exact against float64, streaming, and defined where FAISS gives NaN."""

from __future__ import annotations

import errno
from pathlib import Path

import faiss
import numpy as np
import pytest
import threadpoolctl
import torch

from deepclust.clustering.moments import BLOCK, Moments
from deepclust.clustering.whiten import CLAMP, Whitening, solve
from deepclust.errors import DataError, DiskError, NumericalError, RecipeError
from tests.pretended_device import pretended


def features(n: int, dim: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    """Rows with a spectrum that falls by 0.9 per direction, in a random basis."""
    draws = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(draws.standard_normal((dim, dim)))
    scales = 0.9 ** np.arange(dim)
    return (draws.standard_normal((n, dim)) * scales @ basis + mean).astype(np.float32)


def reference(x: np.ndarray, dim: int) -> np.ndarray:
    """Whitened unit rows, all in float64, eigenvectors' signs fixed."""
    wide = x.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(wide.T, bias=True))
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dim)])
    y = (wide - wide.mean(0)) @ (vectors / np.sqrt(np.maximum(values, CLAMP * values[0])))
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def moments_of(x: np.ndarray) -> Moments:
    return Moments.zero(torch.from_numpy(x[0])).add(torch.from_numpy(x))


def test_projection_equals_a_float64_reference() -> None:
    x = features(3000, 48)
    y = Whitening.fit(x, dim=16)(x)
    assert y.shape == (3000, 16)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, reference(x, 16), atol=2e-4)


def test_whitened_rows_have_unit_covariance_before_they_are_normalised() -> None:
    x = features(4000, 32)
    w = Whitening.fit(x, dim=12)
    y = (x - w.mean) @ w.matrix
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(12), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(w(x), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_agrees_with_faiss_up_to_sign_and_scale(offset: float) -> None:
    x = features(3000, 32, mean=offset)
    peer = faiss.PCAMatrix(32, 8, -0.5)
    peer.train(x)
    theirs = peer.apply(x)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    ours = Whitening.fit(x, dim=8)(x)
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs * signs, atol=5e-3)


def test_a_mean_a_thousand_times_the_deviation_breaks_faiss_and_not_us() -> None:
    x = features(3000, 32, mean=1e3)
    truth = reference(x, 8)
    peer = faiss.PCAMatrix(32, 8, -0.5)
    peer.train(x)
    theirs = np.nan_to_num(peer.apply(x))
    theirs /= np.maximum(np.linalg.norm(theirs, axis=1, keepdims=True), 1e-12)
    cosine = np.abs((truth * theirs * np.sign((truth * theirs).sum(0))).sum(1)).mean()
    assert cosine < 0.9
    np.testing.assert_allclose(Whitening.fit(x, dim=8)(x), truth, atol=5e-3)


def test_dead_dimensions_give_zeros_and_a_warning_never_nan() -> None:
    x = np.zeros((500, 64), np.float32)
    x[:, :10] = features(500, 10)
    x[:, 20] = 7.0
    w = Whitening.fit(x, dim=32)
    y = w(x)
    assert w.rank == 10
    assert "rank 10" in str(w.warning)
    assert np.isfinite(y).all()
    assert not y[:, 10:].any()


def test_fewer_rows_than_dimensions() -> None:
    x = features(20, 64)
    w = Whitening.fit(x, dim=32)
    assert w.rank <= 19
    assert w(x).shape == (20, 32)
    np.testing.assert_allclose(w(x)[:, :10], _renormalised(x, w.rank)[:, :10], atol=1e-3)


def _renormalised(x: np.ndarray, rank: int) -> np.ndarray:
    y = reference(x, 32)
    y[:, rank:] = 0
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_more_dimensions_asked_for_than_there_are_pads_with_zeros() -> None:
    x = features(300, 6)
    w = Whitening.fit(x, dim=10)
    assert (w.rank, w.matrix.shape) == (6, (6, 10))
    assert not w(x)[:, 6:].any()


def test_full_rank_has_no_warning() -> None:
    assert Whitening.fit(features(300, 6), dim=6).warning is None


@pytest.mark.parametrize("value", [0.0, 0.1, 300.7])
def test_constant_features_are_an_error_that_says_collapsed(value: float) -> None:
    with pytest.raises(NumericalError, match=r"constant.*collapsed"):
        Whitening.fit(np.full((100, 8), value, np.float32))


def test_one_row_is_constant_and_no_row_is_an_error() -> None:
    with pytest.raises(NumericalError, match="constant"):
        Whitening.fit(np.ones((1, 4), np.float32))
    with pytest.raises(DataError, match="0 rows"):
        Whitening.fit(np.ones((0, 4), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    x = features(5000, 4)
    x[4321, 2] = bad
    with pytest.raises(NumericalError, match=r"1 of 5000 .* row 4321\b"):
        Whitening.fit(x)


def test_moments_that_are_not_finite_are_an_error() -> None:
    x = features(50, 4)
    x[3, 1] = np.nan
    with pytest.raises(NumericalError, match=r"not finite in 1 dimensions, first \[1\]"):
        solve(moments_of(x), 2)


def test_units_give_the_result_of_the_whole() -> None:
    x = features(4 * BLOCK, 24, mean=1.0)
    whole = solve(moments_of(x), 8)
    units = [Moments.zero(torch.from_numpy(x[0])).add(torch.from_numpy(p)) for p in np.split(x, 4)]
    total = Moments.zero(torch.from_numpy(x[0]))
    for unit in units:
        total.merge(unit)
    np.testing.assert_allclose(solve(total, 8).matrix, whole.matrix, rtol=0, atol=1e-10)
    np.testing.assert_allclose(total.covariance(), moments_of(x).covariance(), rtol=0, atol=1e-10)


def test_blocks_cut_elsewhere_differ_by_float32_rounding_only() -> None:
    x = features(5000, 24, mean=1.0)
    odd = Moments.zero(torch.from_numpy(x[0]))
    for piece in np.split(x, [7, 1000, 1001, 3333]):
        odd.add(torch.from_numpy(piece))
    np.testing.assert_allclose(odd.covariance(), moments_of(x).covariance(), rtol=0, atol=1e-6)


def test_merging_is_associative_and_commutes() -> None:
    a, b, c = (features(700, 12, seed=seed) for seed in range(3))
    pivot = torch.from_numpy(a[0])

    def part(rows: np.ndarray) -> Moments:
        return Moments.zero(pivot).add(torch.from_numpy(rows))

    left = part(a).merge(part(b)).merge(part(c))
    right = part(c).merge(part(b).merge(part(a)))
    assert left.count == right.count == 2100
    torch.testing.assert_close(left.outer, right.outer, rtol=1e-14, atol=0)
    torch.testing.assert_close(left.sum, right.sum, rtol=1e-13, atol=1e-12)


def test_a_device_solves_for_the_same_directions() -> None:
    moments = moments_of(features(3000, 48))
    here = solve(moments, 16)
    with pretended() as log:
        there = solve(moments, 16, device=torch.device("cuda", 0))
    assert ("_linalg_eigh", torch.float64) in log.types
    np.testing.assert_allclose(there.matrix, here.matrix, rtol=0, atol=1e-5)
    np.testing.assert_allclose(there.eigenvalues, here.eigenvalues, rtol=1e-6)
    assert there.rank == here.rank == 16


def test_moments_about_another_pivot_cannot_be_merged() -> None:
    with pytest.raises(AssertionError, match="two pivots"):
        Moments.zero(torch.zeros(3)).merge(Moments.zero(torch.ones(3)))


def test_memory_map_half_precision_and_torch_give_what_the_array_gives(tmp_path: Path) -> None:
    x = features(BLOCK + 100, 16).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    w = Whitening.fit(x.astype(np.float32), dim=8)
    again = Whitening.fit(mapped, dim=8)
    np.testing.assert_array_equal(w.matrix, again.matrix)
    np.testing.assert_array_equal(w(x), again(mapped))
    np.testing.assert_array_equal(w(torch.from_numpy(x)).numpy(), w(x))


def test_a_row_at_the_mean_stays_zero() -> None:
    x = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], np.float32)
    y = Whitening.fit(x, dim=2)(x)
    assert not y[4].any()
    assert np.isfinite(y).all()


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    x = features(200, 6)
    w = Whitening.fit(x, dim=9)
    w.save(tmp_path / "w.safetensors")
    again = Whitening.load(tmp_path / "w.safetensors")
    assert again.rank == w.rank
    np.testing.assert_array_equal(again(x), w(x))


def test_a_full_disk_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match=r"w\.safetensors.*: No space left"):
        Whitening.fit(features(200, 6), dim=3).save(tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_signs_are_fixed_so_that_runs_agree() -> None:
    matrix = Whitening.fit(features(500, 10), dim=5).matrix
    assert (matrix[np.abs(matrix).argmax(0), np.arange(5)] > 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_the_environment_change_no_bit(threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((700, 600)).astype(np.float32)
    x = x @ np.random.default_rng(1).standard_normal((600, 600)).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for outside in (1, 2, 4):
            with threadpoolctl.threadpool_limits(outside, "blas"):
                results.append(Whitening.fit(x, 128).matrix)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_what_cannot_be_whitened_is_named() -> None:
    x = np.random.default_rng(0).standard_normal((50, 4))
    for dim in (0, -1, 2.0, "2", None):
        with pytest.raises(RecipeError, match="dim="):
            Whitening.fit(x, dim)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="fitted on 4 columns, and these rows have 3"):
        Whitening.fit(x, 2)(x[:, :3])
    with pytest.raises(DataError, match="not real numbers"):
        Whitening.fit(x + 1j, 2)
    lists = Whitening.fit(x.tolist(), 2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(lists.matrix, Whitening.fit(x, 2).matrix)
