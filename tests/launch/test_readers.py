"""`data.workers=auto`: a number by the CPUs of a rank, recorded at the start, and no other bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from cluster_jobs.executors import executor
from deepclust import Recipe, pretrain
from deepclust.errors import RecipeError
from deepclust.launch.start import resolved, resume
from deepclust.run.directory import Run
from tests.forks import in_fork
from tests.tiny import assert_same_run, tiny_recipe

AUTO = "data.workers=auto"


def on_one_cpu(text: str) -> int | str:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return resolved(Recipe.parse(yaml.safe_load(text))).data.workers


@pytest.mark.parametrize(("cpus", "readers"), [(0, 0), (1, 0), (2, 1), (6, 3), (16, 8), (96, 8)])
def test_auto_is_half_of_the_cpus_and_eight_at_most(cpus: int, readers: int) -> None:
    data = tiny_recipe(Path("shards"), AUTO).data
    assert data.readers(cpus) == readers
    assert data.model_copy(update={"workers": 5}).readers(cpus) == 5


def test_on_one_cpu_a_rank_reads_itself(shards: Path) -> None:
    assert in_fork(on_one_cpu, tiny_recipe(shards, AUTO).dump()) == 0


@pytest.mark.parametrize(
    ("on", "key"), [("slurm", "slurm={cpus_per_rank: 6}"), ("ray", "ray={cpus: 6}")]
)
def test_a_scheduler_gives_the_cpus(shards: Path, on: str, key: str) -> None:
    recipe = tiny_recipe(shards, AUTO, "train.threads=null", key)
    planned = executor(on).prepare(recipe, Path("runs/a")).recipe
    assert (planned.data.workers, planned.train.threads) == (3, 3)


def test_the_number_of_readers_changes_no_bit(shards: Path, tmp_path: Path) -> None:
    pretrain(tiny_recipe(shards, AUTO, "train.epochs=1"), tmp_path / "auto")
    pretrain(tiny_recipe(shards, "data.workers=2", "train.epochs=1"), tmp_path / "two")
    assert isinstance(Run(tmp_path / "auto").recipe.data.workers, int)
    assert_same_run(tmp_path / "auto", tmp_path / "two")
    resume(tmp_path / "two", AUTO)
    assert isinstance(Run(tmp_path / "two").recipe.data.workers, int)


def test_another_word_is_refused(shards: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.workers"):
        tiny_recipe(shards, "data.workers=many")
