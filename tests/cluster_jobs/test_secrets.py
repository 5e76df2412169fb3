"""A secret of a recipe leaves it by no way: not by a file, a log, an argument, or an error."""

from __future__ import annotations

import logging
import stat
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from cluster_jobs import cli
from cluster_jobs.executors import background, executor
from cluster_jobs.sweep import run_dirs
from deepclust import errors
from deepclust.errors import DataError, RunDiffersError
from deepclust.launch.start import check_changes, prepare_run
from deepclust.recipe import Recipe
from deepclust.run.directory import Run
from deepclust.run.reporting import log_to
from tests.tiny import tiny_recipe

SECRET = "S3cr3tW0rd"
URL = f"https://bob:{SECRET}@host/x-{{000..002}}.tar?sig={SECRET}"
OVERRIDES = (
    f"data.shards={URL}",
    f"ray.env={{AWS_SECRET_ACCESS_KEY: {SECRET}, OTHER: {SECRET}}}",
    f"slurm.setup=[export HF_TOKEN={SECRET}, module load cuda]",
    f"slurm.sbatch={{export: 'ALL,TOKEN={SECRET}'}}",
    f"notify.webhook=https://hooks.host/services/{SECRET}",
    f"notify.command=curl https://hooks.host/{SECRET}",
)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(errors, "_secrets", {})


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(Path("shards"), *OVERRIDES)


@pytest.mark.parametrize("on", ["local", "ray", "slurm"])
def test_a_dry_run_shows_no_secret(recipe, tmp_path, on):
    plan = executor(on).prepare(recipe, tmp_path / "run")
    text = str(plan)
    assert SECRET not in text
    assert "https://host/x-{000..002}.tar" in text
    assert "module load cuda" in text


def test_no_file_of_a_run_but_the_recipe_has_a_secret_and_that_is_for_its_owner(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["deepclust", "pretrain", "my.yaml", *OVERRIDES])
    run = Run(tmp_path / "run")
    prepare_run(recipe, run.path)
    run.event("stopped", kind="DataError", text=f"cannot read {URL}")
    log_to(run.path / "logs" / "rank-00000.log", 0).error("cannot read %s", URL)
    for handler in logging.getLogger("deepclust").handlers:
        handler.flush()
    files = {file for file in run.path.rglob("*") if file.is_file()}
    holders = {file.name for file in files if SECRET.encode() in file.read_bytes()}
    assert holders == {"recipe.yaml"}
    assert stat.S_IMODE((run.path / "recipe.yaml").stat().st_mode) == 0o600
    assert Run(run.path).recipe.data.shards == URL


def test_a_recipe_without_secrets_is_for_all(tmp_path):
    prepare_run(tiny_recipe(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").stat().st_mode & 0o044 or not _umask_is_open()


def _umask_is_open() -> bool:
    probe = Path("/proc/self/status").read_text()
    return next(line for line in probe.splitlines() if line.startswith("Umask")).endswith("022")


def test_the_difference_of_a_resume_shows_no_secret(recipe, tmp_path):
    prepare_run(recipe, tmp_path / "run")
    with pytest.raises(RunDiffersError, match=r"init.weights: None -> https://host/") as refused:
        check_changes(Run(tmp_path / "run"), recipe.replace(f"init.weights={URL}"))
    assert SECRET not in str(refused.value)


def test_folders_of_a_sweep_have_no_secret_in_their_names(tmp_path):
    sweep = [f"data.shards={URL},s3://k:{SECRET}@b/y", f"ray.env.KEY={SECRET}"]
    names = [folder.name for folder in run_dirs(tmp_path, sweep)]
    assert SECRET not in str(names)
    assert len(names) == 2


def test_an_error_of_a_verb_shows_no_secret_and_no_argument_of_a_process_has_one(
    recipe, tmp_path, monkeypatch, capsys
):
    for error in (DataError(f"no shard at {URL}"), KeyError(URL)):
        monkeypatch.setattr(cli, "app", Mock(side_effect=error))
        with pytest.raises(SystemExit):
            cli.main()
        assert SECRET not in capsys.readouterr().err
    started: list[list[str]] = []
    monkeypatch.setattr(background, "start", lambda run, command, *_: started.append(command))
    prepare_run(recipe, tmp_path / "run")
    executor("local").resume(tmp_path / "run", [f"ray.env.NEW={SECRET}"])
    assert SECRET not in str(started)
    assert Run(tmp_path / "run").recipe.ray["env"]["NEW"] == SECRET
