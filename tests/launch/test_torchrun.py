"""`torchrun`: the ranks that it starts are those of one run, with the bits of `train.ranks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepclust import pretrain
from deepclust.errors import RecipeError
from deepclust.launch.ports import free_port
from deepclust.launch.torchrun import Place, place
from deepclust.run.directory import Run
from tests.forks import start_command
from tests.tiny import assert_same_run, tiny_recipe

WHOLE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"
}  # fmt: skip


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """The command under a real torchrun, as two ranks of this machine."""
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port('127.0.0.1')}"
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d", endpoint]
    # without the -- torchrun takes --run for a short form of its --run-path
    script = ["-m", "--", "cluster_jobs.cli", *map(str, words)]
    command = [sys.executable, "-m", *launcher, *script]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_ranks_of_torchrun_are_one_run_of_two_ranks(shards: Path, tmp_path: Path) -> None:
    one_epoch = tiny_recipe(shards, "train.epochs=1")
    one_epoch.save(tmp_path / "tiny.yaml")
    run = tmp_path / "torchrun"
    done = torchrun("pretrain", tmp_path / "tiny.yaml", "--run", run)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished:") == 1
    pretrain(one_epoch.replace("train.ranks=2"), tmp_path / "local")
    assert_same_run(run, tmp_path / "local")
    assert Run(run).recipe == Run(tmp_path / "local").recipe


def test_all_ranks_end_where_rank_0_cannot_begin(
    shards: Path, final_run: Path, tmp_path: Path
) -> None:
    tiny_recipe(shards).save(tmp_path / "tiny.yaml")
    port, words = str(free_port("127.0.0.1")), ["pretrain", tmp_path / "tiny.yaml"]
    ranks = []
    for rank in ("0", "1"):
        place = {**WHOLE, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        asked = [*map(str, words), "--run", str(final_run)]
        with (tmp_path / rank).open("wb") as out:
            ranks.append(start_command(asked, out, out, **place))
    assert [process.wait(100) for process in ranks] == [2, 4]
    assert f"deepclust resume {final_run}" in (tmp_path / "0").read_text()
    assert "rank 0 did not begin" in (tmp_path / "1").read_text()


def test_alone_or_with_one_rank_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    assert place() is None
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some cluster
    assert place() is None
    for name, value in {**WHOLE, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() is None


def test_the_seat_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert place() == Place(1, 2, 1, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert place() == Place(1, 2, 1, 2, is_restart=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"MASTER_PORT": None}, "not MASTER_PORT"),
        ({"RANK": "2"}, "RANK=2 is not below"),
        ({"RANK": "one"}, "RANK='one' is not a number"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], told: str
) -> None:
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=told):
        place()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("train.ranks=4", "torchrun has started WORLD_SIZE=2"),
        ("cluster.where=worker", "cluster.where=worker needs"),
        ("cluster.overlap=true", "cluster.overlap=true needs"),
    ],
)
def test_a_recipe_that_does_not_fit_torchrun_is_refused(key: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Place(0, 2, 0, 2).fitted(tiny_recipe(Path("shards"), key))


def test_the_recipe_gets_the_ranks() -> None:
    assert Place(0, 2, 0, 2).fitted(tiny_recipe(Path("shards"))).train.ranks == 2
    assert json.loads(json.dumps(Place(1, 2, 1, 2).role.__dict__))["has_worker"] is False
