"""The table of executors, and one from outside of the package used by its dotted name."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster_jobs import job_file, runs
from cluster_jobs.executors import EXECUTORS, executor, require_packages
from deepclust import Recipe, pretrain
from deepclust.errors import RecipeError, ResourceError
from deepclust.run import lock
from tests.killing import training
from tests.tiny import assert_same_run, deepclust, tiny_recipe

TOY = "tests.toys.executor"


def state(run_dir: Path) -> dict[str, Any]:
    states: list[dict[str, Any]] = json.loads(deepclust("status", run_dir, "--json").stdout)
    return states[0]


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    tiny_recipe(shards, "train.epochs=2").save(tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_executor_is_known_by_its_name(name: str) -> None:
    assert executor(name).name == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sge", "choose from local, ray, slurm, or give an importable module"),
        ("no.such.module", "No module named 'no'"),
        ("tests.toys", "has no name EXECUTOR"),
    ],
)
def test_an_unknown_executor_is_refused_with_those_there_are(name: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        executor(name)


def test_a_dry_run_of_an_executor_from_outside_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    words = ["submit", recipe, "--on", TOY, "--run", tmp_path / "run"]
    assert "# in the toy queue: " in deepclust(*words, "--dry-run").stdout
    assert not (tmp_path / "run").exists()


def test_the_status_of_a_run_imports_no_method_and_names_a_missing_executor(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name / "logs").mkdir(parents=True)
        Recipe.load("demo-fashion").save(tmp_path / name / "recipe.yaml")
    job_file.record(tmp_path / "a", on="not.installed")
    recipe = (tmp_path / "c" / "recipe.yaml").read_text()
    (tmp_path / "c" / "recipe.yaml").write_text(
        recipe.replace("name: deepcluster", "name: no.such")
    )
    states = json.loads(deepclust("status", tmp_path, "--json").stdout)
    assert "'not.installed' cannot be imported" in states[0]["reason"]
    assert [one["state"] for one in states[1:]] == ["PENDING", "PENDING"]


@pytest.mark.slow
def test_the_queue_of_an_executor_from_outside_is_asked_by_every_verb(
    recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "a"
    deepclust("submit", recipe, "--on", TOY, "--run", run_dir)
    assert job_file.read(run_dir)["on"] == TOY
    assert (state(run_dir)["state"], state(run_dir)["reason"]) == ("PENDING", "in the toy queue")
    for words in (["resume", run_dir], ["pretrain", recipe, "--run", run_dir]):
        assert "has a job already" in deepclust(*words, code=7).stderr
    assert "was taken out of the toy queue" in deepclust("cancel", run_dir).stderr
    assert "is not running" in deepclust("cancel", run_dir).stderr
    (tmp_path / "runs" / "open").touch()
    deepclust("resume", run_dir, "--on", TOY)
    deepclust("logs", run_dir, "-f")
    assert state(run_dir)["state"] == "SUCCEEDED"


@pytest.mark.slow
def test_a_sweep_is_a_job_for_each_run_where_an_executor_says_no_more(
    recipe: Path, tmp_path: Path
) -> None:
    words = ["submit", recipe, "--on", TOY, "--run", tmp_path / "runs"]
    deepclust(*words, "--sweep", "cluster.k=4,8")
    states = json.loads(deepclust("status", tmp_path / "runs", "--json").stdout)
    assert [one["state"] for one in states] == ["PENDING", "PENDING"]
    assert deepclust("cancel", tmp_path / "runs").stderr.count("taken out") == 2


@pytest.mark.slow
def test_a_run_of_an_executor_from_outside_resumes_bit_for_bit_after_kill_9(
    shards: Path, tmp_path: Path
) -> None:
    job = tiny_recipe(shards, "train.epochs=12")
    pretrain(job, tmp_path / "straight")
    job.save(tmp_path / "tiny.yaml")
    run_dir = tmp_path / "run"
    (tmp_path / "open").touch()
    deepclust("submit", tmp_path / "tiny.yaml", "--on", TOY, "--run", run_dir)
    wait_until(lambda: training(run_dir))
    os.kill(lock.owner_pid(run_dir) or 0, signal.SIGKILL)
    wait_until(lambda: state(run_dir)["state"] == "DIED")
    deepclust("resume", run_dir, "--on", TOY)
    deepclust("logs", run_dir, "-f")
    assert state(run_dir)["state"] == "SUCCEEDED"
    assert_same_run(run_dir, tmp_path / "straight")


@pytest.mark.parametrize(("name", "lacks"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_names_itself_when_a_run_would_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, lacks: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "cluster_jobs.executors.importlib.util.find_spec",
        lambda one: None if one == lacks else there(one),
    )
    with pytest.raises(ResourceError, match=rf"needs {lacks}: pip install 'deepclust\[{name}\]'"):
        runs.submit("small-photos", tmp_path / "run", name, ["data.shards=x"])
    require_packages("local")
