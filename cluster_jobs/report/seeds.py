"""What a few labels did to the clusters of a run, by round, and to classes without a label."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32

from deepclust.clustering.match_ids import contingency, hungarian
from deepclust.data.shards.index import Index
from deepclust.run.directory import Run, has_file
from deepclust.run.round_files import read_facts
from deepclust.trained.trained_run import seeded_supers

Record = dict[str, Any]
MOST = 40  # classes without a label that are listed


def seeds_of(run: Run, rounds: list[Record]) -> Record | None:
    """Return the last round's seeded clusters and confusion, if labels seeded it, and `rounds`."""
    if not rounds:
        return None
    number = rounds[-1]["round"]
    facts = _facts(run, number)
    if facts is None:
        return None
    unit = "cluster" if seeded_supers(run, number) is None else "super-cluster"
    return {**facts, "unit": unit, "rounds": by_round(run, rounds)}


def by_round(run: Run, rounds: list[Record]) -> list[Record]:
    """Return a record of each seeded round; what cannot be known of it is None.

    `forced` are labelled images that k-means alone would have put elsewhere. `free`: of the
    held-out images without a seeded class, the share that is in free clusters.
    """
    records = []
    for statistics in rounds:
        facts = _facts(run, statistics["round"])
        if facts is None:
            continue
        others = facts["confusion"][-1] if facts.get("confusion") else [0]
        records.append(
            {key: facts.get(key) for key in ("pinned", "share", "purity", "recall", "accuracy")}
            | {
                "round": statistics["round"],
                "labelled": sum(one["labelled"] for one in facts["clusters"]),
                "forced": statistics.get("seeds_forced"),
                "free": others[-1] / sum(others) if sum(others) else None,
            }
        )
    return records


def _facts(run: Run, number: int) -> Record | None:
    """Return what a round says of its seeds, or None for one without."""
    stage = run.round(number) / "assignments"
    return read_facts(stage, "seeds.json") if has_file(stage, "seeds.json") else None


def unlabelled(
    index: Index, assignments: Int32[np.ndarray, " n"], seeds: list[str | None]
) -> list[Record]:
    """Return the recall of classes without a label, each by the free cluster that matches it best.

    As in the accuracy of clusterings no two classes have the same cluster. `seeds` has the class
    of each seeded cluster. The largest classes come first.
    """
    if index.labels is None or not any(seeds):
        return []
    names = index.class_names or [str(i) for i in range(int(index.labels.max(initial=-1)) + 1)]
    others = np.array([i for i, name in enumerate(names) if name not in set(seeds)], np.int64)
    free = np.array([i for i, name in enumerate(seeds) if name is None], np.int64)
    if not len(others) or not len(free):
        return []
    table = contingency(index.labels, assignments, (len(names), len(seeds)))
    sizes, totals = table.sum(axis=1), table.sum(axis=0)
    partners = hungarian(table[others][:, free])
    order = [i for i in np.argsort(-sizes[others], kind="stable")[:MOST] if sizes[others[i]]]
    return [
        _matched(names[others[i]], int(sizes[others[i]]), table, totals, int(others[i]),
                 int(free[partners[i]]) if partners[i] >= 0 else None)
        for i in order
    ]  # fmt: skip


def _matched(
    name: str, size: int, table: Any, totals: np.ndarray, label: int, cluster: int | None
) -> Record:
    """Return a class and the cluster that it is matched with, None without one."""
    hits = 0 if cluster is None else int(table[label, cluster])
    purity = None if cluster is None else hits / max(1, int(totals[cluster]))
    return {
        "class": name, "images": size, "cluster": cluster, "recall": hits / size, "purity": purity,
    }  # fmt: skip
