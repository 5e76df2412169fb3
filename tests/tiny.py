"""A job of seconds on real (drawn) images: shards, a recipe, and the `deepclust` command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow.parquet import read_table
from safetensors.numpy import load_file

from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.results.predict import predict
from deepclust import Recipe, pretrain
from deepclust.errors import RequeueWanted
from deepclust.launch.start import resume
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.stages import train
from tests.forks import in_fork, run_command
from tests.images import make_shards

TREE = {
    "data": {"size": 16, "resize": 16, "workers": 0, "extract_batch": 64},
    "backbone": {"name": "conv4"},
    "cluster": {"k": 8, "dim": 8, "iterations": 5, "final": False},
    "train": {"epochs": 2, "batch": 24, "threads": 1, "log": 3, "device": "cpu"},
}


def tiny_shards(folder: Path, n: int = 300) -> Path:
    """Labelled shards of small PNGs."""
    make_shards(folder, n=n, shards=3, classes=4, size=16)
    return folder


def tiny_recipe(shards: Path, *overrides: str) -> Recipe:
    """The smallest recipe that does everything."""
    tree = {**TREE, "data": {**TREE["data"], "shards": str(shards)}}
    return Recipe.parse(tree).replace(*overrides)


def command(*arguments: object) -> list[str]:
    """The `deepclust` command of this environment."""
    return [sys.executable, "-m", "cluster_jobs.cli", *map(str, arguments)]


def deepclust(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code."""
    done = run_command([str(word) for word in arguments])
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A display that asks the run to stop when it sees a step."""

    def show(record: dict[str, Any]) -> None:
        if record.get("progress") and record.get("step") == step:
            os.kill(os.getpid(), signal.SIGUSR2)

    return show


def assert_resumes_undisturbed(recipe: Recipe, folder: Path, step: int) -> None:
    """A run stopped at a step and resumed ends as one that nobody disturbed."""
    in_fork(run_disturbed, recipe.dump(), folder, step)
    assert_same_run(folder / "stopped", folder / "straight")


def run_disturbed(recipe: str, folder: Path, step: int) -> None:
    """Run a recipe twice: straight on, and stopped at a step and resumed.

    Ranks are forks of this process, and ask themselves to stop: so it is always at that step.
    """
    given, honest = Recipe.parse(yaml.safe_load(recipe)), train.train_step
    pretrain(given, folder / "straight")

    def asked(trainer: Any, meter: Any, parts: Any, targets: Any, state: State) -> float:
        if state.step + 1 >= step:
            os.kill(os.getpid(), signal.SIGUSR2)
        return honest(trainer, meter, parts, targets, state)

    train.train_step = asked
    with pytest.raises(RequeueWanted):
        pretrain(given, folder / "stopped")
    train.train_step = honest
    resume(folder / "stopped")


def final_weights(run: Path) -> dict[str, np.ndarray]:
    """Every tensor of the newest checkpoint."""
    folder = Run(run).checkpoints()[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.stem}/{key}": value for f in files for key, value in load_file(f).items()}


def assignments(run: Path) -> list[np.ndarray]:
    """The assignments of every round."""
    found = Run(run)
    return [np.load(found.round(r) / "assignments" / "assignments.npy") for r in found.rounds()]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended with the same weights, optimizers and assignments, bit for bit."""
    a, b = final_weights(one), final_weights(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert not different
    pairs = zip(assignments(one), assignments(other), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)


def assert_predicts_its_assignments(run: Path, shards: Path, folder: Path) -> None:
    """A run says of its own images, asked as new ones, what its assignments say."""
    predict(run, str(shards), folder / "predicted.parquet", emit=print)
    table = read_table(export_assignments(run, folder / "assigned.parquet")).to_pydict()
    predicted = read_table(folder / "predicted.parquet").to_pydict()
    assert predicted["cluster"] == table["cluster"]
    if Run(run).recipe.cluster is not None:
        assert predicted["distance"] == table["distance"]
