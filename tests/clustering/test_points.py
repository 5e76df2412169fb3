"""Points: one pass is the same from memory, a memory map or a view, and does not lose counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.clustering import residence, tile_sizes
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.nearest import first_of_equals
from deepclust.clustering.points import unit_rows
from deepclust.clustering.probe import probe_backend
from deepclust.clustering.residence import is_on
from deepclust.clustering.search import SEARCHES, gpu_search
from deepclust.errors import DataError, NumericalError, ResourceError
from tests.pretended_device import pretended


def noise(n: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, dim)).astype(np.float32)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_pass_equals_a_slow_reference(backend: str) -> None:
    x, c = noise(1000), noise(7)
    found = ArrayPoints(x, backend=backend).assign_to(torch.from_numpy(c))
    table = ((x.astype(np.float64)[:, None] - c) ** 2).sum(2)
    labels = table.argmin(1)
    np.testing.assert_array_equal(found.cluster_ids, labels)
    np.testing.assert_allclose(found.distances, table.min(1), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=7))
    sums = np.stack([x[labels == j].astype(np.float64).sum(0) for j in range(7)])
    np.testing.assert_allclose(found.sums, sums, rtol=1e-12, atol=1e-12)
    assert found.inertia == pytest.approx(table.min(1).sum(), rel=1e-7)


def test_memory_map_view_and_memory_agree(tmp_path: Path) -> None:
    x = noise(3000).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = ArrayPoints(np.load(tmp_path / "x.npy", mmap_mode="r"))
    c = torch.from_numpy(noise(5))
    ids = np.random.default_rng(1).permutation(3000)[:500]
    for points in (mapped, ArrayPoints(torch.from_numpy(x))):
        whole, part = points.assign_to(c), points.select(ids).assign_to(c)
        torch.testing.assert_close(part.cluster_ids, whole.cluster_ids[ids])
        np.testing.assert_array_equal(whole.sums, ArrayPoints(x).assign_to(c).sums)
        np.testing.assert_array_equal(points.select(ids).gather(torch.tensor([3])), x[ids[[3]]])
    np.testing.assert_array_equal(mapped.select(ids).select(ids[:0]).n, 0)


def test_sums_of_half_precision_rows_are_exact_in_any_order() -> None:
    x = (noise(4000) / 3).astype(np.float16)
    c = torch.from_numpy(noise(3))
    shuffled = ArrayPoints(x[np.random.default_rng(0).permutation(4000)]).assign_to(c)
    np.testing.assert_array_equal(ArrayPoints(x).assign_to(c).sums, shuffled.sums)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_pass_after_another_has_the_same_bits_from_the_rows_that_moved(weighted: bool) -> None:
    weights = np.random.default_rng(2).uniform(0, 2, 2000) if weighted else None
    points = ArrayPoints(noise(2000), weights=weights)
    first, second = torch.from_numpy(noise(9)), torch.from_numpy(noise(9) + 0.1)
    before = points.assign_to(first, distances=False)
    updated = points.assign_to(second, before)
    fresh = ArrayPoints(noise(2000), weights=weights).assign_to(second)
    for one, other in zip(vars(updated).values(), vars(fresh).values(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_the_inertia_without_distances_is_that_of_the_sums() -> None:
    for offset in (0, 30):
        points, c = ArrayPoints(noise(3000) + offset), torch.from_numpy(noise(9) + offset)
        exact, quick = points.assign_to(c), points.assign_to(c, distances=False)
        assert quick.inertia == pytest.approx(exact.inertia, rel=1e-6)
        assert len(quick.distances) == 0


def test_ties_go_to_the_lowest_id() -> None:
    c = torch.from_numpy(noise(6)[[0, 1, 1, 2, 0, 0]])
    for backend in ("torch", "faiss"):
        labels = ArrayPoints(noise(500), backend=backend).assign_to(c).cluster_ids
        assert set(labels.tolist()) <= {0, 1, 3}


def test_rows_far_from_the_origin_find_their_centroid() -> None:
    x = noise(2000) + np.float32(5e3)
    c = x[:20].copy()
    truth = ((x.astype(np.float64)[:, None] - c) ** 2).sum(2)
    labels = ArrayPoints(x).assign_to(torch.from_numpy(c)).cluster_ids.numpy()
    excess = truth[np.arange(2000), labels] - truth.min(1)
    assert excess.max() < 0.05
    assert (labels == truth.argmin(1)).mean() > 0.99


def test_more_than_2_to_the_24_rows_in_one_cluster_are_counted() -> None:
    n = 2**24 + 3
    x = torch.full((1, 1), 0.3).expand(n, 1)
    found = ArrayPoints(x).assign_to(torch.tensor([[0.0], [9.0]]))
    assert found.counts.tolist() == [n, 0]
    assert float(found.sums[0, 0]) / n == pytest.approx(float(x[0, 0]), rel=1e-12)
    assert found.inertia == pytest.approx(n * 0.09, rel=1e-6)


def test_farthest_members_are_found_and_empty_clusters_have_none() -> None:
    x, c = noise(400), noise(5)
    c[3] = 1e4
    found = ArrayPoints(x).assign_to(torch.from_numpy(c))
    ids, far = ArrayPoints(x).find_farthest(found)
    assert ids[3] == -1
    for j in (0, 1, 2, 4):
        own = np.flatnonzero(found.cluster_ids.numpy() == j)
        assert ids[j] == own[found.distances.numpy()[own].argmax()]
        assert far[j] == found.distances[ids[j]]


def test_farthest_of_equals_is_the_lowest_id() -> None:
    points = ArrayPoints(np.array([[0.0], [2], [2], [-2]], np.float32))
    ids, _ = points.find_farthest(points.assign_to(torch.zeros(1, 1)))
    assert ids.tolist() == [1]


def test_many_rows_that_are_not_finite_are_counted_and_the_first_named() -> None:
    x = noise(5000)
    x[100:110] = np.nan
    x[4000] = -np.inf
    with pytest.raises(NumericalError, match=r"11 of 5000 .* row 100, 101, 102, 103, 104, \.\.\."):
        ArrayPoints(x).check_finite()
    ArrayPoints(x).select(np.arange(100)).check_finite()


def test_features_must_be_a_table() -> None:
    with pytest.raises(DataError, match=r"\(5,\)"):
        ArrayPoints(np.zeros(5))


def test_unit_rows_leave_zero_rows_zero() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_unit_points_are_read_as_unit_rows_in_a_pass() -> None:
    x, c = noise(300), torch.nn.functional.normalize(torch.from_numpy(noise(4)), dim=1)
    found = ArrayPoints(x, spherical=True).assign_to(c)
    again = ArrayPoints(unit_rows(torch.from_numpy(x))).assign_to(c)
    torch.testing.assert_close(found.cluster_ids, again.cluster_ids)
    torch.testing.assert_close(found.distances, again.distances)


def test_first_of_equals_is_the_lowest_id_of_each_value() -> None:
    c = torch.from_numpy(noise(40)[np.random.default_rng(0).integers(0, 40, 500)])
    expected = [int((c == row).all(1).nonzero()[0]) for row in c]
    assert first_of_equals(c).tolist() == expected
    assert first_of_equals(torch.tensor([[0.0], [-0.0], [1.0]])).tolist() == [0, 0, 2]


def test_a_backend_is_tried_before_it_is_used_and_the_fallback_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert probe_backend("faiss", cpu) == ("faiss", cpu, [])

    def no_kernel(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setitem(SEARCHES, "faiss", no_kernel)
    backend, device, notes = probe_backend("faiss", cpu)
    assert (backend, device) == ("torch", cpu)
    assert "cluster.backend=faiss does not work on cpu: no kernel image" in notes[0]
    monkeypatch.setitem(SEARCHES, "torch", no_kernel)
    with pytest.raises(ResourceError, match="no kernel image"):
        probe_backend("faiss", cpu)


def test_faiss_for_rows_on_a_gpu_says_that_it_searches_on_the_cpu() -> None:
    with pretended():
        name, device, notes = probe_backend("faiss", torch.device("cuda", 0))
    assert (name, device.type) == ("faiss", "cuda")
    assert notes == ["cluster.backend=faiss searches on the CPU, and copies every row from cuda:0"]


@pytest.mark.parametrize("backend", ["torch", "auto", "faiss"])
def test_a_gpu_that_is_named_and_does_not_work_is_an_error_and_auto_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    gpu, eye = torch.device("cuda", 3), torch.eye

    def without_kernels(n: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            raise RuntimeError("no kernel image is available\nand more lines")
        return eye(n, device=device)

    monkeypatch.setattr(torch, "eye", without_kernels)
    name, device, notes = probe_backend(backend, gpu)
    assert (name, device.type) == ("torch", "cpu")
    assert notes[0].endswith("does not work on cuda:3: no kernel image is available")
    with pytest.raises(ResourceError, match=r"no kernel image.*or the device cpu$"):
        probe_backend(backend, gpu, named=True)


def test_a_gpus_search_finds_the_nearest_too() -> None:
    rows, centroids = torch.from_numpy(noise(400)), torch.from_numpy(noise(9))[[0, 1, 1, 2, 3]]
    found = gpu_search(centroids, half=False)(rows)
    np.testing.assert_array_equal(found, ArrayPoints(rows).assign_to(centroids).cluster_ids)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_gpus_search_in_half_precision_finds_the_nearest_at_any_scale(scale: float) -> None:
    rows, centroids = scale * torch.from_numpy(noise(400)), scale * torch.from_numpy(noise(9))
    expected = ArrayPoints(rows).assign_to(centroids).cluster_ids
    with pretended() as log, log.within("search"):
        found = gpu_search(centroids.to("cuda"), half=True)(rows.to("cuda")).cpu()
    assert log.waits.total() == 3  # the copies that this test makes
    assert (found != expected).sum() <= 2  # near-ties


def test_a_view_of_rows_on_a_gpu_is_read_without_a_wait_and_has_the_rows_bits() -> None:
    rows, ids = noise(300), np.arange(0, 300, 3)
    expected = ArrayPoints(rows[ids]).configure(spherical=True, backend="torch")
    with pretended() as log:
        view = ArrayPoints(torch.from_numpy(rows).to("cuda")).select(ids)
        view = view.configure(spherical=True, backend="torch")
        for start in (0, 50):
            with log.within("pass"):
                tile = view.read_tile(start, 50)
            assert torch.equal(tile.cpu(), expected.read_tile(start, 50))
    assert log.count("pass") == 0


def test_rows_for_a_device_are_copied_in_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(residence, "MAX_TILE_ROWS", 64)
    np.save(tmp_path / "x.npy", noise(500).astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    copy = residence.copied(mapped, torch.device("cpu"))
    assert copy.dtype == torch.float16
    np.testing.assert_array_equal(copy, mapped)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_tiles_that_are_sent_to_a_gpu_one_by_one_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[np.generic]
) -> None:
    x, c = noise(1000).astype(kind), torch.from_numpy(noise(5))
    np.save(tmp_path / "x.npy", x)
    mapped, ids = np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(0, 1000, 3)
    monkeypatch.setattr(tile_sizes, "MAX_TILE_ROWS", 64)
    told = []
    with pretended() as log:
        for there, fits in ((x, True), (mapped, False), (torch.from_numpy(x), False)):
            monkeypatch.setitem(residence.MEMORY, "cuda", lambda device, n=fits: 2**30 * n)
            points = ArrayPoints(there, device="cuda")
            assert is_on(points.rows, points.device) == fits
            points.check_finite()
            before = log.count("other"), log.calls["earlier work"]
            whole = points.assign_to(c.to("cuda"))
            waits = log.count("other") - before[0], log.calls["earlier work"] - before[1]
            part = points.select(ids).assign_to(c.to("cuda"))
            told.append((waits, [a.cpu() for a in (whole.cluster_ids, whole.sums, part.sums)]))
    (resident, labels), *streamed = told
    tiles = -(-1000 // 64)
    assert resident[1] == 0
    for waits, others in streamed:
        assert waits == (resident[0], tiles)  # each is for the tile before the last one
        assert all(torch.equal(a, b) for a, b in zip(labels, others, strict=True))
