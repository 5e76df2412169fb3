"""The search on a GPU gives the CPU's labels, in Triton's interpreter, so without a GPU.

The interpreter must be asked for before Triton is imported: the checks run in forks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deepclust.clustering import fused
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.fused import FusedNearest, works_on
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.nearest import Nearest, squared_distances
from deepclust.clustering.points import unit_rows
from deepclust.clustering.search import SEARCHES
from tests.forks import in_fork
from tests.launches import launches


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def noise(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def whitened(n: int, dim: int) -> Tensor:
    """Unit rows of a whitened mixture of 50 Gaussians with unequal spreads."""
    centres = 3 * noise(50, dim, 1)
    rows = centres[torch.arange(n) % 50] + noise(n, dim, 2) * torch.linspace(0.1, 2, dim)
    rows = rows - rows.mean(0)
    return unit_rows(torch.linalg.svd(rows, full_matrices=False).U * n**0.5)


def large_blocks() -> None:
    """Fewer steps for the interpreter, which takes as long for a large block as for a small one."""
    from deepclust.clustering import fused_kernel

    fused_kernel.GUESS |= {"COLS": 512, "PART": 512}
    fused_kernel.DECIDE |= {"ROWS": 32, "COLS": 128}
    fused_kernel.PIECE = 128


def reference(rows: Tensor, centroids: Tensor) -> Tensor:
    """Float32 distances by difference to every centroid, the first of the smallest."""
    ids = torch.arange(len(centroids))
    columns = [squared_distances(rows, centroids, j.expand(len(rows))) for j in ids]
    return torch.from_numpy(torch.stack(columns, 1).numpy().argmin(1))


def agrees(rows: Tensor, centroids: Tensor) -> tuple[float, float]:
    """Compare, and return the shares of rows that the CPU decides: pairs, and several."""
    search = FusedNearest(centroids)
    torch.testing.assert_close(search(rows), reference(rows, centroids))
    torch.testing.assert_close(search(rows), Nearest(centroids)(rows))
    rivals = search.guess(rows)[1]
    return float((rivals >= 0).float().mean()), float((rivals == fused.SEVERAL).float().mean())


def check_whitened() -> list[tuple[float, float]]:
    large_blocks()
    shares = []
    for k, dim in ((4, 256), (20, 256), (260, 256), (1000, 256), (3332, 64)):
        base = whitened(max(2 * k, 1000), dim)
        near = base[:k] + 0.02 * noise(k, dim, 3)
        shares += [agrees(rows, near) for rows in (base[-150:], base[-150:].half().float())]
    return shares


def test_whitened_rows_get_the_exact_labels_for_few_and_many_clusters() -> None:
    pairs, several = zip(*in_fork(check_whitened), strict=True)
    assert max(pairs) <= 0.02  # the rows that wait for the CPU
    assert max(several) == 0


def check_ties() -> tuple[float, float]:
    large_blocks()
    base = unit_rows(noise(40, 64))
    close, closer = base * (1 + 2.0**-12), base * (1 + 2.0**-22)
    centroids = torch.cat([base, close, base, closer])
    shares = agrees(torch.cat([base, close, closer, unit_rows(noise(50, 64, 1))]), centroids)
    grid = torch.randint(0, 3, (99, 5), generator=torch.Generator().manual_seed(0)).float()
    agrees(grid, grid[:70])  # many rows are as far from one centroid as from another
    agrees(grid[:, :1], grid[:40, :1])
    agrees(grid, grid[:1].expand(30, 5))  # all centroids are one
    return shares


def test_ties_duplicates_and_near_ties_go_where_the_cpu_sends_them() -> None:
    pairs, _ = in_fork(check_ties)
    assert pairs > 0.1  # which says that the CPU was asked


def check_hard_numbers() -> None:
    large_blocks()
    plane = noise(200, 2) @ noise(2, 48, 1)
    agrees(plane, plane[:30])  # rank 2
    agrees(noise(100, 24), torch.zeros(1, 24))
    agrees(noise(100, 24), torch.zeros(3, 24))
    for spread in (1e-22, 1e-20, 1e-12, 1e-3, 1e3, 1e12):
        for offset in (0.0, 3.0):
            agrees(*(spread * (noise(m, 20, m) + offset) for m in (150, 33)))
    agrees(noise(100, 17) + 1e4, noise(9, 17, 1) + 1e4)  # float32 has few digits left
    far = torch.cat([noise(60, 32), 1e6 * noise(20, 32, 1), 1e-6 * noise(20, 32, 2)])
    agrees(far, 1e-6 * noise(40, 32, 3))
    agrees(far, torch.cat([noise(40, 32, 4), 1e5 * noise(2, 32, 5)]))
    found = FusedNearest(noise(5, 8))(1e30 * noise(10, 8, 1))
    assert set(found.tolist()) <= set(range(5))


def test_degenerate_rows_and_all_scales_of_numbers_get_the_exact_labels() -> None:
    in_fork(check_hard_numbers)


def check_widths() -> None:
    agrees(noise(40, 33), noise(65, 33, 1))  # in the blocks of a GPU
    large_blocks()
    for dim, k in ((1, 513), (3, 1), (16, 2), (17, 129), (260, 63)):
        agrees(noise(131, dim, k), noise(k, dim))
    assert FusedNearest(noise(3, 4))(noise(0, 4)).shape == (0,)


def test_widths_and_numbers_of_centroids_that_fill_no_block() -> None:
    in_fork(check_widths)


def check_kmeans(folder: Path) -> None:
    large_blocks()
    rows = whitened(400, 24).half()
    rows[100:140] = rows[:40]
    np.save(folder / "rows.npy", rows.numpy())
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    weights = np.random.default_rng(0).uniform(0, 2, 400)
    fixed = rows[:3].float().numpy()
    cases = [{"weights": weights}, {"fixed": fixed, "spherical": True}]
    for x, options in [*((rows.numpy(), options) for options in cases), (mapped, {})]:
        expected = kmeans(x, 20, iterations=4, seed=1, **options)
        SEARCHES["auto"] = lambda centroids, half=False: FusedNearest(centroids)
        got = kmeans(x, 20, iterations=4, seed=1, **options)
        SEARCHES["auto"] = lambda centroids, half=False: Nearest(centroids)
        np.testing.assert_array_equal(got.assignments, expected.assignments)
        np.testing.assert_array_equal(got.centroids, expected.centroids)


def test_a_kmeans_on_it_has_the_cpus_bits(tmp_path: Path) -> None:
    in_fork(check_kmeans, tmp_path)


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU."""

    names = ("cpu", "item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.names:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def count_waits(room: int | None = None) -> list[str]:
    if room is not None:
        fused.SHARE, fused.LEAST = 1 << 30, room
    rows = torch.cat([whitened(400, 24), torch.ones(3, 24)])
    centroids = torch.cat([rows[:9], rows[:1] + 1e-8, torch.ones(1, 24), -torch.ones(1, 24)])
    points = ArrayPoints(rows)
    points.configure(spherical=False, backend="torch")
    search = FusedNearest(centroids)
    late, waits = fused.Late(search, len(rows)), Waits()
    settle = search.settle
    ids = torch.zeros(len(rows), dtype=torch.int32)

    def on_the_host(*args: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return settle(*args)

    search.settle = on_the_host
    with waits:
        for start in range(0, len(rows), 100):
            ids[start : start + 100] = late.guess(start, rows[start : start + 100])
        late.settle(ids, points._gather_here)
    return waits.seen


def test_a_pass_waits_for_the_device_once_or_twice_where_many_rows_are_open() -> None:
    first, *rest = in_fork(count_waits)
    assert first == "cpu"
    assert rest.count("cpu") == 0  # what follows is of tensors on the host
    assert in_fork(count_waits, 2).count("cpu") == 2


def check_launches() -> None:
    from deepclust.clustering import fused_kernel

    with launches(fused_kernel, "_guess", "_decide") as seen:
        FusedNearest(noise(3, 4))(noise(2, 4))
    assert seen == {"_guess": [(2, 16)], "_decide": [(2, 16)]}


def test_a_kernel_is_launched_on_the_card_of_its_rows() -> None:
    in_fork(check_launches)


def test_without_a_gpu_the_search_is_the_cpus() -> None:
    assert not works_on(torch.device("cpu"))
    assert isinstance(SEARCHES["auto"](torch.eye(3)), Nearest)
