"""A folder is deleted only when its owner is surely dead, and surely ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster_jobs.results.cluster_file import Options, cluster_features
from deepclust.data import owned_folder as owner
from deepclust.data.pack.pack import pack
from deepclust.data.process_identity import identity
from deepclust.data.shards.index import build_index
from tests.images import draw, encode, make_shards


def left(parent: Path, name: str = "kind-x", **changes: Any) -> Path:
    """A folder of a process that has ended, with changes in what it says of itself."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = parent / name
    folder.mkdir()
    me = {**identity(), "pid": ended.pid, "started": "1", **changes}
    (folder / owner.FILE).write_text(json.dumps(me))
    return folder


def test_the_folder_of_a_dead_process_goes_and_that_of_a_living_one_stays(tmp_path):
    dead, mine = left(tmp_path), owner.make_folder(tmp_path, "other")
    new = owner.make_folder(tmp_path, "kind")
    assert not dead.exists()
    assert mine.exists()
    assert new.stat().st_mode & 0o777 == 0o700
    assert owner.make_folder(tmp_path, "kind").exists()
    assert new.exists()


def test_a_pid_that_is_used_again_does_not_keep_a_folder(tmp_path):
    assert owner.is_orphan(left(tmp_path, pid=os.getpid()))


def test_a_reboot_ends_every_owner(tmp_path):
    assert owner.is_orphan(left(tmp_path, boot="earlier", pid=os.getpid()))


@pytest.mark.parametrize("changes", [{"pid_space": "pid:[1]"}, {"host": "elsewhere"}])
def test_an_owner_that_cannot_be_seen_from_here_keeps_its_folder(tmp_path, changes):
    assert not owner.is_orphan(left(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 3000, '{"pid": "x"}', "\0"])
def test_a_folder_that_does_not_say_whose_it_is_stays(tmp_path, text):
    folder = left(tmp_path)
    (folder / owner.FILE).write_text(text)
    assert not owner.is_orphan(folder)
    (folder / owner.FILE).unlink()
    assert not owner.is_orphan(folder)


def test_folders_of_other_users_and_links_stay(tmp_path, monkeypatch):
    folder, link = left(tmp_path), tmp_path / "kind-link"
    link.symlink_to(folder)
    assert not owner.is_orphan(link)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not owner.is_orphan(folder)


def test_what_a_killed_pack_index_or_cluster_left_goes_with_the_next_one(tmp_path):
    make_shards(tmp_path / "shards", n=40, shards=1, size=16)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(draw(0, 16, 16)))
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(50, 4)))
    makers = {
        tmp_path / "packed": lambda out: pack(tmp_path / "photos", out),
        tmp_path / "shards" / "deepclust-index": lambda out: build_index(out.parent),
        tmp_path / "clusters": lambda out: cluster_features(
            tmp_path / "rows.npy", out, Options(k=2, device="cpu")
        ),
    }
    for out, make in makers.items():
        dead = left(out.parent, f".{out.name}.123-abc.tmp")
        living = left(out.parent, f".{out.name}.124-abc.tmp", **identity())
        make(out)
        assert not dead.exists()
        assert living.exists()
        assert not (out / owner.FILE).exists()
        assert out.is_dir()
