from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from deepclust.errors import DiskError
from deepclust.files import (
    append_json,
    atomic_file,
    atomic_folder,
    disk_errors,
    file_hash,
    read_json,
    read_jsonl,
    write_json,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with pytest.raises(FileNotFoundError), atomic_file(target) as partial:
        partial.with_suffix(".gone").read_text()
    assert read_json(target) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_the_fence_refuses_does_not_appear(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        atomic_folder(tmp_path / "stage", lambda folder: (folder / "x").touch(), refuse)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_disk_error_that_names_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"(?s)stage.*Free some space"),
        disk_errors(tmp_path / "stage"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    append_json(file, {"a": 1})
    with open(file, "a") as out:
        out.write('{"b":')
    assert read_jsonl(file) == [{"a": 1}]


def test_the_hash_depends_on_every_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    before = file_hash(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"x" * 99_999 + b"y")
    assert file_hash(tmp_path / "a") != before
