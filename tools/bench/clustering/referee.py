"""One judge for all: float64 inertia over all rows of the returned centroids, and their empties."""

from __future__ import annotations

import numpy as np
import torch


def judge(job: dict) -> dict:
    """Assign every row to the nearest of job["centroids"] in float64, ties to the lowest id."""
    rows = np.load(job["rows"], mmap_mode="r")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    centroids = torch.from_numpy(np.load(job["centroids"])).to(device).double()
    origin = centroids.mean(0)
    offsets = centroids - origin
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=device)
    sums = torch.zeros(len(centroids), dtype=torch.float64, device=device)
    tile = max(256, 2**24 // len(centroids))
    for at in range(0, len(rows), tile):
        wide = torch.from_numpy(np.array(rows[at : at + tile])).to(device).double()
        scores = torch.addmm(offsets.square().sum(1), wide - origin, offsets.T, alpha=-2)
        labels = scores.argmin(1)
        counts += torch.bincount(labels, minlength=len(counts))
        sums.index_add_(0, labels, (wide - centroids[labels]).square().sum(1))
    free = slice(job.get("fixed", 0), None)  # clusters that a seed has not pinned
    return {
        "inertia": float(sums.sum()),
        "free_inertia": float(sums[free].sum()),
        "empties": int((counts == 0).sum()),
        "largest_share": float(counts.max() / len(rows)),
    }
