"""Copies on a node's own disk: made once, checked, continued after a kill, never mixed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepclust.data.read.mirror import copy_all, mirror_shards
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards import file_lock, remote
from deepclust.data.shards.index import Index, open_index
from deepclust.data.shards.remote import Interrupted
from deepclust.errors import DataError, DiskError, FollowedError, RequeueWanted
from deepclust.files import read_jsonl
from deepclust.world import World
from tests.data.shards.servers import Web, web
from tests.images import draw, encode, make_shards
from tests.ranks import on_ranks

TOTAL = 4 * 71680


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "source", n=64, shards=4)


@pytest.fixture
def server(folder: Path) -> Iterator[Web]:
    with web(folder) as served:
        yield served


@pytest.fixture
def index(server: Web, tmp_path: Path) -> Index:
    opened = open_index(server.url, tmp_path / "index")
    server.sent.clear()
    server.asked.clear()
    return opened


def assert_complete(copies: Index, folder: Path) -> None:
    for shard in copies.shards:
        assert isinstance(shard, Path)
        assert shard.read_bytes() == (folder / shard.name).read_bytes()
    left = [path.name for path in copies.shards[0].parent.iterdir()]  # type: ignore[union-attr]
    assert sorted(left) == [".lock", "DONE", *(f"shard-00000{i}.tar" for i in range(4))]


def place_of(index: Index, tmp_path: Path) -> Path:
    return tmp_path / "node" / f"deepclust-{index.fingerprint}"


def test_copies_are_read_by_offset_and_a_second_start_copies_nothing(
    index, server, folder, tmp_path
):
    copies = mirror_shards(index, tmp_path / "node")
    assert_complete(copies, folder)
    assert sum(server.sent.values()) == TOTAL
    place = (int(column[0]) for column in copies.locate(np.array([20])))
    assert ShardFiles(copies.shards).read(*place) == encode(draw(20, 32, 32, 0))
    assert mirror_shards(index, tmp_path / "node").shards == copies.shards
    assert sum(server.sent.values()) == TOTAL


def test_shards_of_a_shared_folder_are_copied_as_those_of_a_url(folder, tmp_path):
    assert_complete(mirror_shards(open_index(folder), tmp_path / "node"), folder)


def test_without_a_folder_nothing_is_copied(index):
    assert mirror_shards(index, None) is index


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_copy_is_replaced_and_no_other(index, server, folder, tmp_path, damage):
    copies = mirror_shards(index, tmp_path / "node")
    victim, data = copies.shards[2], copies.shards[2].read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(data[:-512] if damage == "cut" else data[:-1] + b"!")
    server.sent.clear()
    assert_complete(mirror_shards(index, tmp_path / "node"), folder)
    assert dict(server.sent) == {victim.name: len(data)}


def test_a_partial_copy_is_continued_at_its_end(index, server, folder, tmp_path):
    place = place_of(index, tmp_path)
    place.mkdir(parents=True)
    data = (folder / "shard-000001.tar").read_bytes()
    (place / "shard-000001.tar.part").write_bytes(data[:30_000])
    assert_complete(mirror_shards(index, tmp_path / "node"), folder)
    assert server.sent["shard-000001.tar"] == len(data) - 30_000


@pytest.mark.parametrize("length", [30_000, 71_680, 99_999])
def test_a_partial_copy_of_wrong_bytes_is_copied_again(index, server, folder, tmp_path, length):
    place = place_of(index, tmp_path)
    place.mkdir(parents=True)
    (place / "shard-000001.tar.part").write_bytes(b"?" * length)
    assert_complete(mirror_shards(index, tmp_path / "node"), folder)


def test_a_source_that_is_not_what_was_indexed_is_an_error(index, folder, tmp_path):
    (folder / "shard-000003.tar").write_bytes(bytes(71_680))
    with pytest.raises(DataError, match=r"shard-000003\.tar was copied .* twice .*was indexed"):
        mirror_shards(index, tmp_path / "node")
    assert not list((tmp_path / "node").glob("*/shard-000003*"))


def test_a_shard_that_is_gone_ends_the_copying_with_its_name(index, folder, tmp_path):
    (folder / "shard-000003.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000003\.tar: HTTP 404"):
        mirror_shards(index, tmp_path / "node")


def test_too_little_room_is_an_error_that_says_how_much(index, server, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((real.f_bsize, 1, 1, 1, 70, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda place: small)
    with pytest.raises(DiskError, match=r"4 shards need 0\.00 GB more .* 0\.00 GB are free"):
        mirror_shards(index, tmp_path / "node")
    assert not server.sent


def test_two_data_sets_in_one_folder_do_not_mix(folder, tmp_path):
    other = make_shards(tmp_path / "other", n=64, shards=4, classes=2, size=24)
    assert_complete(mirror_shards(open_index(folder), tmp_path / "node"), folder)
    assert_complete(mirror_shards(open_index(other), tmp_path / "node"), other)
    assert_complete(mirror_shards(open_index(folder), tmp_path / "node"), folder)


def test_copying_tells_how_far_it_is(index, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "deepclust"):
        mirror_shards(index, tmp_path / "node")
    assert "of 0.00 GB to" in caplog.text
    assert "MB/s" in caplog.text


def test_a_run_that_is_asked_to_stop_stops_copying_and_keeps_what_is_there(
    index, server, folder, tmp_path
):
    server.slow_s = 0.2
    began = time.monotonic()
    with pytest.raises(RequeueWanted, match="copies are kept"):
        mirror_shards(
            index, tmp_path / "node", stopping=lambda: bool(sum(server.sent.values()) > 50_000)
        )
    assert time.monotonic() - began < 10
    server.slow_s = 0
    assert_complete(mirror_shards(index, tmp_path / "node"), folder)


def test_waiting_for_another_process_is_logged_and_can_be_stopped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(file_lock, "TELL_S", 0.0)
    stops = iter([False, False, True])
    with (
        caplog.at_level(logging.INFO, "deepclust"),
        file_lock.held(tmp_path / "lock", "works"),
        pytest.raises(Interrupted),
        file_lock.held(tmp_path / "lock", "works", lambda: next(stops)),
    ):
        pass
    assert "another process works" in caplog.text


def _stage(world: World, index: Index, folders: list[Path]) -> str | list[str]:
    try:
        copies = mirror_shards(index, folders[world.rank], world)
    except (DataError, FollowedError) as error:
        return f"{type(error).__name__}: {error}"
    return [str(shard) for shard in copies.shards]


@pytest.mark.slow
def test_ranks_of_a_node_copy_once(index, server, tmp_path):
    server.slow_s = 0.02
    one, two = on_ranks(2, _stage, index, [tmp_path / "node"] * 2)
    assert one == two
    assert sum(server.sent.values()) == TOTAL


@pytest.mark.slow
def test_a_node_that_fails_ends_the_others(index, folder, tmp_path):
    assert_complete(mirror_shards(index, tmp_path / "there"), folder)
    (folder / "shard-000001.tar").unlink()
    there, lacking = on_ranks(2, _stage, index, [tmp_path / "there", tmp_path / "lacking"])
    assert there.startswith("FollowedError: data.stage: rank 1 failed")
    assert "shard-000001.tar: HTTP 404" in lacking


SCRIPT = """
import sys
from pathlib import Path
from deepclust.data.shards import remote
from deepclust.data.shards.index import open_index
from deepclust.data.read.mirror import copy_all
remote.CHUNK = 8192
copy_all(open_index(sys.argv[1], sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_killed_copier_frees_the_others_and_its_parts_are_continued(
    index, server, folder, tmp_path
):
    server.slow_s, place = 0.05, place_of(index, tmp_path)
    arguments = [server.url, str(index.folder), str(place)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment) as copier:
        while sum(server.sent.values()) < 100_000 or not list(place.glob("*.part")):
            assert copier.poll() is None
            time.sleep(0.01)
        os.kill(copier.pid, signal.SIGKILL)
    kept = sum(path.stat().st_size for path in place.glob("*.tar*"))
    assert 0 < kept < TOTAL
    time.sleep(0.5)  # the dead one's requests end
    server.slow_s, before = 0, sum(server.sent.values())
    copy_all(index, place)
    assert sum(server.sent.values()) - before == TOTAL - kept
    assert_complete(Index(index.folder, [place / s.name for s in index.shards]), folder)
    assert len(read_jsonl(place / "DONE")) == 4
