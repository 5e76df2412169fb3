"""Ctrl-C and TERM: the command that goes on is printed, and works when it is typed."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs.cli import going_on
from cluster_jobs.display import command_line
from deepclust.run.directory import Run
from tests.forks import start_command
from tests.killing import PATIENCE_S, training
from tests.tiny import deepclust, tiny_recipe


def stopped(told: Path, moment: Callable[[], bool], number: int, *words: object) -> tuple[int, str]:
    """The exit code and the stderr of a command that gets a signal when the moment has come."""
    with told.open("wb") as out:
        process = start_command([*map(str, words)], out, out)
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert process.poll() is None, told.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(number)
    return process.wait(PATIENCE_S), told.read_text()


def retype(text: str) -> None:
    """Run the command of the last line, word for word."""
    program, *words = shlex.split(text.splitlines()[-1])
    assert Path(program).name == "deepclust"
    deepclust(*words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_run_prints_the_command_that_resumes_it(
    many_shards: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "a run's"
    tiny_recipe(many_shards).save(tmp_path / "tiny.yaml")
    words = ("pretrain", tmp_path / "tiny.yaml", "--run", run)
    ended, text = stopped(tmp_path / "out", lambda: training(run), number, *words)
    assert (ended, Run(run).events()[-1]["event"]) == (code, "stopped"), text
    retype(text)
    assert Run(run).events()[-1]["event"] == "finished"


def test_a_run_that_does_not_exist_yet_is_begun_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepclust", "pretrain", "demo", "--run", str(tmp_path)])
    assert shlex.split(going_on.resume_command(tmp_path))[1:] == sys.argv[1:]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_features_go_on_with_the_same_command(
    many_shards: Path, final_run: Path, tmp_path: Path, number: int, code: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ("embed", final_run, "--data", many_shards, "--out")
    begun = lambda: any((out / "work").rglob("unit-*.safetensors"))  # noqa: E731
    ended, text = stopped(tmp_path / "told", begun, number, *words, out)
    assert ended == code, text
    assert not (out / "manifest.json").exists()
    retype(text)
    deepclust(*words, whole)
    assert np.array_equal(np.load(out / "features.npy"), np.load(whole / "features.npy"))


def test_a_command_with_a_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["deepclust", "embed", "runs/a", "--data", "https://me:hunter22@host/x.tar"]
    monkeypatch.setattr(sys, "argv", words)
    assert going_on.typed_again() == "the same command again"


def test_a_run_whose_name_is_like_an_option_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["cluster_jobs/cli/__main__.py"])
    program = [sys.executable, "-m", "cluster_jobs.cli"]
    assert shlex.split(command_line("resume", Path("-a"))) == [*program, "resume", "./-a"]
