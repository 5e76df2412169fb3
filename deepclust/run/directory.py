"""A run directory: its layout, its stages, and what makes a stage finished.

A stage is a folder that is filled under a temporary name and renamed when whole. Its manifest
holds the hash of every file and the inputs. DONE is written last, and a stage that is done never
runs again. Before every commit the lock is read: this process must still hold the run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from deepclust.errors import DataError, RecipeError
from deepclust.files import (
    append_json,
    atomic_folder,
    disk_errors,
    file_hash,
    read_json,
    read_jsonl,
    write_json,
)
from deepclust.recipe import Recipe
from deepclust.recipe.recipe import read_tree
from deepclust.redaction import argument, shown
from deepclust.run.lock import check_token
from deepclust.run.signs import unwatched


@dataclass(frozen=True)
class Run:
    """A run directory, and the token with which this process may write to it ("" = read only)."""

    path: Path
    token: str = ""
    attempt: int = 0
    # called by long work on files, to show that it still gets somewhere
    alive: Callable[[], None] = field(default=unwatched, compare=False, repr=False)

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run, as it was when it was first read here."""
        return Recipe.load(self.path / "recipe.yaml")

    @property
    def epochs(self) -> int:
        """The epochs to train; a look at a run of anybody's imports no module that it names."""
        file = self.path / "recipe.yaml"
        try:
            return int(read_tree(file)["train"]["epochs"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"train.epochs in {file} is not a number") from error

    def round(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.path / "rounds" / f"{number:04d}"

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds whose assignments are finished, in order."""
        folders = sorted((self.path / "rounds").glob("[0-9]*"))
        return [int(folder.name) for folder in folders if is_done(folder / "assignments")]

    def checkpoints(self) -> list[Path]:
        """Return the finished checkpoints, oldest first."""
        folders = sorted((self.path / "checkpoints").glob("[0-9]*"))
        return [folder for folder in folders if is_done(folder)]

    def fence(self) -> None:
        """Raise `RunHeldError` when another controller has taken the run over."""
        check_token(self.path, self.token)

    def commit(
        self,
        stage: Path,
        fill: Callable[[Path], None],
        inputs: dict[str, Any],
        *,
        hashes: dict[str, str] | None = None,
        **facts: Any,
    ) -> None:
        """Fill a stage, write its manifest and DONE, and let it appear in one rename.

        `hashes` are those of files that were hashed while they were written, by name.
        """

        def complete(folder: Path) -> None:
            fill(folder)
            seal(folder, inputs, hashes, self.alive, **facts)

        def replace_unfinished() -> None:
            self.fence()
            prune([stage], 0)  # a kill can leave the stage without DONE

        with disk_errors(stage):
            stage.parent.mkdir(parents=True, exist_ok=True)
        atomic_folder(stage, complete, replace_unfinished)

    def event(self, name: str, **fields: Any) -> None:
        """Append to events.jsonl.

        Only the controller that holds the run does this.
        """
        if self.token:
            self.fence()
        record = {"time": time.time(), "attempt": self.attempt, "event": name, **shown(fields)}
        append_json(self.path / "events.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first."""
        return read_jsonl(self.path / "events.jsonl")

    def metric(self, kind: str, **fields: Any) -> None:
        """Append to metrics.jsonl.

        Of two with one kind and step the later attempt's counts.
        """
        record = {"kind": kind, "attempt": self.attempt, **fields, "time": time.time()}
        append_json(self.path / "metrics.jsonl", record)

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind, the last one for every step, in order."""
        records = [r for r in read_jsonl(self.path / "metrics.jsonl") if r["kind"] == kind]
        records.sort(key=_attempt_of)  # an older attempt may write last
        latest: dict[int, dict[str, Any]] = {int(record["step"]): record for record in records}
        return [latest[key] for key in sorted(latest)]


def _attempt_of(record: dict[str, Any]) -> int:
    return int(record.get("attempt", record.get("incarnation", 0)))  # the name in older runs


def seal(
    folder: Path,
    inputs: dict[str, Any],
    hashes: dict[str, str] | None = None,
    alive: Callable[[], None] = unwatched,
    **facts: Any,
) -> None:
    """Write the manifest (inputs, facts, hashes) of a filled folder, then DONE."""
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "blake2b": (hashes or {}).get(file.name) or file_hash(file, alive),
        }
        for file in sorted(folder.iterdir())
    }
    write_json(folder / "manifest.json", {"inputs": inputs, **facts, "files": files})
    (folder / "DONE").touch()


def is_done(stage: Path) -> bool:
    """Return whether a stage is finished."""
    return (stage / "DONE").exists()


def manifest(stage: Path) -> dict[str, Any]:
    """Return the manifest of a finished stage."""
    return dict(read_json(stage / "manifest.json"))


def verify(stage: Path, alive: Callable[[], None] = unwatched) -> None:
    """Raise `DataError` when a file of the stage differs from its manifest."""
    for name, facts in manifest(stage)["files"].items():
        file = stage / name
        if not file.exists() or file.stat().st_size != facts["bytes"]:
            raise DataError(f"{file} is missing or cut short")
        if file_hash(file, alive) != facts["blake2b"]:
            raise DataError(f"{file} has changed since it was written")


def exists(run_dir: Path) -> bool:
    """Return whether a folder holds a run."""
    return (run_dir / "recipe.yaml").is_file()


def open_run(run_dir: str | Path) -> Run:
    """Return a run for reading, or raise `RecipeError` when the folder does not hold one."""
    run_dir = Path(run_dir)
    if not exists(run_dir):
        raise RecipeError(f"{run_dir} is not a run: it has no recipe.yaml (see `deepclust status`)")
    return Run(run_dir)


def sweep(run_dir: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a run.

    Call it only while holding the run's lock: without it, another process may be writing them.
    """
    for pattern in ("checkpoints/.*.tmp", "rounds/*/.*.tmp", "rounds/*/raw/.*.tmp", ".*.tmp"):
        for leftover in run_dir.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def create(run_dir: Path, recipe: Recipe) -> None:
    """Write recipe and environment into a run directory, unless a run has begun there."""
    if any((run_dir / begun).exists() for begun in ("rounds", "checkpoints")):
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


def prune(folders: list[Path], keep: int) -> None:
    """Delete the first folders, so that the last `keep` stay."""
    for folder in folders[: max(0, len(folders) - keep)]:
        (folder / "DONE").unlink(missing_ok=True)  # a half-deleted folder must not look whole
        shutil.rmtree(folder, ignore_errors=True)


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
