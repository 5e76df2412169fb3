"""Whole runs from a web server: to the bit what they are from a disk, staged or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepclust import pretrain
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.files import read_json
from deepclust.launch.start import resume
from tests.data.shards.servers import Web, web
from tests.tiny import assert_same_run, tiny_recipe


@pytest.fixture
def server(shards: Path) -> Iterator[Web]:
    with web(shards) as served:
        yield served


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "local"
    pretrain(tiny_recipe(shards, "data.read=block"), run)
    return run


@pytest.mark.slow
def test_a_run_from_a_web_server_equals_one_from_a_disk(server, local, tmp_path):
    url = server.url + "/shard-{000000..000002}.tar"
    pretrain(tiny_recipe(url, f"data.scratch={tmp_path / 'scratch'}"), tmp_path / "run")
    assert_same_run(tmp_path / "run", local)
    assert read_json(tmp_path / "run/data.json") == read_json(local / "data.json")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_a_staged_run_equals_one_that_reads_by_block(server, shards, local, tmp_path):
    stage = f"data.stage={tmp_path / 'node'}"
    pretrain(tiny_recipe(server.url, stage), tmp_path / "remote")
    pretrain(tiny_recipe(shards, "data.read=block", stage), tmp_path / "near")
    for name in ("remote", "near"):
        assert_same_run(tmp_path / name, local)
        assert read_json(tmp_path / name / "data.json")["read"] == "block"
    assert len(list((tmp_path / "node").iterdir())) == 1  # one copy for both


@pytest.mark.slow
def test_two_ranks_with_readers_share_a_staged_copy(server, shards, tmp_path):
    two = ("train.ranks=2", "data.workers=1")
    pretrain(tiny_recipe(server.url, *two, f"data.stage={tmp_path / 'node'}"), tmp_path / "remote")
    pretrain(tiny_recipe(shards, *two, "data.read=block"), tmp_path / "near")
    assert_same_run(tmp_path / "remote", tmp_path / "near")


def test_a_run_refuses_to_ask_a_server_for_every_image(server, tmp_path):
    with pytest.raises(RecipeError, match=r"data\.read=offset .* data\.stage"):
        pretrain(tiny_recipe(server.url, "data.read=offset"), tmp_path / "run")


def test_a_run_whose_storage_is_down_says_so_and_resumes_when_it_is_back(shards, tmp_path):
    with web(shards) as server:
        pretrain(tiny_recipe(server.url, "train.epochs=1"), tmp_path / "run")
    with pytest.raises(UnreachableError, match=r"4 attempts.* resume when it is back"):
        resume(tmp_path / "run", "train.epochs=2")


def test_a_run_whose_remote_shards_changed_says_so(server, tmp_path):
    pretrain(tiny_recipe(server.url, "train.epochs=1"), tmp_path / "run")
    server.cut = 1024
    with pytest.raises(RunDiffersError, match=r"the data of .* have changed: .*shard-000000\.tar"):
        resume(tmp_path / "run", "train.epochs=2")
