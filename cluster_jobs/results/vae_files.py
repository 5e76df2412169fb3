"""Files of features in, latent means of a VAE for each out, side by side: rows to cluster.

    DIR/job.json             what is computed from what: a command given again continues or differs
    DIR/vae-0.safetensors    the VAE of the first file, and so on
    DIR/fit-0.safetensors    its training, while that goes on
    DIR/features.npy         float32 [n, sum of the latents]
    DIR/manifest.json        measures and hashes; last, so that a folder that has it is whole

Rows are read from memory maps and are never in memory as a whole. Every file appears in one rename.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from cluster_jobs.results.npy_file import open_rows
from deepclust import __version__
from deepclust.clustering.vae import Vae, VaeOptions, blocks
from deepclust.clustering.vae_fit import Fit, fit_vae
from deepclust.data.shards.file_lock import held
from deepclust.errors import DataError, DeepclustError, RecipeError, ResourceError, RunDiffersError
from deepclust.files import atomic_file, disk_errors, file_hash, read_record, write_json
from deepclust.run.directory import environment, has_file, is_done, open_run, whole_file

SAVED_EVERY_S = 30.0  # between two states of a training, beside that of each VAE's end
SHOWN_EVERY_S = 3.0
JOB, MANIFEST, FEATURES = "job.json", "manifest.json", "features.npy"
FIELDS = {"arguments": dict, "inputs": list}  # of both
RESULTS = {**FIELDS, "files": dict, "vaes": list}  # of the manifest


@dataclass(frozen=True)
class Input:
    """A file of rows, and what tells whether it is still the same."""

    path: str
    shape: list[int]
    dtype: str
    blake2b: str

    @classmethod
    def of(cls, path: Path, rows: np.ndarray) -> Input:
        """Return the facts of a file, which is read for its hash."""
        name = str(path.resolve())
        return cls(name, list(rows.shape), rows.dtype.name, file_hash(path))


@dataclass(frozen=True)
class _Job:
    sources: list[Path]
    rows: list[np.ndarray]
    out: Path
    options: VaeOptions
    device: torch.device


def build_vaes(
    sources: list[Path], out: Path, options: VaeOptions, device: str = "auto"
) -> dict[str, Any]:
    """Fit a VAE on each source, write the features of all into `out`, and return the manifest.

    A source is a .npy file [n, D], a folder that `deepclust embed` wrote, or a run. A run stands
    for the features of its last round. What is there of the same job is not done again.

    Raises `DataError` for files that are no features or differ in n. Raises `NumericalError` for
    rows that are not finite or all equal, and `RunDiffersError` where `out` is of another job.
    """
    chosen = _device(device)
    files = [rows_file(source) for source in sources]
    rows = [open_rows(file) for file in files]
    _check_rows(files, rows, options)
    job = _Job(files, rows, out, options.of_rows(len(rows[0])), chosen)
    _check_target(out)
    with held(out / ".lock", f"computes the VAEs of {out}"):
        facts = _begin(job)
        if not (out / MANIFEST).exists():
            _finish(job, facts, [_vae(job, number) for number in range(len(files))])
        return read_record(out / MANIFEST, RESULTS)


def rows_file(source: Path) -> Path:
    """Return the file of rows that a source means.

    Raises `DataError` for a run without features, and for a folder of features in Parquet.
    """
    file = file_in(source)
    return run_rows_file(file) if file.is_dir() else file


def file_in(source: Path) -> Path:
    """Return the features in a folder of `deepclust embed` or of this module, else the source.

    Raises `DataError` for a folder of features in Parquet.
    """
    if (source / FEATURES).is_file():
        return source / FEATURES
    if (source / "features.parquet").is_file():
        raise DataError(f"{source} has features in Parquet: embed again with --format npy")
    return source


def run_rows_file(source: Path) -> Path:
    """Return the file of the features of a run's last round."""
    run = open_run(source)
    for number in reversed(run.rounds()):
        features = run.round(number) / "features"
        if is_done(features) and has_file(features, "rows.npy"):
            return whole_file(features, "rows.npy")
    raise DataError(
        f"{source} has no features of a round: it has none yet, its method makes none, or "
        "keep.features=0. Give a .npy file of features [n, d]"
    )


def _check_rows(files: list[Path], rows: list[np.ndarray], options: VaeOptions) -> None:
    """Raise `DataError` for files of different lengths, or with fewer rows than a batch."""
    counts = [len(one) for one in rows]
    for file, count in zip(files, counts, strict=True):
        if count != counts[0]:
            raise DataError(
                f"{file} has {count} rows, and {files[0]} has {counts[0]}: features of several "
                "networks are rows of the same images, in the same order"
            )
    if counts[0] < options.batch:
        raise DataError(
            f"{files[0]} has {counts[0]} rows, fewer than one batch of {options.batch}: set "
            f"--batch to at most {counts[0]}"
        )


def _check_target(out: Path) -> None:
    """Raise `RecipeError` if `out` holds something else."""
    with disk_errors(out):
        there = {file.name for file in out.iterdir()} if out.is_dir() else set()
        other = out.exists() and (not out.is_dir() or (there - {".lock"} and JOB not in there))
    if other:
        raise RecipeError(f"{out} exists and is not empty. Choose another --out, or delete it.")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name}: give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda: torch sees no GPU here. Use --device cpu or auto.")
    gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def _begin(job: _Job) -> dict[str, Any]:
    """Write down what is to be done, or compare with what was begun in this folder."""
    _log(f"reading {len(job.sources)} files of {len(job.rows[0]):,} rows")
    inputs = [
        asdict(Input.of(file, rows)) for file, rows in zip(job.sources, job.rows, strict=True)
    ]
    facts = {"arguments": asdict(job.options), "inputs": inputs}
    if (job.out / JOB).exists():
        _compare(job.out, read_record(job.out / JOB, FIELDS), facts)
    else:
        write_json(job.out / JOB, facts)
    return facts


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `RunDiffersError` that names what is not as it was; files may have moved."""
    old, new = before["arguments"], now["arguments"]
    changed = [f"--{key} {old.get(key)}, not {new[key]}" for key in new if old.get(key) != new[key]]
    hashes = [
        [one.get("blake2b") if isinstance(one, dict) else None for one in facts["inputs"]]
        for facts in (before, now)
    ]
    if hashes[0] != hashes[1]:
        changed.append("other features, or in another order")
    if changed:
        raise RunDiffersError(
            f"{out} was begun with {'; '.join(changed)}. Choose another --out, or delete it."
        )


def _vae(job: _Job, number: int) -> tuple[Vae, list[dict[str, float]]]:
    """Return a file's VAE, trained now or before, and the measures of its epochs."""
    path, state = (job.out / f"{name}-{number}.safetensors" for name in ("vae", "fit"))
    record = job.out / f"vae-{number}.json"
    if path.exists() and record.exists():
        return Vae.load(path).to(job.device), read_record(record, {"epochs": list})["epochs"]
    try:
        vae, history = fit_vae(
            job.rows[number], job.options, number,
            state=state, device=job.device, alive=_Watch(number, job.options.epochs),
        )  # fmt: skip
    except DeepclustError as error:
        raise type(error)(f"{job.sources[number]}: {_of_a_file(str(error))}") from error
    write_json(record, {"epochs": history})
    vae.save(path)
    state.unlink(missing_ok=True)
    if vae.active < job.options.latent:
        _log(
            f"warning: {job.options.latent - vae.active} of {job.options.latent} latents of VAE "
            f"{number} say nothing, and are columns of zeros: a lower --latent or --beta would do"
        )
    return vae, history


def _of_a_file(text: str) -> str:
    """Return an error about a run's features as one about a file's rows."""
    fix = "Leave them out (assignment -1) or look for overflow in the backbone."
    text = text.replace(fix, "Replace the values by numpy.nan_to_num, or leave out those rows.")
    return text.replace("feature rows", "rows")


class _Watch:
    """Writes how far a training is, and lets it be saved now and then."""

    def __init__(self, number: int, epochs: int) -> None:
        self.number, self.epochs = number, epochs
        self.saved = self.shown = time.monotonic()

    def __call__(self, fit: Fit) -> bool:
        """Return whether it is time to save."""
        now = time.monotonic()
        if fit.history and now - self.shown > SHOWN_EVERY_S:
            self.shown, last = now, fit.history[-1]
            _log(
                f"VAE {self.number}: epoch {fit.epoch} of {self.epochs}, bound "
                f"{last['bound']:.5g}, divergence {last['divergence']:.4g}, "
                f"noise {last['noise']:.4g}"
            )
        due = now - self.saved > SAVED_EVERY_S
        self.saved = now if due else self.saved
        return due


def _finish(
    job: _Job, facts: dict[str, Any], fitted: list[tuple[Vae, list[dict[str, float]]]]
) -> None:
    """Write the features of all VAEs, and the manifest."""
    _log("writing")
    vaes = [vae for vae, _ in fitted]
    _write_features(job, vaes, job.out / FEATURES)
    names = [f"vae-{number}.safetensors" for number in range(len(vaes))]
    files = {name: file_hash(job.out / name) for name in [FEATURES, *names]}
    measures = [
        {"active": vae.active, **history[-1], "history": history} for vae, history in fitted
    ]
    shape = [len(job.rows[0]), len(vaes) * job.options.latent]
    made_by = {"deepclust": __version__, "device": str(job.device), "environment": environment()}
    record = {**facts, "shape": shape, "files": files, "vaes": measures, **made_by}
    write_json(job.out / MANIFEST, record)
    for number in range(len(vaes)):
        (job.out / f"vae-{number}.json").unlink(missing_ok=True)


def _write_features(job: _Job, vaes: list[Vae], path: Path) -> None:
    """Write the standardised latent means of all files side by side, block by block."""
    # plain writes: a full disk is then an error, where a memory map would kill the process
    shape = (len(job.rows[0]), len(vaes) * job.options.latent)
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    widest = max(job.rows, key=lambda rows: rows.shape[1])
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start, block in blocks(widest):
            part = slice(start, start + len(block))
            pairs = zip(vaes, job.rows, strict=True)
            parts = [vae.features(np.asarray(one[part])) for vae, one in pairs]
            file.write(np.concatenate(parts, 1).tobytes())


def summary(manifest: dict[str, Any], out: Path) -> Table:
    """Return a table with a line for each VAE."""
    table = Table(title=escape(f"{out}: {manifest['shape'][0]:,} rows"))
    for column in ("features", "columns", "active latents", "bound", "divergence", "noise"):
        table.add_column(column)
    for one, vae in zip(manifest["inputs"], manifest["vaes"], strict=True):
        numbers = (f"{vae[key]:.4g}" for key in ("bound", "divergence", "noise"))
        latents = f"{vae['active']} of {manifest['arguments']['latent']}"
        table.add_row(escape(one["path"]), str(one["shape"][1]), latents, *numbers)
    return table


def _log(text: str) -> None:
    sys.stderr.write(text + "\n")
