from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read import shard_cache
from deepclust.data.read.dataset import Request
from deepclust.data.read.pieces_ahead import UNREAD, PiecesAhead
from deepclust.data.read.shard_cache import ShardCache
from deepclust.data.shards import remote
from deepclust.data.shards.index import Index, open_index
from tests.data.shards.servers import Web, web
from tests.images import make_shards

SHARDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), n=48, shards=SHARDS, size=8)


@pytest.fixture
def server(folder) -> Iterator[Web]:
    with web(folder) as one:
        yield one


@pytest.fixture
def index(server, tmp_path) -> Index:
    index = open_index(server.url, tmp_path / "index")
    server.asked.clear()
    return index


@pytest.fixture
def ahead(index) -> Iterator[PiecesAhead]:
    ahead = PiecesAhead(index, remote.never)
    yield ahead
    ahead.close()


def asked_once_quiet(server: Web) -> Counter[str]:
    """Which shards the server was asked for, once no question has come for a while."""
    count = -1
    while count != (count := len(server.asked)):
        time.sleep(0.3)
    return Counter(name for name, _, _ in server.asked)


def test_shards_come_byte_for_byte_also_one_that_was_not_wanted(ahead, folder, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1_000)
    paths = sorted(folder.glob("*.tar"))
    ahead.want([0, 1, 5])
    for shard in (0, 3, 1, 5):
        assert b"".join(ahead.take(shard)) == paths[shard].read_bytes()


def test_the_next_shards_are_asked_for_before_the_first_is_taken_and_not_without_end(
    ahead, server, index
):
    ahead.want(range(SHARDS))
    assert ahead.is_full
    assert sum(asked_once_quiet(server).values()) == UNREAD
    for shard in range(SHARDS):
        assert len(b"".join(ahead.take(shard))) == index.lengths[shard]
    assert set(asked_once_quiet(server).values()) == {1}


def test_a_shard_that_is_not_taken_is_dropped_and_gives_its_place(ahead, server, index):
    ahead.want(range(SHARDS))
    assert len(b"".join(ahead.take(SHARDS - 1))) == index.lengths[SHARDS - 1]
    assert not ahead.is_full
    assert len(b"".join(ahead.take(2))) == index.lengths[2]


def test_a_reader_that_is_asked_to_stop_ends_soon(index, server):
    server.slow_s, stopped = 60.0, threading.Event()
    ahead = PiecesAhead(index, stopped.is_set)
    ahead.want([0, 1])
    threading.Timer(0.2, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(remote.Interrupted):
        b"".join(ahead.take(0))
    ahead.close()
    assert time.monotonic() - began < 30


def request(*ids: int) -> Request:
    return Request(np.array(ids), np.array(ids), 0, (Crop(CentreCrop(8, 8)),))


def test_a_cache_asks_for_each_shard_once_and_copies_them_in_order(index, server, tmp_path):
    cache = ShardCache(index, tmp_path / "scratch", limit=4)
    for number, wanted in enumerate(cache.stream(request(i, i + 1) for i in range(0, 48, 2))):
        copy = cache.folder / str(index.locate(wanted.sample_ids).shard[0])
        assert wanted.sample_ids[0] == 2 * number
        assert copy.stat().st_size == index.lengths[int(copy.name)]
        cache.release_oldest()
    cache.close()
    assert set(asked_once_quiet(server).values()) == {1}


def test_requests_before_one_that_fails_are_delivered(index, tmp_path):
    def failing() -> Iterator[Request]:
        yield request(0)
        yield request(9)
        raise ValueError("no third")

    cache = ShardCache(index, tmp_path / "scratch")
    stream = cache.stream(failing())
    assert [next(stream).sample_ids.tolist() for _ in range(2)] == [[0], [9]]
    with pytest.raises(ValueError, match="no third"):
        next(stream)
    cache.close()


def test_no_more_requests_are_taken_than_may_wait(index, tmp_path):
    taken = []
    cache = ShardCache(index, tmp_path / "scratch")
    stream = cache.stream(taken.append(i) or request(0) for i in range(1_000))
    next(stream)
    time.sleep(0.5)
    assert len(taken) <= shard_cache.AHEAD + 2
    stream.close()
    cache.close()
