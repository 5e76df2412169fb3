"""One clustering step, from raw features to the label of every image: DeepCluster's, and ours.

The original (facebookresearch/deepcluster, `clustering.py`, in our words): features copied to
float32, `faiss.PCAMatrix(D, 256, eigen_power=-0.5)`, L2, `faiss.Clustering` over all rows, search,
and a Python list of images for every cluster, from which the pseudo-labels are made.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import processes
from memory import Peak


def original(job: dict) -> dict:
    """The original's step; its k-means starts at the whitened rows of our ids."""
    import faiss

    def step(raw: np.ndarray, ids: np.ndarray, lap: Laps) -> tuple[np.ndarray, np.ndarray]:
        rows = raw.astype(np.float32)
        whitening = faiss.PCAMatrix(rows.shape[1], job["dim"], -0.5)  # eigen_power
        whitening.train(rows)
        rows = whitening.apply_py(rows)
        rows = rows / np.linalg.norm(rows, axis=1)[:, np.newaxis]
        lap("whitening")
        found, labels = faiss_kmeans(job, rows, rows[ids])
        lap("kmeans")
        images: list[list[int]] = [[] for _ in range(job["k"])]
        for image, label in enumerate(labels):
            images[label].append(image)
        own = [cluster for cluster in images if cluster]  # the empty ones are skipped
        assigned = np.empty(len(rows), np.int64)
        for label, cluster in enumerate(own):
            assigned[cluster] = label
        lap("labels")
        return rows, found

    warm = np.random.default_rng(0).standard_normal((300, 64), dtype=np.float32)
    faiss.PCAMatrix(64, 8, -0.5).train(warm)
    return measured(job, step)


def faiss_kmeans(job: dict, rows: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and labels, as the original asks FAISS for them; on GPUs if there are any."""
    import faiss

    options = {"niter": job["iterations"], "max_points_per_centroid": 10_000_000}
    if hasattr(faiss.ClusteringParameters(), "early_stop_threshold"):
        options["early_stop_threshold"] = -1.0
    gpu = faiss.get_num_gpus() > 0
    found = faiss.Kmeans(rows.shape[1], job["k"], seed=job["seed"], gpu=gpu, **options)
    found.train(rows, init_centroids=np.ascontiguousarray(start))
    return found.centroids, found.assign(rows)[1].tolist()


def ours(job: dict) -> dict:
    """Ours: assignments are the pseudo-labels. job["device"]: the rows go there first."""
    import torch

    from deepclust import Whitening, kmeans

    def step(raw: np.ndarray, ids: np.ndarray, lap: Laps) -> tuple[np.ndarray, np.ndarray]:
        given = raw
        if job.get("device"):
            given = torch.from_numpy(np.array(raw)).to(job["device"])
            lap("transfer")
        rows = Whitening.fit(given, job["dim"])(given)
        lap("whitening")
        found = kmeans(
            rows, job["k"], iterations=job["iterations"], seed=job["seed"], init=rows[ids]
        )
        lap("kmeans")
        return (rows if job.get("device") is None else rows.cpu().numpy()), found.centroids

    warm = torch.rand(300, 64, device=job.get("device") or "cpu")
    kmeans(Whitening.fit(warm, 8)(warm), 4, iterations=1)
    return measured(job, step)


class Laps:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.parts: dict[str, float] = {}

    def __call__(self, part: str) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now


def measured(job: dict, step) -> dict:
    """Time a step and watch its memory; keep its centroids and whitened rows for the referee."""
    raw, ids = np.load(job["raw"], mmap_mode="r"), np.load(job["ids"])
    for at in range(0, len(raw), 4096):
        raw[at : at + 4096].max()  # all of the file is in the page cache
    with Peak() as peak:
        lap = Laps()
        rows, centroids = step(raw, ids, lap)
        parts = dict(lap.parts)
    np.save(job["centroids"], centroids)
    if "whitened" in job:
        np.save(job["whitened"], rows)
    found = {"seconds": sum(parts.values()), "parts": parts, "peak_MB": peak.bytes / 1e6}
    return {**found, "environment": processes.environment()}
