"""Features of any images by a trained network, in a new folder, by sample id.

    OUT/features.npy      [n, d] float16 or float32, or features.parquet with the columns of both
    OUT/samples.parquet   sample_id, shard, key, reason, path: what each row is of
    OUT/manifest.json     how they were made, with hashes; last, so that a folder with it is whole
    OUT/job.json          what was asked for: a command given again continues, or differs
    OUT/work/             chunks, while it goes on

A sample whose image cannot be read has a row of zeros, and a reason.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster_jobs.results.features import Rows, Show, Way, fill_share, rows_of
from cluster_jobs.results.predict import way_of
from cluster_jobs.results.samples import PATH, UNREAD, Part, has_paths, parts_of
from cluster_jobs.results.shards import open_given
from deepclust.data.shards.file_lock import held
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import atomic_file, disk_errors, file_hash, read_record, write_json
from deepclust.launch.role import cores, die_with
from deepclust.methods.embed import Embedder
from deepclust.recipe.sections import Data
from deepclust.run.best import load_best
from deepclust.run.directory import exists, open_run
from deepclust.trained.saved import embedder_of, file_embedder, layer_of, newest
from deepclust.trained.trained_run import best_labeller_of, labeller_of, no_image

JOB, MANIFEST, WORK = "job.json", "manifest.json", "work"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
FORMATS = ("npy", "parquet")
SAMPLES = pa.schema(
    {"sample_id": pa.int64(), "shard": pa.string(), "key": pa.string(), "reason": pa.string()}
)


@dataclass(frozen=True)
class EmbedOptions:
    """Which features are written, and how."""

    layer: str | None = None
    whiten: bool = False
    dtype: str = "float16"
    format: str = "npy"


@dataclass(frozen=True)
class Given:
    """What does not change the rows, or is known by their weights: ranks, and which checkpoint."""

    ranks: int = 1  # processes of this machine
    best: bool = False


GIVEN = Given()


def embed(
    source: Path,
    images: str,
    out: Path,
    options: EmbedOptions,
    *,
    emit: Callable[[str], None],
    show: Show = lambda record: None,
    given: Given = GIVEN,
) -> dict[str, Any]:
    """Write the features of `images` by a run or an exported file, and return the manifest.

    What is there of the same job is not done again. Raises `RunDiffersError` for a folder of
    another job, `RecipeError` for options that do not go together, `DataError` for no images.
    """
    _check(options, source, given)
    _check_target(out)
    way, data, weights = _way(source, options, given.best, emit)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(out / ".lock", f"writes the features of {out}"):
        index = open_given(images, data, out / WORK / "index")
        job = {**asdict(options), "weights": weights, "data": index.fingerprint}
        _begin(out, job)
        if not (out / MANIFEST).exists():
            asked = (source, images, out, options, given)
            made = rows_of(
                out / WORK, index, data, way, show, given.ranks, lambda: _other_ranks(*asked)
            )
            _write(out, made, index, options, job)
        shutil.rmtree(out / WORK, ignore_errors=True)
        return read_record(out / MANIFEST, {"files": dict, "shape": list})


@contextlib.contextmanager
def _other_ranks(
    source: Path, images: str, out: Path, options: EmbedOptions, given: Given
) -> Iterator[None]:
    """Start ranks 1, 2, ... as processes, and wait for them: what one leaves, rank 0 makes."""
    threads = torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=_rank, args=(source, images, out, options, given, rank, os.getpid()))
        for rank in range(1, given.ranks)
    ]
    torch.set_num_threads(_threads(given.ranks))
    try:
        for rank in ranks:
            rank.start()
        yield
        for rank in ranks:
            rank.join()
    finally:
        torch.set_num_threads(threads)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()


def _rank(
    source: Path, images: str, out: Path, options: EmbedOptions, given: Given, rank: int,
    parent: int,
) -> None:  # fmt: skip
    """Make the chunks of one rank, in another process, which ends with rank 0."""
    die_with(parent)
    torch.set_num_threads(_threads(given.ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    way, data, _ = _way(source, options, given.best, lambda text: None)
    index = open_given(images, data, out / WORK / "index")
    fill_share(out / WORK, index, data, way, rank, given.ranks)


def _threads(ranks: int) -> int:
    """Return the threads of a rank: its part of the cores, and no more than one rank would have."""
    return max(1, min(torch.get_num_threads(), cores() // ranks))


def _check(options: EmbedOptions, source: Path, given: Given) -> None:
    """Raise `RecipeError` for options that there are not, or that do not go together."""
    if given.ranks < 1:
        raise RecipeError(f"--ranks {given.ranks}: give 1 or more")
    if given.best and not exists(source):
        raise RecipeError(f"{source} is not a run: leave --best out")
    for name, known in (("dtype", DTYPES), ("format", FORMATS)):
        if (value := getattr(options, name)) not in known:
            raise RecipeError(f"--{name} {value}: give {' or '.join(known)}")
    if options.whiten and options.layer is not None:
        raise RecipeError(
            "--whiten is that of the features of a run's rounds, not of a --layer. Whiten its rows "
            "when they are clustered: deepclust cluster OUT/features.npy --whiten 256"
        )
    if options.whiten and not exists(source):
        raise RecipeError(
            f"{source} is not a run, and a file of weights has no whitening. Leave --whiten out. "
            "Whiten when you cluster: deepclust cluster OUT/features.npy --whiten 256"
        )


def _check_target(out: Path) -> None:
    """Raise `RecipeError` if `out` holds something else."""
    with disk_errors(out):
        there = {file.name for file in out.iterdir()} if out.is_dir() else set()
        other = out.exists() and (
            not out.is_dir() or (there - {".lock", WORK} and JOB not in there)
        )
    if other:
        raise RecipeError(f"{out} exists and is not empty. Choose another --out, or delete it.")


def _way(
    source: Path, options: EmbedOptions, best: bool, emit: Callable[[str], None]
) -> tuple[Way, Data, dict[str, Any]]:
    """Return how images become rows, how they are read, and which weights those are."""
    dtype = DTYPES[options.dtype]
    if not exists(source):
        embedder = file_embedder(source)
        return _plain(embedder, options, dtype), embedder.data, {"file": file_hash(source)}
    run = open_run(source)
    if not options.whiten:
        saved = load_best(run) if best else newest(run, emit)
        embedder = embedder_of(run, saved)
        return _plain(embedder, options, dtype), run.recipe.data, {"step": saved.state.step}
    labeller = best_labeller_of(run, emit) if best else labeller_of(run, None, emit)
    if labeller.projection is None or labeller.projection.whitening is None:
        raise RecipeError(
            f"the method of {source}, {run.recipe.method.name}, whitens nothing: leave --whiten out"
        )
    way = replace(way_of(labeller), dtype=dtype)
    weights = {"round": labeller.round} | ({"step": labeller.step} if best else {})
    return way, run.recipe.data, weights


def _plain(embedder: Embedder, options: EmbedOptions, dtype: torch.dtype) -> Way:
    """Return the way of features as they are, of the last layer or another."""
    layer = layer_of(embedder, options.layer)
    dim = layer(no_image(embedder.data)).shape[1]
    return Way(layer, dim, embedder.device, dtype=dtype)


def _begin(out: Path, job: dict[str, Any]) -> None:
    """Write down what is to be done, or compare with what was begun in this folder."""
    if not (out / JOB).exists():
        return write_json(out / JOB, job)
    before = read_record(out / JOB, {"data": str})
    changed = [
        f"{key} {before.get(key)}, not {job[key]}" for key in job if before.get(key) != job[key]
    ]
    if changed:
        raise RunDiffersError(
            f"{out} was begun with {'; '.join(changed)}. Choose another --out, or delete it."
        )


def _write(out: Path, made: Rows, index: Index, options: EmbedOptions, job: dict[str, Any]) -> None:
    """Put the rows and the names of their samples in their places, and the manifest."""
    names = ["features.parquet"]
    if options.format == "npy":
        names = ["features.npy", "samples.parquet"]
        _link(out / WORK / "features" / "rows.npy", out / "features.npy")
        _write_samples(out / "samples.parquet", made, index, None)
    else:
        _write_samples(out / "features.parquet", made, index, made.rows)
    files = {name: file_hash(out / name) for name in names}
    facts = {"shape": list(made.rows.shape), "excluded": len(made.reasons), "files": files}
    write_json(out / MANIFEST, {**job, **facts})


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where links cannot be made."""
    with disk_errors(target), atomic_file(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def _write_samples(file: Path, made: Rows, index: Index, rows: np.ndarray | None) -> None:
    """Write what each row is of, shard by shard, and with `rows` the rows too."""
    schema = SAMPLES.append(PATH) if has_paths(index) else SAMPLES
    if rows is not None:
        schema = schema.append(pa.field("feature", _list_of(rows)))
    with atomic_file(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in _batches(made, index, schema, rows):
            writer.write_batch(batch)


def _list_of(rows: np.ndarray) -> pa.DataType:
    return pa.list_(pa.from_numpy_dtype(rows.dtype), rows.shape[1])


def _batches(
    made: Rows, index: Index, schema: pa.Schema, rows: np.ndarray | None
) -> Iterator[pa.RecordBatch]:
    excluded = np.array(sorted(made.reasons), np.int64)
    for part in parts_of(index):
        columns = _columns(part, made, np.isin(part.sample_ids, excluded))
        if rows is not None:
            flat = pa.array(np.array(rows[part.first : part.last]).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=_list_of(rows)))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _columns(part: Part, made: Rows, absent: np.ndarray) -> list[pa.Array]:
    columns = [
        pa.array(part.sample_ids),
        pa.repeat(part.shard, len(part.keys)),
        part.keys,
        part.reasons(made.reasons, absent, UNREAD),
    ]
    return columns if part.paths is None else [*columns, part.paths]
