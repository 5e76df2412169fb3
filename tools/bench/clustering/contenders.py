"""The contenders on a CPU: each gets rows, first centroids and iterations, and returns centroids.

All make `iterations` updates and one last assignment, so `iterations` + 1 passes, and none may stop
early or subsample: FAISS subsamples above 256 rows a centroid and stops when its float32 objective
doesn't change; scikit-learn stops at `tol`. `faiss-super` takes no first centroids, so its start is
its own. Returned: centroids, labels, updates made.
"""

from __future__ import annotations

import time

import numpy as np
import processes

Result = tuple[np.ndarray, np.ndarray, int]
TILE = 1024


def ours(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int, **options) -> Result:
    """Our k-means by its public door; options go to it."""
    from deepclust import kmeans

    found = kmeans(rows, len(start), iterations=iterations, seed=seed, init=start, **options)
    return found.centroids, found.assignments, len(found.history)


def ours_fp32(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int) -> Result:
    """Ours, guessing in float32 even where bfloat16 is faster."""
    from deepclust.clustering import nearest

    nearest.half_is_faster = lambda: False
    return ours(rows, start, iterations, seed)


def ours_faiss(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int) -> Result:
    """Ours with FAISS as its search."""
    return ours(rows, start, iterations, seed, backend="faiss")


def faiss(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int, **options) -> Result:
    """`faiss.Kmeans` from the same centroids, then the search that DeepCluster does."""
    import faiss

    options = {"max_points_per_centroid": 10_000_000, "min_points_per_centroid": 1, **options}
    if hasattr(faiss.ClusteringParameters(), "early_stop_threshold"):
        options["early_stop_threshold"] = -1.0
    rows = np.ascontiguousarray(rows, np.float32)
    found = faiss.Kmeans(rows.shape[1], len(start), niter=iterations, seed=seed, **options)
    found.train(rows, init_centroids=start)
    return found.centroids, found.assign(rows)[1], len(found.obj)


def faiss_super(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int) -> Result:
    """`faiss.SuperKmeans` (pruning), from its own random start."""
    import faiss

    rows = np.ascontiguousarray(rows, np.float32)
    options = {"max_points_per_centroid": 10_000_000, "min_points_per_centroid": 1}
    found = faiss.SuperKmeans(rows.shape[1], len(start), niter=iterations, seed=seed, **options)
    found.train(rows)
    return found.centroids, found.assign(rows)[1], len(found.obj)


def sklearn(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int) -> Result:
    """`sklearn.cluster.KMeans`, Lloyd."""
    from sklearn.cluster import KMeans

    options = {"n_init": 1, "tol": 0, "algorithm": "lloyd", "random_state": seed}
    found = KMeans(len(start), init=start, max_iter=iterations, **options).fit(rows)
    return found.cluster_centers_, found.labels_, found.n_iter_


def torch_loop(rows: np.ndarray, start: np.ndarray, iterations: int, seed: int) -> Result:
    """What one would write in ten lines of torch: tiles of a product, argmin, index_add."""
    import torch

    x, centroids = torch.from_numpy(np.array(rows, np.float32)), torch.from_numpy(start.copy())
    labels = torch.empty(len(x), dtype=torch.int64)
    for step in range(iterations + 1):
        squares = centroids.square().sum(1)
        for at in range(0, len(x), TILE):
            scores = torch.addmm(squares, x[at : at + TILE], centroids.T, alpha=-2)
            labels[at : at + TILE] = scores.argmin(1)
        if step == iterations:
            break
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids.numpy(), labels.numpy(), iterations


CPU = {
    "ours": ours, "ours-fp32": ours_fp32, "ours-faiss": ours_faiss, "faiss": faiss,
    "faiss-super": faiss_super, "sklearn": sklearn, "torch-loop": torch_loop,
}  # fmt: skip


def measure(job: dict) -> dict:
    """Warm up, run one contender once, keep its centroids; in a process of its own."""
    run = CPU[job["name"]]
    rows = np.load(job["rows"], mmap_mode="r")
    start = np.asarray(rows[np.load(job["ids"])], np.float32)
    arguments = {"seed": job["seed"], **job.get("options", {})}
    warm = np.random.default_rng(0).standard_normal((4096, rows.shape[1]), dtype=np.float32)
    run(warm, warm[:32], 1, **arguments)
    for at in range(0, len(rows), 65_536):
        rows[at : at + 65_536].max()  # all of the file is in the page cache
    began = time.perf_counter()
    centroids, labels, updates = run(rows, start, job["iterations"], **arguments)
    seconds = time.perf_counter() - began
    np.save(job["centroids"], np.asarray(centroids, np.float32))
    empty = len(centroids) - len(np.unique(labels))
    found = {"seconds": seconds, "updates": updates, "own_empties": empty}
    return {**found, "environment": processes.environment()}
