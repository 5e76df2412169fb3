"""A run directory: its layout, its stages, and what makes a stage finished.

A stage is a folder that is filled under a temporary name and renamed when whole. Its manifest
holds the hash of every file and the inputs. DONE is written last, and a stage that is done never
runs again. Before every commit the lock is read: this process must still hold the run.

A reader of a stage's file compares it with its hash first (`whole_file`), once per process.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from deepclust.errors import DataError, RecipeError, argument, shown
from deepclust.files import (
    append_json,
    atomic_folder,
    create_empty,
    disk_errors,
    file_hash,
    fits,
    path_of,
    range_hash,
    read_jsonl,
    read_record,
    reading,
    remove_folder,
    write_json,
)
from deepclust.recipe import Recipe
from deepclust.recipe.recipe import read_tree
from deepclust.recipe.sealed import check_seal
from deepclust.run.events import is_event, is_metric
from deepclust.run.glance import attempt_of, epochs_in
from deepclust.run.lock import check_token
from deepclust.run.page import html_of
from deepclust.run.signs import unwatched

# A file that several processes write has parts, in order: where each ends, and its blake2b.
Parts: TypeAlias = list[tuple[int, str]]
Hashes: TypeAlias = Mapping[str, "str | Parts"]
ENVIRONMENT = {"time": (int, float), "host": str, "packages": dict}  # of env.json, for readers


@dataclass(frozen=True)
class Run:
    """A run directory, and the token with which this process may write to it ("" = read only)."""

    path: Path
    token: str = ""
    attempt: int = 0
    # called by long work on files, to show that it still gets somewhere
    alive: Callable[[], None] = field(default=unwatched, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"  # without the token, which lets write

    def _repr_html_(self) -> str:
        return html_of(self)

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run, as it was when it was first read here.

        Raises `RunDiffersError` when it is not as the run wrote it.
        """
        file = self.path / "recipe.yaml"
        recipe = Recipe.load(file)
        check_seal(file)
        return recipe

    @cached_property
    def epochs(self) -> int:
        """The epochs to train, as they were when they were first read here.

        A look at a run of anybody's imports no module that it names.
        """
        file = self.path / "recipe.yaml"
        if (known := epochs_in(file)) is not None:
            return known
        train = read_tree(file).get("train")
        epochs = train.get("epochs") if isinstance(train, dict) else None
        if not fits(epochs, int):
            raise RecipeError(f"train.epochs in {file} is not a number")
        return int(str(epochs))

    def round(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.path / "rounds" / f"{number:04d}"

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds whose assignments are finished, in order."""
        folders = numbered(self.path / "rounds")
        return [int(folder.name) for folder in folders if is_done(folder / "assignments")]

    def lost_round(self) -> int | None:
        """Return the last round that was clustered, if it is there no more or is not whole.

        Of a run that goes on only a folder without DONE counts: it may be about to make it again.
        """
        events = [event for event in self.events() if event["event"] != "notified"]
        last = max((e["round"] for e in events if e["event"] == "clustered"), default=-1)
        folder = self.round(last) / "assignments"
        ended = any(event["event"] == "finished" for event in events[-3:])
        is_lost = last >= 0 and not is_done(folder) and (ended or folder.is_dir())
        return last if is_lost else None

    def checkpoints(self) -> list[Path]:
        """Return the finished checkpoints, oldest first."""
        return [folder for folder in numbered(self.path / "checkpoints") if is_done(folder)]

    def fence(self) -> None:
        """Raise `RunHeldError` when another controller has taken the run over."""
        check_token(self.path, self.token)

    def commit(
        self,
        stage: Path,
        fill: Callable[[Path], None],
        inputs: dict[str, Any],
        *,
        hashes: Hashes | None = None,
        **facts: Any,
    ) -> None:
        """Fill a stage, write its manifest and DONE, and let it appear in one rename.

        `hashes` are those of files that were hashed while they were written, by name: one of the
        whole file, or those of its parts.
        """

        def complete(folder: Path) -> None:
            fill(folder)
            seal(folder, inputs, hashes, self.alive, **facts)

        def replace_unfinished() -> None:
            self.fence()
            prune([stage], 0, self.alive)  # a kill can leave the stage without DONE

        with disk_errors(stage):
            stage.parent.mkdir(parents=True, exist_ok=True)
        atomic_folder(stage, complete, replace_unfinished, self.alive)

    def event(self, name: str, **fields: Any) -> None:
        """Append to events.jsonl.

        Only the controller that holds the run does this.
        """
        if self.token:
            self.fence()
        record = {"time": time.time(), "attempt": self.attempt, "event": name, **shown(fields)}
        append_json(self.path / "events.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first, without lines that are none."""
        return [record for record in read_jsonl(self.path / "events.jsonl") if is_event(record)]

    def metric(self, kind: str, **fields: Any) -> None:
        """Append to metrics.jsonl.

        Of two with one kind and step the later attempt's counts.
        """
        record = {"kind": kind, "attempt": self.attempt, **fields, "time": time.time()}
        append_json(self.path / "metrics.jsonl", record)

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind, the last one for every step, in order."""
        lines = read_jsonl(self.path / "metrics.jsonl")
        records = [r for r in lines if is_metric(r) and r["kind"] == kind]
        records.sort(key=attempt_of)  # an older attempt may write last
        latest: dict[int, dict[str, Any]] = {int(record["step"]): record for record in records}
        return [latest[key] for key in sorted(latest)]


def seal(
    folder: Path,
    inputs: dict[str, Any],
    hashes: Hashes | None = None,
    alive: Callable[[], None] = unwatched,
    **facts: Any,
) -> None:
    """Write the manifest (inputs, facts, hashes) of a filled folder, then DONE."""
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            **_hash_facts((hashes or {}).get(file.name) or file_hash(file, alive)),
        }
        for file in sorted(folder.iterdir())
    }
    write_json(folder / "manifest.json", {"inputs": inputs, **facts, "files": files})
    create_empty(folder / "DONE")


def _hash_facts(known: str | Parts) -> dict[str, Any]:
    """Return what a manifest says of a file's hash: of the whole, or of its parts, one by one."""
    if isinstance(known, str):
        return {"blake2b": known}
    return {"blake2b": _of_parts(known), "parts": [list(part) for part in known]}


def _of_parts(parts: Parts) -> str:
    text = json.dumps([list(part) for part in parts])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def numbered(folder: Path) -> list[Path]:
    """Return the folders in a folder whose names are numbers, in order; none where it is missing.

    Raises `DataError` for a folder that cannot be read, which is not the same as an empty one.
    """
    if not os.path.lexists(folder):
        return []
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.isdecimal())
    return [folder / name for name in names]


def is_done(stage: Path) -> bool:
    """Return whether a stage is finished."""
    return (stage / "DONE").exists()


def manifest(stage: Path) -> dict[str, Any]:
    """Return the manifest of a finished stage, or raise `DataError` when it is damaged."""
    file = stage / "manifest.json"
    record = read_record(file, {"files": dict, "inputs": dict})
    for name, facts in record["files"].items():
        plain = name == Path(name).name and isinstance(facts, dict)
        known = plain and fits(facts.get("bytes"), int) and fits(facts.get("blake2b"), str)
        if not (known and _fits_parts(facts)):
            raise DataError(f"{file} is damaged: its entry {name[:80]!r} is none of a file")
    return record


def verify(stage: Path, alive: Callable[[], None] = unwatched) -> None:
    """Raise `DataError` when a file of the stage differs from its manifest."""
    for name, facts in manifest(stage)["files"].items():
        _verify_file(stage / name, facts, alive)


def whole_file(
    stage: Path, name: str, alive: Callable[[], None] = unwatched, share: tuple[int, int] = (0, 1)
) -> Path:
    """Return the path of a stage's file that is as it was written.

    `share` (i, m): m processes look at it together, and this is number i from 0. Each reads every
    m-th of the file's parts. What has no parts is for number 0.

    Raises `DataError` that names the file when it is missing, cut short or changed.
    """
    facts = manifest(stage)["files"].get(name)
    if facts is None:
        raise DataError(f"{stage / 'manifest.json'} does not list {name}: the stage is not whole")
    _verify_file(stage / name, facts, alive, share)
    return stage / name


def has_file(stage: Path, name: str) -> bool:
    """Return whether a stage was written with this file, by its manifest."""
    return name in manifest(stage)["files"]


_whole: set[tuple[Any, ...]] = set()  # files that this process has compared with their hash


def _verify_file(
    file: Path, facts: dict[str, Any], alive: Callable[[], None], share: tuple[int, int] = (0, 1)
) -> None:
    with reading(file):
        seen = file.stat()
    if seen.st_size != facts["bytes"]:
        raise DataError(f"{file} has {seen.st_size:,} bytes, not the {facts['bytes']:,} it had")
    times = seen.st_mtime_ns, seen.st_ctime_ns
    key = (file, seen.st_ino, seen.st_size, *times, facts["blake2b"], share)
    if key in _whole:
        return
    ends = [0, *(end for end, _ in facts.get("parts", [[seen.st_size, facts["blake2b"]]]))]
    digests = [digest for _, digest in facts.get("parts", [[0, facts["blake2b"]]])]
    number, of = share
    for part in range(number, len(digests), of):
        if range_hash(file, ends[part], ends[part + 1], alive) != digests[part]:
            raise DataError(f"{file} has changed since it was written")
    _whole.add(key)


def _fits_parts(facts: dict[str, Any]) -> bool:
    """Return whether a file's parts, if it has any, cover it in order and belong to its hash."""
    parts = facts.get("parts")
    if parts is None:
        return True
    if not isinstance(parts, list) or not all(
        isinstance(part, list) and len(part) == 2 and fits(part[0], int) and fits(part[1], str)
        for part in parts
    ):
        return False
    ends = [end for end, _ in parts]
    whole = ends == sorted(ends) and bool(ends) and ends[-1] == facts["bytes"] and ends[0] >= 0
    return whole and _of_parts([tuple(part) for part in parts]) == facts["blake2b"]


def exists(run_dir: Path) -> bool:
    """Return whether a folder holds a run."""
    with disk_errors(run_dir):
        return (run_dir / "recipe.yaml").is_file()


def open_run(run_dir: str | Path) -> Run:
    """Return a run for reading, or raise `RecipeError` when the folder does not hold one."""
    run_dir = path_of(run_dir, "run")
    if not exists(run_dir):
        raise RecipeError(f"{run_dir} is not a run: it has no recipe.yaml (see `deepclust status`)")
    return Run(run_dir)


def sweep(run_dir: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a run.

    Call it only while holding the run's lock: without it, another process may be writing them.
    """
    for pattern in (
        "checkpoints/.*.tmp",
        "best/.*.tmp",
        "rounds/*/.*.tmp",
        "rounds/*/raw/.*.tmp",
        ".*.tmp",
    ):
        for leftover in run_dir.glob(pattern):
            plain = leftover.is_dir() and not leftover.is_symlink()
            shutil.rmtree(leftover) if plain else leftover.unlink(missing_ok=True)


def create(run_dir: Path, recipe: Recipe) -> None:
    """Write recipe and environment into a run directory, unless a run has begun there."""
    if any(os.path.lexists(run_dir / begun) for begun in ("rounds", "checkpoints")):
        raise RecipeError(
            f"{run_dir} holds a run already. To continue it: deepclust resume {run_dir}\n"
            "To start another one, choose another folder."
        )
    with disk_errors(run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "data.json").unlink(missing_ok=True)
    recipe.save(run_dir / "recipe.yaml")
    write_json(run_dir / "env.json", environment())


def environment() -> dict[str, Any]:
    """Return versions, machine and code, as they are when the run starts."""
    packages = ("torch", "torchvision", "faiss-gpu", "faiss-cpu", "numpy", "webdataset")
    return {
        "command": [argument(word) for word in sys.argv],
        "host": platform.node(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in packages if _version(name)},
        "git": git_commit(),
        "time": time.time(),
    }


def prune(folders: list[Path], keep: int, alive: Callable[[], None] = unwatched) -> None:
    """Delete the first folders, so that the last `keep` stay."""
    for folder in folders[: max(0, len(folders) - keep)]:
        (folder / "DONE").unlink(missing_ok=True)  # a half-deleted folder must not look whole
        remove_folder(folder, alive)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this code, if it is in a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
