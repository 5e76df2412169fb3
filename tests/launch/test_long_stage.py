"""Long stages under the supervisor: real processes and pipes, and no recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepclust.launch import local
from deepclust.launch.endings import Ending
from deepclust.launch.local import Pipes
from deepclust.launch.policy import Policy
from deepclust.launch.role import Role
from deepclust.launch.supervisor import Supervisor
from deepclust.run.directory import Run

HANG_S = 4.0

pytestmark = pytest.mark.new_interpreters  # of a program that is not the worker's


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose stage lasts for twice the hang limit."""
    monkeypatch.setattr(local, "RANK", "tests.launch.long_stage")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "logs").mkdir()
    return Run(tmp_path, attempt=int(2 * HANG_S))


def watched(run: Run, stage: str) -> Ending:
    supervisor = Supervisor(run, Policy(hang=HANG_S), lambda: False)
    return supervisor.watch(Pipes(run), [Role(0, 2, stage=stage), Role(1, 2, stage=stage)])


def test_a_stage_of_twice_the_hang_limit_goes_on_while_it_shows_signs_of_life(run: Run) -> None:
    ending = watched(run, "")
    assert ending.kind == "finished", ending


def test_the_same_stage_without_a_sign_of_life_is_a_hang(run: Run) -> None:
    ending = watched(run, "silent")
    assert (ending.kind, ending.cause) == ("fault", "hang")
    assert "(train.hang=4)" in ending.text
