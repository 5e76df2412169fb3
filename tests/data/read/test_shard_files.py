from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from deepclust.data.read import shard_files
from deepclust.data.read.shard_files import ShardFiles
from deepclust.data.shards.remote import Interrupted, UnreachableError
from deepclust.errors import DataError


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{i}.tar" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100 + b"end")
    return paths


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_bytes_are_those_at_the_offset(shards):
    files = ShardFiles(shards)
    assert files.read(3, 98, 5) == b"\3\3end"
    assert files.read(1, 0, 2) == b"\1\1"
    files.close()


def test_the_number_of_open_files_is_bounded(shards):
    before = open_files()
    files = ShardFiles(shards, keep_open=2)
    for i in (0, 1, 2, 3, 4, 0):
        assert files.read(i, 0, 1) == bytes([i])
    assert open_files() == before + 2
    files.release()
    assert open_files() == before + 2
    files.close()
    assert open_files() == before


def test_a_local_copy_is_read_when_there_is_one_and_released_after_the_batch(shards, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "2").write_bytes(b"copy")
    before, files = open_files(), ShardFiles(shards, cache)
    assert files.read(2, 0, 4) == b"copy"
    assert files.read(0, 0, 1) == b"\0"
    files.release()
    assert open_files() == before
    (cache / "2").unlink()
    assert files.read(2, 0, 1) == b"\2"
    files.close()


def test_another_process_gets_no_open_files(shards):
    files = ShardFiles(shards, keep_open=3)
    files.read(0, 0, 1)
    other = pickle.loads(pickle.dumps(files))
    assert (other.shards, other.keep_open, len(other._open)) == (shards, 3, 0)
    files.close()


def test_a_shard_that_was_cut_is_an_error_with_the_place(shards):
    with pytest.raises(DataError, match=r"3\.tar ends at byte 103, inside an image"):
        ShardFiles(shards).read(3, 100, 4)


def test_a_missing_shard_is_an_error_at_once(shards):
    shards[1].unlink()
    with pytest.raises(UnreachableError, match=r"1\.tar: No such file"):
        ShardFiles(shards).read(1, 0, 1)


def test_an_offset_that_no_file_can_have_is_an_error_at_once(shards):
    for offset in (2**63, -1, 2**63 - 1):
        with pytest.raises(UnreachableError, match=r"1\.tar"):
            ShardFiles(shards).read(1, offset, 1)


@pytest.mark.parametrize("change", ["cut", "grown", "replaced"])
def test_a_shard_of_another_size_than_was_indexed_is_never_read(shards, change):
    files = ShardFiles(shards, lengths=[103] * 5)
    assert files.read(0, 0, 1) == b"\0"
    new = {"cut": b"1" * 50, "grown": b"1" * 200, "replaced": b"2" * 104}[change]
    shards[2].unlink()
    shards[2].write_bytes(new)
    with pytest.raises(UnreachableError, match=r"2\.tar has \d+ bytes, and had 103"):
        files.read(2, 0, 1)
    files.close()


def test_a_shard_that_is_replaced_or_removed_while_it_is_open_is_read_on(shards):
    files = ShardFiles(shards, lengths=[103] * 5)
    assert files.read(3, 0, 1) == b"\3"
    shards[3].unlink()
    assert files.read(3, 98, 5) == b"\3\3end"
    files.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV])
def test_a_storage_that_fails_is_given_its_patience_and_then_stops_the_run(
    shards, monkeypatch, number
):
    def pread(handle: int, size: int, offset: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_files, "PAUSES_S", (0.01,))
    monkeypatch.setattr(os, "pread", pread)
    files = ShardFiles(shards, patience_s=0.1)
    with pytest.raises(UnreachableError, match=r"1\.tar: .*, again and again for 0 s"):
        files.read(1, 0, 1)
    assert not files._open
    files.stopped = lambda: True
    with pytest.raises(Interrupted):
        files.read(1, 0, 1)


def test_no_descriptor_left_frees_those_of_other_shards(shards, monkeypatch):
    files, real = ShardFiles(shards), os.open

    def limited(path: str, flags: int) -> int:
        if len(files._open) > 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags)

    monkeypatch.setattr(shard_files, "PAUSES_S", (0.0,))
    monkeypatch.setattr(os, "open", limited)
    assert [files.read(i, 0, 1) for i in range(5)] == [bytes([i]) for i in range(5)]
    files.close()


def test_a_transient_read_error_is_retried_with_a_new_handle(shards, monkeypatch):
    real, failures = os.pread, [errno.EIO, errno.ESTALE]

    def pread(handle: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return real(handle, size, offset)

    monkeypatch.setattr(shard_files, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "pread", pread)
    assert ShardFiles(shards).read(1, 0, 1) == b"\1"


def test_short_reads_are_put_together(shards, monkeypatch):
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, at: real(handle, min(size, 7), at))
    assert ShardFiles(shards).read(4, 90, 13) == b"\4" * 10 + b"end"
