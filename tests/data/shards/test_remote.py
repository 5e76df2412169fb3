"""Shards behind real servers: the same index and batches as from a disk, whatever goes wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.read.loader import Loader, Request, resolve_read
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards import remote
from deepclust.data.shards.find import expand
from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.data.shards.remote import UnreachableError, read, stream
from deepclust.data.shards.url import Url
from deepclust.errors import DataError, RecipeError, ResourceError
from tests.data.shards.servers import Web, s3, web
from tests.images import draw, encode, make_shards, write_tar

PATTERN = "/shard-{000000..000003}.tar"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), n=64, shards=4)


@pytest.fixture
def server(folder: Path) -> Iterator[Web]:
    with web(folder) as served:
        yield served


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[str]:
    with s3("bucket", folder) as url:
        yield url


def one(server: Web) -> Url:
    return Url(f"{server.url}/shard-000000.tar")


def batches(index: Index, scratch: Path, workers: int = 0) -> torch.Tensor:
    loader = Loader(index, workers, scratch=scratch)
    ids = np.random.default_rng(0).permutation(64).reshape(4, 16)
    asked = [Request(part, part, 0, (Crop(CentreCrop(32, 32)),)) for part in ids]
    try:
        return torch.cat([loaded.images[0] for loaded in loader.stream(asked)])
    finally:
        loader.close()


def assert_same(index: Index, local: Index, tmp_path: Path) -> None:
    assert (index.fingerprint, list(index.keys)) == (local.fingerprint, list(local.keys))
    assert index.class_names == local.class_names == [f"class {i}" for i in range(4)]
    assert resolve_read(index, "auto") == "block"
    assert torch.equal(batches(index, tmp_path), batches(local, tmp_path))


def test_http_gives_the_same_index_and_batches_as_a_disk(server, folder, tmp_path):
    local = open_index(folder, tmp_path / "local")
    for number, words in enumerate((server.url, server.url + PATTERN)):
        index = open_index(words, tmp_path / f"{number}")
        assert_same(index, local, tmp_path)


def test_s3_gives_the_same_index_and_batches_as_a_disk(bucket, folder, tmp_path):
    local = open_index(folder, tmp_path / "local")
    for number, words in enumerate((bucket, bucket + PATTERN)):
        index = open_index(words, tmp_path / f"{number}")
        assert_same(index, local, tmp_path)


def test_worker_processes_read_remote_shards_too(server, folder, tmp_path, monkeypatch):
    index = open_index(server.url, tmp_path / "index")
    assert torch.equal(batches(index, tmp_path, workers=2), batches(index, tmp_path))


def test_shards_are_indexed_in_large_blocks_each_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1 << 15)
    picture = encode(draw(0, 32, 32))
    names = ["a", "long/" * 40 + "name", *(f"{i:05d}" for i in range(100))]
    members = [(f"{n}.{e}", d) for n in names for e, d in (("cls", b"7"), ("png", picture))]
    write_tar(tmp_path / "s" / "a.tar", members)
    with web(tmp_path / "s") as server:
        index = open_index(server.url, tmp_path / "i")
        assert index.labels is not None
        assert set(index.labels.tolist()) == {7}
        blocks = [asked for asked in server.asked if asked[2] - asked[1] > 1]
        assert len(blocks) == len(set(blocks)) == -(-index.lengths[0] // (1 << 15))
    assert index.fingerprint == open_index(tmp_path / "s", tmp_path / "j").fingerprint


def test_an_index_that_was_uploaded_beside_the_shards_is_fetched(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "up")
    local = open_index(tmp_path / "up")
    with web(tmp_path / "up") as server:
        index = open_index(server.url + PATTERN, tmp_path / "i")
        assert index.fingerprint == local.fingerprint
        assert sum(server.sent[path.name] for path in folder.glob("*.tar")) == 4  # their sizes
        part = open_index(server.url + "/shard-{000000..000001}.tar", tmp_path / "part")
        assert len(part) == 32  # of other shards: indexed here


def test_the_index_of_a_run_stands_in_the_run_and_without_one_must_be_given_a_place(
    server, tmp_path
):
    assert open_index(server.url, None, tmp_path / "run").folder == tmp_path / "run" / "index"
    with pytest.raises(RecipeError, match=r"data\.index=FOLDER.*--index FOLDER"):
        build_index(server.url)


def test_shards_that_changed_size_are_noticed(server, tmp_path):
    open_index(server.url, tmp_path / "i")
    server.cut = 512
    with pytest.raises(DataError, match=r"shard-000000\.tar had \d+ bytes and now has \d+"):
        open_index(server.url, tmp_path / "i")


def test_a_broken_connection_is_continued_at_the_byte_where_it_broke(server, folder):
    server.faults += ["drop", "drop"]
    data = (folder / "shard-000000.tar").read_bytes()
    assert read(one(server), 0, len(data)) == data
    assert server.sent["shard-000000.tar"] == len(data)
    starts = [first for _, first, _ in server.asked]
    assert starts == sorted(set(starts))
    assert len(starts) == 3


def test_a_server_that_is_busy_is_asked_again_and_not_for_ever(server, folder):
    server.faults += [503, 503]
    assert read(one(server), 100, 50) == (folder / "shard-000000.tar").read_bytes()[100:150]
    server.faults += [503] * 9
    with pytest.raises(UnreachableError, match=r"shard-000000\.tar: HTTP 503.* 4 attempts"):
        read(one(server), 100, 50)
    assert len(server.faults) == 5


def test_a_server_that_stops_answering_times_out(server, monkeypatch):
    monkeypatch.setattr(remote, "LIMIT_S", 0.3)
    server.slow_s = 0.5
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="TimeoutError"):
        read(one(server), 0, 1 << 14)
    assert time.monotonic() - began < 5


def test_a_reader_that_is_stopped_does_not_wait(server):
    server.slow_s = 0.5
    began = time.monotonic()
    with pytest.raises(remote.Interrupted):
        read(one(server), 0, 1 << 14, stopped=lambda: time.monotonic() - began > 0.3)
    assert time.monotonic() - began < 1


def test_a_server_without_ranges_is_refused_with_the_fix(server):
    server.ranges = False
    with pytest.raises(DataError, match=r"ignores range requests .*nginx"):
        expand(server.url + PATTERN)
    with pytest.raises(DataError, match="ignores range requests"):
        read(one(server), 0, 100)


def test_a_shard_that_is_not_there_is_named_with_its_pattern(server, bucket):
    for base in (server.url, bucket):
        with pytest.raises(DataError, match=r"shard-000004\.tar: .*folder or pattern"):
            expand(base + "/shard-{000003..000004}.tar")


def test_a_folder_without_shards_says_what_to_give_instead(tmp_path):
    with web(tmp_path) as server, pytest.raises(DataError, match=r"no shards .* are listed in "):
        expand(server.url)


def test_a_server_that_lists_nothing_asks_for_a_pattern(server):
    server.listing = False
    with pytest.raises(DataError, match="folder or pattern"):
        expand(server.url)
    assert len(expand(server.url + PATTERN)) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_or_gone_while_we_read_ends_the_stream(server, tmp_path, workers):
    index = open_index(server.url, tmp_path / "i")
    server.cut = 2000
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: .*shorter than it was"):
        batches(index, tmp_path, workers)
    gone = Index(index.folder, [Url(f"{shard}x") for shard in index.shards])
    with pytest.raises(DataError, match=r"shard-00000\d\.tarx: HTTP 404"):
        batches(gone, tmp_path, workers)


def test_what_is_read_without_a_copy_is_read_by_ranges(server, folder, tmp_path):
    index = open_index(server.url, tmp_path / "i")
    files = ShardFiles(index.shards, tmp_path)
    place = (int(column[0]) for column in index.locate(np.array([20])))
    server.faults += [503]
    assert files.read(*place) == encode(draw(20, 32, 32, 0))
    with pytest.raises(UnreachableError, match="shorter"):
        files.read(0, index.lengths[0] - 5, 10)


def test_secrets_are_used_and_never_shown(server, tmp_path):
    base = server.url.replace("://", "://me:sesame@")
    index = open_index(base + PATTERN + "?signature=open", tmp_path / "i")
    assert any((header or "").startswith("Basic ") for header in server.authorization)
    server.faults += [503] * 4
    messages = []
    for words in (base + "/none.tar?signature=open", base + "/?signature=open"):
        server.listing = False
        with pytest.raises(DataError) as failed:
            expand(words)
        messages.append(str(failed.value))
    with pytest.raises(DataError) as failed:
        read(index.shards[0], 0, 100)
    assert failed.value.__suppress_context__  # a traceback shows no more than the message
    messages += [str(failed.value), repr(index.shards)]
    assert not any(secret in text for secret in ("sesame", "open", "me:") for text in messages)
    assert "sesame" not in (index.folder / "manifest.json").read_text()


def test_a_denied_bucket_says_where_credentials_go(bucket, monkeypatch):
    from aiobotocore.session import AioSession  # moto lets everybody in

    async def nobody(self: AioSession) -> None:
        return None

    monkeypatch.setattr(AioSession, "get_credentials", nobody)
    remote._connected.cache_clear()
    with pytest.raises(DataError, match=r"credentials.*AWS_PROFILE"):
        expand(bucket)
    remote._connected.cache_clear()


def test_reading_every_image_of_a_url_by_offset_is_refused(server, tmp_path):
    index = open_index(server.url, tmp_path / "i")
    with pytest.raises(RecipeError, match=r"request to http.* for every image.*data\.stage"):
        Loader(index, 0, read="offset")
    assert resolve_read(index, "offset", mirror=True) == "offset"


def test_a_url_needs_the_extra_and_nothing_else_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ResourceError, match=r"pip install 'deepclust\[remote\]'"):
        expand("s3://bucket/shards")
    with pytest.raises(ResourceError, match=r"deepclust\[remote\]"):
        expand("https://host/a.tar")
    code = "import sys, deepclust, deepclust.data.read.loader; sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_protocol_is_named():
    with pytest.raises(DataError, match=r"nosuch://x/a\.tar: .*s3://"):
        expand("nosuch://x/a.tar")


def test_a_stream_is_the_bytes_in_order_whatever_the_pieces(server, folder, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1000)
    data = (folder / "shard-000000.tar").read_bytes()
    pieces = list(stream(one(server), 17, 9_500))
    assert b"".join(pieces) == data[17:9_500]
    assert [len(piece) for piece in pieces] == [1000] * 9 + [483]
    assert list(stream(one(server), 5, 5)) == []
