"""Samples by cluster and their most frequent label: as a slow loop has it, empty clusters too."""

from __future__ import annotations

import numpy as np

from cluster_jobs.results.by_cluster import ByCluster, drift, majorities, tightness

N, K = 400, 9


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return assignments without cluster 4, distances, and labels; a few of each are unknown."""
    random = np.random.default_rng(0)
    assignments = random.choice([-1, 0, 1, 2, 3, 5, 6, 7], N).astype(np.int32)
    distances = np.where(assignments < 0, np.nan, random.random(N)).astype(np.float32)
    return assignments, distances, random.integers(-1, 3, N)


def test_members_are_those_of_the_cluster_the_nearest_first() -> None:
    assignments, distances, _ = drawn()
    order = ByCluster(assignments, distances, K)
    for cluster in range(K):
        members = np.flatnonzero(assignments == cluster)
        expected = members[np.argsort(distances[members], kind="stable")]
        assert order.members(cluster).tolist() == expected.tolist()
    assert order.sizes.tolist() == np.bincount(assignments + 1, minlength=K + 1)[1:].tolist()


def test_shares_and_means_are_those_of_a_loop_and_unknown_without_members() -> None:
    assignments, distances, labels = drawn()
    shares, most = majorities(labels, assignments, K)
    means = tightness(assignments, distances, K)
    for cluster in set(range(K)) - {4, 8}:
        own = labels[(assignments == cluster) & (labels >= 0)]
        counts = np.bincount(own)
        assert (most[cluster], shares[cluster]) == (counts.argmax(), counts.max() / len(own))
        assert np.isclose(means[cluster], distances[assignments == cluster].mean())
    assert np.isnan(shares[[4, 8]]).all()
    assert np.isnan(means[[4, 8]]).all()
    assert most[[4, 8]].tolist() == [-1, -1]


def test_renamed_clusters_have_not_drifted_and_without_labels_nothing_is_known() -> None:
    assignments, _, _ = drawn()
    renamed = np.where(assignments < 0, -1, (assignments + 3) % K).astype(np.int32)
    assert np.nanmax(drift(renamed, assignments, K)) == 0
    assert np.isnan(drift(None, assignments, K)).all()
    nobody = np.full(N, -1)
    assert majorities(nobody, assignments, K)[1].tolist() == [-1] * K
