"""Draws of each cluster in an epoch: our plan against DeepCluster's released sampler.

    python tools/bench/sampling.py --out sampling.json

Clusters have Zipf sizes. The bench counts the clusters that the loss would see over the positions
of an epoch, so the order of the data set's index matters.

`released` does what the released code does. Its data set is a list of (image, cluster), sorted by
cluster. Its sampler draws floor(N / K) + 1 indices from every cluster, with replacement unless the
cluster is larger, shuffles, and cuts at N. But those are indices of the images before the sorting.
So the pair at a drawn index can be of any cluster, in proportion to its size. Image and cluster
still belong together, so nothing fails.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from deepclust.data.plan import EpochPlan


def zipf_clusters(n: int, k: int, seed: int) -> np.ndarray:
    """Return assignments int32 [n], of cluster c in proportion to 1 / (c + 1)."""
    share = 1 / np.arange(1, k + 1)
    rng = np.random.default_rng(seed)
    return rng.choice(k, n, p=share / share.sum()).astype(np.int32)


def released(cluster_ids: np.ndarray, seed: int) -> np.ndarray:
    """Return an epoch's cluster ids by DeepCluster's sampler and reassigned data set."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(cluster_ids == cluster) for cluster in np.unique(cluster_ids)]
    share = len(cluster_ids) // len(members) + 1
    drawn = np.concatenate([rng.choice(own, share, replace=len(own) <= share) for own in members])
    rng.shuffle(drawn)
    sorted_by_cluster = cluster_ids[np.concatenate(members)]
    return sorted_by_cluster[drawn[: len(cluster_ids)]]


def planned(cluster_ids: np.ndarray, seed: int, mode: str) -> np.ndarray:
    """Return an epoch's cluster ids by our plan."""
    return cluster_ids[EpochPlan.build(cluster_ids, seed, epoch=0, global_batch=1, mode=mode).ids]


def summary(name: str, drawn: np.ndarray, cluster_ids: np.ndarray) -> dict:
    """Return the draws per non-empty cluster, and how they follow the clusters' sizes."""
    sizes = np.bincount(cluster_ids)
    draws = np.bincount(drawn, minlength=len(sizes))[sizes > 0]
    sizes = sizes[sizes > 0]
    correlation = np.corrcoef(draws, sizes)[0, 1] if np.ptp(draws) > 1 else 0.0
    return {
        "sampler": name,
        "intended": len(cluster_ids) / len(sizes),
        "least": int(draws.min()),
        "most": int(draws.max()),
        "correlation with size": float(correlation),
    }


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-sampling.json"))
    options = parser.parse_args()
    cluster_ids = zipf_clusters(options.samples, options.clusters, options.seed)
    rows = [
        summary("DeepCluster, released", released(cluster_ids, options.seed), cluster_ids),
        summary("ours, paper", planned(cluster_ids, options.seed, "paper"), cluster_ids),
        summary("ours, exact", planned(cluster_ids, options.seed, "exact"), cluster_ids),
    ]
    sizes = np.bincount(cluster_ids)
    print(f"{len(cluster_ids):,} samples, cluster sizes {sizes[sizes > 0].min()}-{sizes.max()}")
    print(f"{'sampler':<24}{'intended':>9}{'least':>7}{'most':>7}{'correlation with size':>23}")
    for row in rows:
        print(
            f"{row['sampler']:<24}{row['intended']:>9.1f}{row['least']:>7}{row['most']:>7}"
            f"{row['correlation with size']:>23.3f}"
        )
    options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
