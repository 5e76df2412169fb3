"""Which files a user's words for "my shards" mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepclust.data.read.mirror import mirror_shards
from deepclust.data.shards.find import beside, common_folder, expand
from deepclust.data.shards.index import build_index, open_index
from deepclust.errors import DataError
from tests.images import make_shards


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_folder_gives_its_tars_by_name_and_leaves_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.tar", "a.tar", "a.tar.gz", "dataset.json", "._a.tar", ".b.tar")
    assert names(expand(tmp_path)) == ["a.tar", "b.tar"]
    assert all(path.is_absolute() for path in expand(tmp_path))


def test_a_single_tar_is_a_set_of_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.tar")
    assert names(expand(tmp_path / "b.tar")) == ["b.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train-{000..002}.tar", ["train-000.tar", "train-001.tar", "train-002.tar"]),
        ("{val,train}-001.tar", ["train-001.tar", "val-001.tar"]),
        ("{train,val}-{001..001}.tar", ["train-001.tar", "val-001.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "train-000.tar", "train-001.tar", "train-002.tar", "val-001.tar")
    assert names(expand(f"{tmp_path}/{pattern}")) == expected


def test_a_pattern_over_two_folders_has_their_parent_in_common(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.tar", "y/b.tar")
    shards = expand(f"{tmp_path}/{{x/a,y/b}}.tar")
    assert common_folder(shards) == tmp_path


def test_a_missing_shard_of_a_pattern_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "s-0.tar", "s-2.tar")
    with pytest.raises(DataError, match=r"no shard .*s-1\.tar .*the pattern"):
        expand(f"{tmp_path}/s-{{0..2}}.tar")


def test_a_folder_without_shards_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shards .*deepclust pack"):
        expand(touch(tmp_path, "a.jpg"))


def test_a_folder_of_compressed_shards_says_to_unpack_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gunzip a\.tar\.gz"):
        expand(touch(tmp_path, "a.tar.gz"))


def test_a_folder_of_folders_gives_the_shards_in_them_though_links_go_round(tmp_path: Path) -> None:
    touch(tmp_path, "0/100.tar", "1/201.tar", "1/x/302.tar", "1/note.txt", ".hidden/9.tar")
    (tmp_path / "1" / "up").symlink_to(tmp_path)
    assert names(expand(tmp_path)) == ["100.tar", "201.tar", "302.tar"]


@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar", "{0,1}", "{0,1}/*.tar", "**"])
def test_stars_and_braces_of_folders_name_shards_in_subfolders(
    tmp_path: Path, pattern: str
) -> None:
    touch(tmp_path, "0/100.tar", "1/201.tar", "1/201.json")
    assert names(expand(f"{tmp_path}/{pattern}")) == ["100.tar", "201.tar"]


def test_a_list_of_folders_and_patterns_is_one_set(tmp_path: Path) -> None:
    touch(tmp_path, "x/b.tar", "y/a.tar", "y/c.tar")
    both = expand([tmp_path / "x", f"{tmp_path}/y/{{a,c}}.tar"])
    assert names(both) == ["a.tar", "b.tar", "c.tar"]
    with pytest.raises(DataError, match="empty list"):
        expand([])


def test_what_looks_like_a_shard_and_is_not_read_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "B.TAR", "c.tar.gz", "d.tgz", "more/e.tar", "f.tar.zst")
    assert names(expand(tmp_path)) == ["a.tar"]
    told = str(beside(tmp_path))
    assert "3 x compressed shard: unpack it: c.tar.gz, d.tgz, f.tar.zst" in told
    assert "B.TAR" in told
    assert "more/e.tar" in told


def test_a_folder_of_shards_in_capitals_is_read(tmp_path: Path) -> None:
    assert names(expand(touch(tmp_path, "A.TAR", "b.Tar"))) == ["A.TAR", "b.Tar"]


@pytest.mark.parametrize("by", ["s.tar", "*.tar", ""])
def test_a_link_that_leads_nowhere_is_named_as_such(tmp_path: Path, by: str) -> None:
    (tmp_path / "s.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"s\.tar"):
        open_index(f"{tmp_path}/{by}")


@pytest.mark.parametrize("inside", ["0..99999999999999999999", "9..0", "0..999999999"])
def test_a_range_that_cannot_be_meant_is_refused(tmp_path: Path, inside: str) -> None:
    with pytest.raises(DataError, match="first and the last shard"):
        expand(f"https://host/s-{{{inside}}}.tar")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shard .*nowhere"):
        expand(tmp_path / "nowhere")


def test_shards_of_one_base_name_are_known_by_their_folders(tmp_path: Path) -> None:
    for name in ("x", "y"):
        make_shards(tmp_path / "d" / name, n=8, shards=2)
    (tmp_path / "d/x/shard-000001.tar").unlink()
    index = open_index(f"{tmp_path}/d/{{x,y}}/*.tar")
    assert index.names == ["x/shard-000000.tar", "y/shard-000000.tar", "y/shard-000001.tar"]
    assert "x/shard-000000.tar, key" in index.where(0)
    stage = mirror_shards(index, tmp_path / "stage")
    assert [shard.name for shard in stage.shards] == [n.replace("/", "%2F") for n in index.names]
    assert stage.shards[1].read_bytes() == index.shards[1].read_bytes()
    (tmp_path / "d").rename(tmp_path / "moved")
    moved = open_index({f"{tmp_path}/moved/y": 2.0, f"{tmp_path}/moved/x": 1.0}, tmp_path / "i")
    assert moved.fingerprint == index.fingerprint
    assert moved.source_ids.tolist() == [1] * 4 + [0] * 8
    assert build_index(f"{tmp_path}/moved", verify=False).fingerprint == index.fingerprint
    build_index(f"{tmp_path}/moved", verify=True)


def test_a_shard_that_is_given_twice_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.tar")
    with pytest.raises(DataError, match=r"a\.tar is given 2 times"):
        expand([f"{tmp_path}/a.tar", tmp_path])


@pytest.mark.parametrize(
    "words",
    ["pipe:touch {marker}", "pipe:cat {marker}", "file:///a", "local:///a"],
)
def test_pipes_are_refused_and_nothing_runs(tmp_path: Path, words: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(DataError, match="pipes are not supported"):
        expand(words.format(marker=marker))
    assert not marker.exists()


def test_paths_and_urls_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tar")
    monkeypatch.setattr("deepclust.data.shards.remote.with_sizes", list)
    with pytest.raises(DataError, match="either paths or URLs"):
        expand([tmp_path, "s3://x/b.tar"])


def test_a_name_that_is_too_long_is_an_error_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name too long"):
        expand(tmp_path / ("x" * 300))


def test_numbers_of_different_tables_of_classes_are_no_labels(tmp_path: Path) -> None:
    for name in ("x", "y"):
        make_shards(tmp_path / name, n=8, shards=2)
    names = json.loads((tmp_path / "x/dataset.json").read_text())["class_names"]
    same = open_index([f"{tmp_path}/x", f"{tmp_path}/y"])
    assert same.class_names == names
    assert same.labels is not None
    (tmp_path / "y/dataset.json").write_text(json.dumps({"class_names": names[::-1]}))
    other = open_index([f"{tmp_path}/x", f"{tmp_path}/y"])
    assert other.labels is None
    assert other.fingerprint == same.fingerprint
    assert "Pack the sources together" in other.notes(labels=False)[0]
