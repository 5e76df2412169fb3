"""Readers of a round's folder, of rounds written now and by older versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepclust.run.round_files import find_whitening, read_excluded, read_kept


def test_kept_of_a_round_before_heads_has_one_head(tmp_path: Path) -> None:
    (tmp_path / "assignments").mkdir()
    assert read_kept(tmp_path) is None
    np.save(tmp_path / "assignments" / "kept.npy", np.array([True, False]))
    assert np.array_equal(read_kept(tmp_path), [[True, False]])
    np.save(tmp_path / "assignments" / "kept.npy", np.zeros((3, 2), bool))
    assert np.array_equal(read_kept(tmp_path), np.zeros((3, 2), bool))


def test_a_round_without_whitening_or_exclusions_has_none(tmp_path: Path) -> None:
    assert find_whitening(tmp_path) is None
    assert read_excluded(tmp_path) == {}
