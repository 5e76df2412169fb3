"""Is the training label uniform? Our plan against DeepCluster's released sampler.

    python tools/bench/sampling.py --out sampling.json

Clusters have Zipf sizes. Counted is the label that the loss would see at every position of one
epoch, so the order in which a data set is indexed matters.

`released` is what the released code does, in our words: its data set is a list of (image, label)
that is sorted by cluster; its sampler draws floor(N / K) + 1 indices from every cluster, with
replacement where the cluster isn't larger, shuffles, and cuts at N; but those indices are of the
images as they were before the sorting. So the pair at a drawn index belongs to whatever cluster
stands there: in proportion to its size. Image and label still belong together, so nothing fails.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from deepclust.data.plan import EpochPlan


def zipf_clusters(n: int, k: int, seed: int) -> np.ndarray:
    """Assignments int32 [n]; cluster c has a share in proportion to 1 / (c + 1)."""
    share = 1 / np.arange(1, k + 1)
    rng = np.random.default_rng(seed)
    return rng.choice(k, n, p=share / share.sum()).astype(np.int32)


def released(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels of one epoch of DeepCluster's released sampler and reassigned data set."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == cluster) for cluster in np.unique(labels)]
    share = len(labels) // len(members) + 1
    drawn = np.concatenate([rng.choice(own, share, replace=len(own) <= share) for own in members])
    rng.shuffle(drawn)
    sorted_by_cluster = labels[np.concatenate(members)]
    return sorted_by_cluster[drawn[: len(labels)]]


def planned(labels: np.ndarray, seed: int, mode: str) -> np.ndarray:
    """The labels of one epoch of our plan."""
    return labels[EpochPlan.build(labels, seed, epoch=0, global_batch=1, mode=mode).ids]


def summary(name: str, drawn: np.ndarray, labels: np.ndarray) -> dict:
    """Draws per non-empty cluster, and how they follow the clusters' sizes."""
    sizes = np.bincount(labels)
    draws = np.bincount(drawn, minlength=len(sizes))[sizes > 0]
    sizes = sizes[sizes > 0]
    correlation = np.corrcoef(draws, sizes)[0, 1] if np.ptp(draws) > 1 else 0.0
    return {
        "sampler": name,
        "intended": len(labels) / len(sizes),
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
    labels = zipf_clusters(options.samples, options.clusters, options.seed)
    rows = [
        summary("DeepCluster, released", released(labels, options.seed), labels),
        summary("ours, paper", planned(labels, options.seed, "paper"), labels),
        summary("ours, exact", planned(labels, options.seed, "exact"), labels),
    ]
    sizes = np.bincount(labels)
    print(f"{len(labels):,} samples, cluster sizes {sizes[sizes > 0].min()}-{sizes.max()}")
    print(f"{'sampler':<24}{'intended':>9}{'least':>7}{'most':>7}{'correlation with size':>23}")
    for row in rows:
        print(
            f"{row['sampler']:<24}{row['intended']:>9.1f}{row['least']:>7}{row['most']:>7}"
            f"{row['correlation with size']:>23.3f}"
        )
    options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
