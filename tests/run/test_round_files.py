"""Readers of a round's folder, of rounds written now and by older versions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from deepclust.errors import DataError
from deepclust.files import write_json
from deepclust.run.directory import seal
from deepclust.run.round_files import find_whitening, read_array, read_excluded, read_kept


def test_kept_of_a_round_before_heads_has_one_head(tmp_path: Path) -> None:
    assert read_kept(a_round(tmp_path / "a", {})) is None
    before = a_round(tmp_path / "b", {"kept.npy": np.array([True, False])})
    assert np.array_equal(read_kept(before), [[True, False]])
    now = a_round(tmp_path / "c", {"kept.npy": np.zeros((3, 2), bool)})
    assert np.array_equal(read_kept(now), np.zeros((3, 2), bool))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "pipe", "unlisted"])
def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path: Path, damage: str) -> None:
    stage = a_round(tmp_path, {"assignments.npy": np.zeros((1, 9), np.int32)}) / "assignments"
    file = stage / "assignments.npy"
    data = file.read_bytes()
    file.unlink()
    if damage == "flip":
        file.write_bytes(data[:-1] + b"\1")
    elif damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "unlisted":
        file.write_bytes(data)
        write_json(stage / "manifest.json", {"inputs": {}, "files": {}})
    with pytest.raises(DataError, match=r"assignments\.npy"):
        read_array(stage, "assignments.npy")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 1}', "[" * 9999, "\udcff"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    stage = a_round(tmp_path, {}) / "assignments"
    (stage / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_array(stage, "assignments.npy")


def a_round(folder: Path, files: dict[str, np.ndarray]) -> Path:
    """A round with a sealed stage `assignments`."""
    (folder / "assignments").mkdir(parents=True)
    for name, array in files.items():
        np.save(folder / "assignments" / name, array)
    seal(folder / "assignments", {})
    return folder


def test_a_round_without_whitening_or_exclusions_has_none(tmp_path: Path) -> None:
    assert find_whitening(tmp_path) is None
    assert read_excluded(a_round(tmp_path, {}) / "assignments") == {}
