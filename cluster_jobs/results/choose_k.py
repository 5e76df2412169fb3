"""Numbers of clusters beside each other: `deepclust cluster RUN|FEATURES --k 50,100,200,500`.

For each k the rows are clustered twice, from two seeds. What both agree on is in the data, and what
they do not is the draw. No single number decides, so none is: the table is what users compare.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from rich.markup import escape
from rich.table import Table
from sklearn.metrics import silhouette_score

from cluster_jobs.results.cluster_file import (
    Job,
    Options,
    check_count,
    check_options,
    check_target,
    device_of,
    named_errors,
)
from cluster_jobs.results.npy_file import open_rows
from cluster_jobs.results.vae_files import run_rows_file
from deepclust.clustering.kmeans import KMeansResult
from deepclust.clustering.statistics import ari, nmi
from deepclust.errors import RecipeError
from deepclust.files import atomic_folder, disk_errors, write_json
from deepclust.run.round_files import read_excluded
from deepclust.world import derive, generator

FILE = "choose_k.json"
SAMPLE = 4000  # rows of the silhouette, whose cost is their square


def parse_ks(text: str | None) -> tuple[int, ...]:
    """Return the numbers of `--k 50,100`, each once and ascending; none were given: ()."""
    if text is None:
        return ()
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ks = [0]
    if ks[0] < 1:
        raise RecipeError(f"--k {text}: give a number of clusters, or several as in --k 50,100,200")
    return tuple(ks)


def compare(source: Path, out: Path | None, ks: tuple[int, ...], options: Options) -> Any:
    """Cluster the rows of a file, or of a run's last round, with each k, and return the numbers.

    They are written to `out`/choose_k.json where a new folder is given. Rows of a run that were
    excluded are left out, and its seeds are not pinned.

    Raises `RecipeError` for an option that is not allowed, `DataError` for more clusters than rows.
    """
    if options.ids is not None:
        raise RecipeError("--ids names rows of one clustering: give one number to --k, or no --ids")
    if options.whiten is not None and source.is_dir():
        raise RecipeError(f"the features of {source} are as its recipe makes them: no --whiten")
    for k in ks:
        check_options(replace(options, k=k))
    place = None if out is None else _parent(out)  # for a scratch file as large as the rows
    file = run_rows_file(source) if source.is_dir() else source
    device = device_of(options.device)
    rows = open_rows(file)
    valid = None
    if source.is_dir():
        excluded = np.array(list(read_excluded(file.parent)), np.int64)
        valid = np.setdiff1d(np.arange(len(rows)), excluded)
    check_count(source, len(rows) if valid is None else len(valid), ks[-1], options.min_size)
    job = Job(file, rows, options, device)
    with (
        disk_errors(place or Path(tempfile.gettempdir())),
        named_errors(source),
        tempfile.TemporaryDirectory(prefix=".choose-k-", dir=place) as scratch,
    ):
        rows = job.whiten(Path(scratch))
        compared = [_measure(job, rows, valid, k) for k in ks]
    result = {"source": str(source), "rows": len(rows), "ks": compared}
    if out is not None:
        atomic_folder(out, lambda part: write_json(part / FILE, result), lambda: check_target(out))
    return result


def _parent(out: Path) -> Path:
    """Return the folder of the new folder `out`, made if it is not there."""
    check_target(out)
    with disk_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out.absolute().parent


def _measure(
    job: Job, rows: np.ndarray, valid: Int64[np.ndarray, " m"] | None, k: int
) -> dict[str, Any]:
    """Return the numbers of one k."""
    began, seed = time.monotonic(), job.options.seed
    seeds = (seed, derive(seed, "choose k"))
    one, other = (
        replace(job, options=replace(job.options, k=k, seed=number)).cluster(rows, valid)
        for number in seeds
    )
    sizes = np.bincount(one.assignments, minlength=k)
    return {
        "k": k,
        "ari_seeds": ari(one.assignments, other.assignments),
        "nmi_seeds": nmi(one.assignments, other.assignments),
        "silhouette": _silhouette(rows, valid, one, job.options),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "inertia": one.inertia,
        "inertia_per_row": one.inertia / len(one.assignments),
        "seeds": list(seeds),
        "seconds": time.monotonic() - began,
    }


def _silhouette(
    rows: np.ndarray, valid: Int64[np.ndarray, " m"] | None, result: KMeansResult, options: Options
) -> float | None:
    """Return the mean silhouette (Rousseeuw 1987) of at most SAMPLE rows, None for one cluster."""
    n = len(result.assignments)
    draws = generator(options.seed, "silhouette")
    drawn = np.sort(draws.choice(n, min(n, SAMPLE), replace=False))
    clusters = result.assignments[drawn]
    if not 1 < len(np.unique(clusters)) < len(drawn):
        return None
    sample = np.asarray(rows[drawn if valid is None else valid[drawn]], np.float32)
    metric = "cosine" if options.spherical else "euclidean"
    return float(silhouette_score(sample, clusters, metric=metric))


def summary(result: dict[str, Any]) -> Table:
    """Return the table, a row for each k."""
    table = Table(title=escape(f"{result['source']}, {result['rows']:,} rows"))
    for name in ("k", "ARI of two seeds", "NMI", "silhouette", "smallest", "median", "inertia"):
        table.add_column(name, justify="right")
    for one in result["ks"]:
        silhouette = "" if one["silhouette"] is None else f"{one['silhouette']:.3f}"
        table.add_row(
            f"{one['k']:,}", f"{one['ari_seeds']:.3f}", f"{one['nmi_seeds']:.3f}", silhouette,
            f"{one['smallest']:,}", f"{one['median']:,.0f}", f"{one['inertia']:.5g}",
        )  # fmt: skip
    return table


def advise() -> None:
    """Say on stderr how the table is read."""
    sys.stderr.write(
        "High ARI: the clusters are in the data, not in the draw. High silhouette: they lie apart. "
        "NMI and inertia change with k alone.\n"
    )
