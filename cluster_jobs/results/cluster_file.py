"""Cluster features of any origin: a .npy file in, a folder of centroids and assignments out.

This is the clustering of a run without a run, for annotation and curation. Rows are read from the
memory map tile by tile and are never in memory as a whole. Whitened rows go through a scratch file.
The folder appears in one rename when it is whole, so a kill or a full disk leaves nothing
half-written.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from jaxtyping import Int64
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from cluster_jobs.results.npy_file import check_names, open_rows, read_names
from deepclust import __version__
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.frame import frame_of
from deepclust.clustering.kmeans import KMeansResult, scaled, solve_kmeans, widened
from deepclust.clustering.options import KMeansOptions, Progress
from deepclust.clustering.probe import probe_backend
from deepclust.clustering.statistics import describe
from deepclust.clustering.two_level_init import given_start
from deepclust.clustering.whiten import Whitening
from deepclust.data.owned_folder import owned, sweep
from deepclust.errors import DataError, NumericalError, RecipeError, ResourceError
from deepclust.files import atomic_folder, disk_errors, read_json, write_json
from deepclust.launch.devices import make_present
from deepclust.recipe.sections import ClusterSection
from deepclust.run.directory import environment

BLOCK = 4096  # rows that are whitened at a time
SHOWN_EVERY_S = 3.0  # between two lines of progress
GROUP = 2**20  # rows of a Parquet row group: all that the table has in memory


@dataclass(frozen=True)
class Options:
    """The options of the command, with the meanings of the recipe's `cluster` section."""

    k: int | None = None
    whiten: int | None = None  # PCA-whiten to so many dimensions, unit rows
    iterations: int = 20
    seed: int = 0
    init: str = "random"
    spherical: bool = False
    empty: str = "split"
    min_size: int = 1
    backend: str = "auto"
    device: str = "auto"
    ids: Path | None = None  # names of the rows

    def kmeans(self, backend: str) -> KMeansOptions:
        """Return the settings of the k-means, searched by `backend`."""
        assert self.k is not None
        return KMeansOptions(
            self.k,
            self.iterations,
            self.seed,
            self.init,
            self.empty,
            self.spherical,
            self.min_size,
            backend=backend,
        )


def is_features(source: Path) -> bool:
    """Return whether `deepclust cluster SOURCE` means a file of features, not a run."""
    return source.is_file() or source.suffix == ".npy"


def refuse_options(run_dir: Path, options: Options, out: Path | None) -> None:
    """Raise `RecipeError` if options for a file of features were given with a run."""
    if out is not None or options != Options():
        raise RecipeError(
            f"{run_dir} is not a .npy file, and the options of `deepclust cluster` are for such "
            "files. A run has them in its recipe: deepclust cluster RUN"
        )


def cluster_features(source: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Cluster the rows of a .npy file into the new folder `out`, and return its statistics.

    Writes centroids.npy, assignments.npy, statistics.json, and whitening.safetensors if whitened.
    assignments.parquet has row, id (if named), cluster and squared distance to the own centroid.
    """
    if out is None or options.k is None:
        raise RecipeError(
            f"a file of features needs the number of clusters and a folder for them: "
            f"deepclust cluster {source} --k 1000 --out clusters"
        )
    check_options(options)
    device = device_of(options.device)
    rows = open_rows(source)
    check_count(source, len(rows), options.k, options.min_size)
    if options.ids is not None:
        check_names(options.ids, len(rows))
    check_target(out)
    job = Job(source, rows, options, device)
    sweep(out)  # of one that was killed
    atomic_folder(out, job.fill, lambda: check_target(out))
    return dict(read_json(out / "statistics.json"))


@dataclass(frozen=True)
class Job:
    """A file of rows with what is to be done with it."""

    source: Path
    rows: np.ndarray
    options: Options
    device: torch.device

    def fill(self, folder: Path) -> None:
        """Whiten, cluster and write, all inside `folder`."""
        with owned(folder):
            self._fill(folder)

    def _fill(self, folder: Path) -> None:
        began = time.monotonic()
        with named_errors(self.source):
            rows = self.whiten(folder)
            whitened = time.monotonic()
            result = self.cluster(rows)
        clustered = time.monotonic()
        (folder / "whitened.npy").unlink(missing_ok=True)
        _log("writing")
        np.save(folder / "centroids.npy", result.centroids)
        np.save(folder / "assignments.npy", result.assignments)
        _write_table(folder / "assignments.parquet", result, self.options.ids)
        seconds = {
            "whitening": whitened - began,
            "kmeans": clustered - whitened,
            "all": time.monotonic() - began,
        }
        write_json(folder / "statistics.json", {**self._facts(result), "seconds": seconds})

    def whiten(self, folder: Path) -> np.ndarray:
        """Return the rows to cluster: those given, or whitened ones on disk in `folder`."""
        n, width = self.rows.shape
        dim = self.options.whiten
        if dim is None:
            return self.rows
        _log(f"whitening {n:,} rows from {width} to {dim} dimensions")
        progress = _Passes()
        whitening = Whitening.fit(self.rows, dim, progress.rows, self.tried[1])
        if whitening.warning:
            _log(f"warning: {_in_options(whitening.warning)}")
        whitening.save(folder / "whitening.safetensors")
        _project(whitening, self.rows, folder / "whitened.npy", self.tried[1])
        return np.lib.format.open_memmap(folder / "whitened.npy", mode="r")

    def cluster(
        self, rows: np.ndarray, valid: Int64[np.ndarray, " m"] | None = None
    ) -> KMeansResult:
        """Return the k-means of all rows, or of the `valid` ones alone."""
        chosen = self.options
        assert chosen.k is not None
        _log(f"clustering {rows.shape[0]:,} rows of {rows.shape[1]} into {chosen.k:,} clusters")
        backend, device = self.tried
        options, frame = chosen.kmeans(backend), frame_of(rows, spherical=chosen.spherical)
        whole = ArrayPoints(rows, device=device)
        points = (whole if valid is None else whole.select(valid)).framed(frame)
        given = given_start(points, options)
        result = solve_kmeans(points, options, given, scaled(_Passes(), frame))
        return widened(result, frame)

    @functools.cached_property
    def tried(self) -> tuple[str, torch.device]:
        """The backend and the device that work here; what is used instead is shown once."""
        chosen = self.options
        named = chosen.device != "auto"
        backend, device, notes = probe_backend(chosen.backend, self.device, named)
        is_other = (backend, device) != (chosen.backend, self.device)
        instead = f"; {backend} on {device} is used instead" if is_other else ""
        for note in notes:
            _log(f"warning: {note}{instead}")
        make_present(device)
        return backend, device

    def _facts(self, result: KMeansResult) -> dict[str, Any]:
        """Return everything that statistics.json holds, except the times."""
        chosen, n = self.options, len(self.rows)
        known = describe(result.assignments, len(result.centroids))
        history = [asdict(iteration) for iteration in result.history]
        return {
            **{key: value for key, value in known.items() if value is not None},
            "inertia": result.inertia,
            "inertia_per_row": result.inertia / n,
            "empty_repairs": result.empty_repairs,
            "loop_repairs": sum(iteration.empties for iteration in result.history),
            "forced": len(result.forced),
            "forced_rows": result.forced.tolist(),
            "iterations": len(history),
            "history": [{k: v for k, v in one.items() if k != "donors"} for one in history],
            "input": {
                "path": str(self.source.resolve()),
                "shape": list(self.rows.shape),
                "dtype": self.rows.dtype.name,
            },
            "arguments": {**asdict(chosen), "ids": chosen.ids and str(chosen.ids)},
            "device": str(self.device),
            "deepclust": __version__,
            "environment": environment(),
        }


def _project(whitening: Whitening, rows: np.ndarray, path: Path, device: torch.device) -> None:
    """Write whitened rows block by block, in float16 if the file was, else in float32."""
    # plain writes: a full disk is then an error, where a memory map would kill the process
    dtype = np.dtype(np.float16 if rows.dtype == np.float16 else np.float32)
    shape = (len(rows), len(whitening.eigenvalues))
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), BLOCK):
            file.write(whitening(rows[start : start + BLOCK], device).astype(dtype).tobytes())


def _write_table(path: Path, result: KMeansResult, ids: Path | None) -> None:
    """Write row, name (if any), cluster and squared distance, one row group at a time."""
    names = None if ids is None else read_names(ids)
    named = [] if names is None else [pa.field("id", pa.string())]
    numbers = [pa.field("cluster", pa.int32()), pa.field("distance", pa.float32())]
    schema = pa.schema([pa.field("row", pa.int64()), *named, *numbers])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(result.assignments), GROUP):
            part = slice(start, start + GROUP)
            clusters, distances = result.assignments[part], result.distances[part]
            columns: list[Any] = [np.arange(start, start + len(clusters)), clusters, distances]
            if names is not None:
                columns.insert(1, list(islice(names, len(clusters))))
            writer.write_table(pa.table(list(map(pa.array, columns)), schema=schema))


def check_options(options: Options) -> None:
    """Raise `RecipeError` for values that the recipe's `cluster` section refuses."""
    names = ("k", "iterations", "init", "empty", "min_size", "backend", "device")
    chosen = {name: getattr(options, name) for name in names}
    if options.whiten is not None:
        chosen["dim"] = options.whiten
    try:
        ClusterSection(**chosen)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = "".join(map(str, item["loc"])).replace("dim", "whiten").replace("_", "-")
            lines.append(f"--{name} {item['input']}: {item['msg']}")
        raise RecipeError("; ".join(lines)) from None


def device_of(name: str) -> torch.device:
    """Return the device of `--device`, or raise `ResourceError` for a GPU that is not there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(f"--device {name}: torch sees no GPU here. Use --device cpu or auto.")
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def check_count(source: Path, count: int, k: int, min_size: int) -> None:
    """Raise `DataError` for more clusters than `count` rows can fill."""
    if k * min_size > count:
        each = f" of at least {min_size} rows" if min_size > 1 else ""
        raise DataError(
            f"{k} clusters{each} need {k * min_size} rows, but {source} has only {count}. "
            f"Set --k to at most {count // min_size}."
        )


def check_target(out: Path) -> None:
    """Raise `RecipeError` if `out` exists, since nothing is ever overwritten."""
    with disk_errors(out):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        raise RecipeError(f"{out} exists and is not empty. Choose another --out, or delete it.")


@contextlib.contextmanager
def named_errors(source: Path) -> Iterator[None]:
    """Let errors of the clustering name the file, and options instead of recipe keys."""
    try:
        yield
    except (DataError, NumericalError, RecipeError) as error:
        raise type(error)(f"{source}: {_in_options(str(error))}") from error


def _in_options(text: str) -> str:
    """Return an error about a run's features as one about a file's rows."""
    for of_a_run, of_a_file in (
        ("cluster.k", "--k"),
        ("cluster.dim=", "--whiten "),
        (
            "Leave them out (assignment -1) or look for overflow in the backbone.",
            "Take them out of the file, or replace the values by numpy.nan_to_num.",
        ),
        ("or look for duplicate images or a collapsed backbone", "or look for equal rows"),
        (", or look for dead units in the backbone", ", or look for constant columns"),
        ("feature rows", "rows"),
    ):
        text = text.replace(of_a_run, of_a_file)
    return text


class _Passes:
    """Writes how far a long computation is, at most every few seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if self._due():
            _log(
                f"pass {progress.pass_} of {progress.of}: inertia {progress.inertia:.6g}, "
                f"{progress.moved:,} rows moved, {progress.eta:.0f} s left"
            )

    def rows(self, done: int, of: int) -> None:
        """Write how many rows are read."""
        if self._due():
            _log(f"{done:,} of {of:,} rows read")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self.last < SHOWN_EVERY_S:
            return False
        self.last = now
        return True


def _log(text: str) -> None:
    sys.stderr.write(text + "\n")


def summary(statistics: dict[str, Any]) -> Table:
    """Return the table of the most important statistics."""
    sizes, seconds = statistics["sizes"], statistics["seconds"]
    table = Table(title=escape(statistics["input"]["path"]), show_header=False)
    lines = {
        "rows, clusters": f"{statistics['n']:,}, {statistics['k']:,}",
        "mean squared distance": f"{statistics['inertia_per_row']:.5g}",
        "cluster sizes": f"{sizes['min']:,} to {sizes['max']:,}, median {sizes['median']:,.0f}",
        "evenness (entropy / ln k)": f"{statistics['entropy_ratio']:.3f}",
        "largest cluster": f"{statistics['largest_share']:.2%}",
        "rows moved into empty clusters": f"{statistics['forced']:,}",
        "iterations, seconds": f"{statistics['iterations']}, {seconds['all']:.1f}",
    }
    for name, value in lines.items():
        table.add_row(name, value)
    return table
