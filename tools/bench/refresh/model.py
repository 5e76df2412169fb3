"""Arithmetic of a refresh: FLOPs and bytes of each stage by formula, and time on named GPUs.

A stage takes the longest of: FLOPs / (peak x efficiency); bytes of device memory / (bandwidth x
efficiency); launches x 6 us; bytes through the host / rate. All-reduces are added. Nothing is
fitted; efficiencies are assumptions, counts are of the code as it is. Extraction's forward pass,
disks and stragglers are not in it, and super-clusters are taken to be equally large. Scores that
do not stay in a GPU's L2 cache are written and read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stages import BATCH

from deepclust.clustering.moments import PANELS
from deepclust.clustering.tile_sizes import MAX_TILE_ROWS, TILE
from deepclust.stages.extract import LARGEST_CHUNK

HALF, SINGLE, BANDWIDTH = 0.6, 0.75, 0.8  # shares of a GPU's peaks that we assume
LAUNCH_S = 6e-6  # of one operation from Python
TILE_OPS = 25  # of a tile of k-means on a GPU, counted by a TorchDispatchMode
BATCH_OPS = 2 * PANELS + 4  # of a batch of moments
GATHER = 4e9  # bytes/s: rows that do not fit are copied by one thread of a rank, tile by tile
HOST_FLOPS, HOST_BYTES = 1e12, 1e11  # of the CPU that solves for eigenvectors, in float64
L2 = 40e6  # bytes of the smallest of these GPUs' caches
RESIDENT = 0.8  # of free device memory, `arrays._resident`


@dataclass(frozen=True)
class Gpu:
    """Public peaks, dense; `link` is what one GPU has to the others across nodes."""

    name: str
    half: float  # FLOP/s, float16 with float32 sums
    single: float  # FLOP/s, float32 without TF32
    memory: float  # bytes/s
    capacity: float  # bytes
    link: float  # bytes/s
    pcie: float  # bytes/s


GPUS = (
    Gpu("A100 80GB", 312e12, 19.5e12, 2.0e12, 80e9, 25e9, 32e9),
    Gpu("H100 SXM", 989e12, 67e12, 3.35e12, 80e9, 50e9, 64e9),
    Gpu("H200", 989e12, 67e12, 4.8e12, 141e9, 50e9, 64e9),
)


@dataclass(frozen=True)
class Size:
    """n rows of D, whitened to d; k clusters in m super-clusters."""

    n: int
    k: int
    m: int
    D: int
    d: int
    iterations: int

    @property
    def each(self) -> int:
        """Clusters in a super-cluster."""
        return self.k // self.m

    @property
    def passes(self) -> int:
        """Assignments: one an iteration and the last one."""
        return self.iterations + 1


YFCC = Size(96_000_000, 320_000, 4, 4096, 256, 10)
SIZES = (YFCC, replace(YFCC, d=4096))


LEGEND = (
    f"Longest of: F FLOPs at {HALF:.0%} of the float16 peak (k-means) or {SINGLE:.0%} of the "
    f"float32 peak; B device memory at {BANDWIDTH:.0%} of its bandwidth; L launches, "
    f"{LAUNCH_S * 1e6:.0f} us each and {TILE_OPS} a tile of k-means; H bytes from the host, by "
    f"PCIe, or by one thread of a rank at {GATHER / 1e9:.0f} GB/s where n x d x 2 bytes are over "
    f"{RESIDENT:.0%} of a GPU. All-reduces at {BANDWIDTH:.0%} of 25 (A100) or 50 GB/s a GPU are "
    "added. With more ranks than inner jobs all ranks work on each job, one after the other. "
    "The eigenvectors are the host's, in float64."
)


def flops(size: Size) -> dict[str, float]:
    """FLOPs of each stage. Panels of the covariance cross the diagonal: 9/8 of the half."""
    n, D, d = size.n, size.D, size.d
    return {
        "moments": n * D**2 * (PANELS + 1) / PANELS,
        "eigenvectors": 4 / 3 * D**3 + 2 * D**2 * d,  # to tridiagonal, and vectors back
        "projection": 2 * n * D * d,
        "level one": 2 * n * size.m * d * size.passes,
        "level two": 2 * n * size.each * d * size.passes,
    }


@dataclass(frozen=True)
class Cost:
    """Seconds that each limit alone would take, and of all-reduces."""

    limits: dict[str, float]
    reduce: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest limit, and the all-reduces after it."""
        return max(self.limits.values()) + self.reduce

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.limits, key=self.limits.__getitem__)


def costs(size: Size, gpu: Gpu, ranks: int) -> dict[str, Cost]:
    """Each stage on `ranks` GPUs."""
    n, D, d, m = size.n / ranks, size.D, size.d, size.m
    work, bandwidth = flops(size), BANDWIDTH * gpu.memory
    batches, outer = n / BATCH, (PANELS + 1) / PANELS / 2 * D**2
    everyone = reduced(13 * size.n + 4 * size.k * d, gpu, ranks)  # labels twice, distances, marks
    share = 1 / ranks if ranks > m else -(-m // ranks) / m  # of all rows, the busiest rank's
    bins = m * reduced(16 * size.each * d * size.passes, gpu, ranks) if ranks > m else 0
    inner = kmeans(size, gpu, share * size.n, size.each, bins)
    return {
        "moments": Cost({
            "F": work["moments"] / ranks / (SINGLE * gpu.single),
            "B": (batches * outer * 24 + n * D * 12) / bandwidth,
            "L": batches * BATCH_OPS * LAUNCH_S,
        }),
        "eigenvectors": Cost({
            "F": work["eigenvectors"] / HOST_FLOPS, "B": 8 * D**3 / 6 / HOST_BYTES,
        }),
        "projection": Cost({
            "F": work["projection"] / ranks / (SINGLE * gpu.single),
            "B": n * (26 * D + 20 * d) / bandwidth,
            "H": n * 2 * (D + d) / (BANDWIDTH * gpu.pcie),
        }),
        "level one": kmeans(size, gpu, n, m, reduced(16 * m * d * size.passes, gpu, ranks)),
        "level two": replace(inner, reduce=inner.reduce + everyone),
        "products of level two": Cost({"F": work["level two"] / ranks / (HALF * gpu.half)}),
    }  # fmt: skip


def kmeans(size: Size, gpu: Gpu, rows: float, k: int, bins: float) -> Cost:
    """Lloyd on one rank's rows: every tile reads all centroids, and each row is copied about."""
    d, passes = size.d, size.passes
    tiles = rows / tile_rows(k, d)
    scores = 8 * rows * k if 4 * tile_rows(k, d) * k > L2 else 0
    limits = {
        "F": 2 * rows * k * d * passes / (HALF * gpu.half),
        "B": (18 * d * rows + tiles * 2 * k * d + scores) * passes / (BANDWIDTH * gpu.memory),
        "L": tiles * TILE_OPS * passes * LAUNCH_S,
    }
    if not resident(size, gpu):
        limits["H"] = 2 * d * rows * (passes + 1) / GATHER  # one more, for rows not finite
    return Cost(limits, bins)


def tile_rows(k: int, d: int) -> int:
    """Rows of a tile on a GPU, `ArrayPoints._tile`."""
    return min(max(TILE["cuda"] // max(k, d), 64), MAX_TILE_ROWS)


def resident(size: Size, gpu: Gpu) -> bool:
    """Whether a GPU keeps the rows: as built each looks at all n of them."""
    return size.n * size.d * 2 < RESIDENT * gpu.capacity


def reduced(size: float, gpu: Gpu, ranks: int) -> float:
    """Seconds of a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size / (BANDWIDTH * gpu.link)


def volumes(size: Size) -> dict[str, float]:
    """Bytes: of the product's files, of a GPU's memory, of one all-reduce."""
    n, D, d, each = size.n, size.D, size.d, size.each
    return {
        "raw rows, float16 (units, scratch)": 2 * n * D,
        "moments in the unit files": max(64, -(-n // LARGEST_CHUNK)) * 8 * D**2,
        "one unit's rows, float16": 2 * min(n / 64, LARGEST_CHUNK) * D,
        "rows.npy = rows on every GPU, as built": 2 * n * d,
        "rows on each of 8, if sharded": 2 * n * d / 8,
        "rows on each of 64, if sharded": 2 * n * d / 64,
        "centroids and sums of an inner job, about": 70 * each * d,
        "all-reduce, level one, an iteration": 16 * size.m * d,
        "all-reduce, level two with more than m ranks, an iteration": 16 * each * d,
        "all-reduce of labels and results, once": 13 * n + 4 * size.k * d,
    }
