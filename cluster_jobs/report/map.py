"""A map of the last round's features in two dimensions: neighbours in it are neighbours in them.

UMAP where it is installed, else t-SNE after PCA (scikit-learn); PCA alone where there are few rows.
At most 1,000 rows are drawn, the same ones for the same round. Distances between far groups mean
little in either.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from jaxtyping import Float32, Int32, Int64
from matplotlib.axes import Axes

from cluster_jobs.report.charts import COLOURS, Chart, svg
from deepclust.errors import DataError
from deepclust.run.directory import Run, has_file, is_done
from deepclust.run.round_files import read_array, read_assignments
from deepclust.world import derive, generator

MOST, FEWEST = 1000, 200  # rows; fewer are drawn by PCA
LISTED = 10  # clusters in the table, the largest
ITERATIONS = 500  # of t-SNE: some seconds


def feature_map(run: Run) -> Chart | None:
    """Return the panel, or None where the last round has no features on disk."""
    found = map_of(run)
    if found is None:
        return None
    way, _, places, clusters = found
    known = read_assignments(run, run.rounds()[-1])[0] >= 0
    return _chart(way, places, clusters, int(np.count_nonzero(known)))


def has_map(run: Run) -> bool:
    """Return whether the features of the last round are on disk."""
    stages = [run.round(number) / "features" for number in run.rounds()[-1:]]
    return any(is_done(stage) and has_file(stage, "rows.npy") for stage in stages)


Places = tuple[str, Int64[np.ndarray, " m"], Float32[np.ndarray, "m 2"], Int32[np.ndarray, " m"]]


def map_of(run: Run) -> Places | None:
    """Return how the map was made, and of its images the sample ids, places and clusters."""
    if not has_map(run):
        return None
    rounds = run.rounds()
    stage = run.round(rounds[-1]) / "features"
    rows, clusters = read_array(stage, "rows.npy", dims=2), read_assignments(run, rounds[-1])[0]
    if len(rows) != len(clusters):
        raise DataError(f"{stage} has {len(rows)} rows for {len(clusters)} samples")
    ids = _drawn(clusters, rounds[-1])
    if len(ids) < 3 or rows.shape[1] < 2:
        return None
    way, places = flat(np.asarray(rows[ids], np.float32), derive(0, "report", "map"))
    return way, ids, places, clusters[ids]


def _drawn(clusters: Int32[np.ndarray, " n"], number: int) -> Int64[np.ndarray, " m"]:
    """Return the sample ids on the map, ascending."""
    known = np.flatnonzero(clusters >= 0)
    if len(known) <= MOST:
        return known
    return np.sort(generator(number, "report", "map").choice(known, MOST, replace=False))


def flat(rows: Float32[np.ndarray, "m d"], seed: int) -> tuple[str, Float32[np.ndarray, "m 2"]]:
    """Return how, and the places of rows in two dimensions."""
    from sklearn.decomposition import PCA

    seed = seed % 2**32
    if len(rows) < FEWEST:
        return "PCA", PCA(2, random_state=seed).fit_transform(rows)
    if importlib.util.find_spec("umap") is not None:
        import umap  # type: ignore[import-not-found, unused-ignore]

        return "UMAP", umap.UMAP(random_state=seed).fit_transform(rows)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    short = PCA(min(32, *rows.shape), random_state=seed).fit_transform(rows)
    with threadpool_limits(
        1
    ):  # threads wait for each other at every step, the longer if others run
        return "t-SNE", TSNE(max_iter=ITERATIONS, random_state=seed).fit_transform(short)


def _chart(
    way: str, places: Float32[np.ndarray, "m 2"], clusters: Int32[np.ndarray, " m"], n: int
) -> Chart:
    """Return the panel; a colour is that of several clusters where there are many."""
    sizes = np.bincount(clusters)
    largest = np.argsort(-sizes, kind="stable")[: min(LISTED, np.count_nonzero(sizes))].tolist()
    of = f"{len(places):,} of {n:,} images" if len(places) < n else f"{n:,} images"
    reading = f"{of} by {way}, coloured by cluster. Neighbours are alike."
    rows = [_row(places[clusters == one], one) for one in largest]
    columns = ["cluster", "images on the map", "centre"]

    def draw(axes: Axes) -> None:
        colours = np.array(COLOURS)[clusters % len(COLOURS)]
        axes.scatter(
            places[:, 0], places[:, 1], s=6, c=colours, alpha=0.8, linewidths=0, rasterized=True
        )
        axes.set_axis_off()

    return Chart("Map of the features", reading, svg(draw), columns, rows)


def _row(places: Float32[np.ndarray, "c 2"], cluster: int) -> list[str]:
    x, y = places.mean(0)
    return [str(cluster), f"{len(places):,}", f"{x:.1f}, {y:.1f}"]
