"""The index: ids, keys, labels, fingerprint, and an error for everything that would mislead."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from deepclust.data.shards import index_build
from deepclust.data.shards.fields import DEFAULT
from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.data.shards.left_out import Tally
from deepclust.data.shards.scan import Scan, scan
from deepclust.errors import DataError, DiskError
from tests.images import draw, encode, make_shards, write_tar

IMAGE = encode(draw(0, 8, 8))
ODD_KEYS = ["a", "b c", "日本/語", "f.older/k", "x-1_(2)", "/".join(["long name"] * 30), "z"]


def sample(key: str, *, image: bytes = IMAGE, cls: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image)] + ([(f"{key}.cls", cls)] if cls is not None else [])


def shard(folder: Path, *samples: list[tuple[str, bytes]], name: str = "s.tar") -> Path:
    write_tar(folder / name, [member for members in samples for member in members])
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", n=22, shards=4, classes=3, size=8)


def test_ids_are_shard_base_plus_position(shards: Path) -> None:
    index = open_index(shards)
    assert len(index) == 22
    assert index.bases.tolist() == [0, 6, 12, 18, 22]
    assert list(index.keys) == [f"{i:07d}" for i in range(22)]
    assert index.labels is not None
    assert index.labels.tolist() == [i % 3 for i in range(22)]
    assert index.class_names == ["class 0", "class 1", "class 2"]


def test_located_bytes_are_the_images(shards: Path) -> None:
    index = open_index(shards)
    ids = np.random.default_rng(0).permutation(22)
    for i, shard, offset, size in zip(ids, *index.locate(ids), strict=True):
        data = index.shards[shard].read_bytes()[offset : offset + size]
        assert data == encode(draw(i, 8, 8, i % 3))


def test_webdataset_yields_the_same_keys_in_the_same_order(tmp_path: Path) -> None:
    shard(tmp_path, *(sample(key, cls=b"1") for key in ODD_KEYS), name="s-0.tar")
    shard(tmp_path, *(sample(key) for key in reversed(ODD_KEYS)), name="s-1.tar")
    theirs = []
    for path in open_index(tmp_path).shards:
        with open(path, "rb") as stream:  # WebDataset(urls) would leave it open
            files = tar_file_expander([{"url": path.name, "stream": stream}])
            theirs += [sample["__key__"] for sample in group_by_keys(files)]
    assert list(open_index(tmp_path).keys) == theirs


def test_keys_are_a_sequence(shards: Path) -> None:
    keys = open_index(shards).keys
    assert (keys[7], keys[-1], keys[4:8:2]) == ("0000007", "0000021", ["0000004", "0000006"])
    with pytest.raises(IndexError):
        keys[22]


def test_keys_of_samples_are_in_their_order_and_read_a_shard_once(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, read = open_index(shards).keys, []
    whole = keys._shard
    monkeypatch.setattr(keys, "_shard", lambda shard: read.append(shard) or whole(shard))
    ids = np.array([21, 0, 13, 1, 0])
    assert keys.of(ids) == ["0000021", "0000000", "0000013", "0000001", "0000000"]
    assert len(read) == len(set(read))
    assert keys.of(np.zeros(0, np.int64)) == []


def test_where_names_shard_key_and_offset(shards: Path) -> None:
    index = open_index(shards)
    offset = int(index.offsets[13])
    assert index.where(13) == f"shard-000002.tar, key '0000013', offset {offset}"


def test_a_pickled_index_opens_the_files_again(shards: Path) -> None:
    index = open_index(shards)
    data = pickle.dumps(index)
    again = pickle.loads(data)
    assert len(data) < 2000
    assert (again.fingerprint, again.where(21)) == (index.fingerprint, index.where(21))


def test_the_fingerprint_knows_no_path_and_no_time(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy", ignore=lambda *_: ["deepclust-index"])
    assert open_index(copy).fingerprint == open_index(shards).fingerprint


def renamed_shard(folder: Path) -> None:
    (folder / "shard-000001.tar").rename(folder / "shard-000009.tar")


def renamed_key(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    other = [(f"other{i}.png", encode(draw(i, 8, 8, i % 3))) for i in range(6)]
    write_tar(path, other)


@pytest.mark.parametrize("change", [renamed_shard, renamed_key])
def test_the_fingerprint_changes_with_names_and_keys(
    shards: Path, change: Callable[[Path], None]
) -> None:
    before = open_index(shards).fingerprint
    change(shards)
    assert build_index(shards).fingerprint != before


def test_building_again_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    one, two = build_index(shards, tmp_path / "1"), build_index(shards, tmp_path / "2")
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == ["keys.parquet", "labels.npy", "manifest.json", "offsets.npy", "sizes.npy"]
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_threads_give_the_same_index(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = build_index(shards).fingerprint
    monkeypatch.setattr("deepclust.data.shards.scan._WORTH_THREADS", 0)
    assert build_index(shards).fingerprint == alone


def test_keys_leave_the_memory_when_they_are_written(tmp_path: Path) -> None:
    """Those of 100M samples take more than all else."""
    held, kept = [], pa.total_allocated_bytes()

    def scans(count: int = 40, samples: int = 5_000) -> Iterator[Scan]:
        for one in range(count):
            held.append(pa.total_allocated_bytes() - kept)
            offsets, sizes = np.arange(samples, dtype=np.uint64), np.full(samples, 9, np.uint32)
            keys = pa.array([f"{one}/{i:060d}" for i in range(samples)])
            labels = np.full(samples, one, np.int32)
            yield Scan(f"{one}.tar", 9, f"{one:032x}", keys, offsets, sizes, labels, {})

    index_build.fill(tmp_path, scans(), DEFAULT, Tally())
    assert max(held[-5:]) < 5 * 5_000 * 60
    np.save(tmp_path / "whole.npy", np.arange(40, dtype=np.int32).repeat(5_000))
    assert (tmp_path / "labels.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_an_index_costs_some_25_bytes_a_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [(f"{i:09d}.png", b"x") for i in range(5000)])
    folder = open_index(tmp_path).folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 26 * 5000


def test_a_subset_has_its_own_index_and_the_whole_set_one(shards: Path) -> None:
    part = open_index(f"{shards}/shard-00000{{0..1}}.tar")
    whole = open_index(f"{shards}/shard-00000{{0..3}}.tar")
    assert part.folder.name.startswith("deepclust-index-")
    assert len(part) == 12
    assert whole.folder == shards / "deepclust-index" == open_index(shards).folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: renamed_shard(f), r"shard-000001\.tar is gone"),
        (lambda f: shutil.copy(f / "shard-000001.tar", f / "a.tar"), r"a\.tar is new"),
        (lambda f: renamed_key(f), r"shard-000001\.tar had \d+ bytes and now has \d+"),
    ],
)
def test_shards_that_changed_since_the_index_are_refused(
    shards: Path, damage: Callable[[Path], object], message: str
) -> None:
    open_index(shards)
    damage(shards)
    with pytest.raises(DataError, match=f"{message}.*deepclust index SHARDS"):
        open_index(shards)
    assert len(build_index(shards)) >= 22  # says what it would take, and it does


def test_other_members_in_a_shard_of_equal_size_are_noticed(shards: Path) -> None:
    build_index(shards)
    assert len(build_index(shards, verify=True)) == 22
    path = shards / "shard-000002.tar"
    path.write_bytes(
        make_shards(shards.parent / "x", n=6, shards=1, size=8)
        .joinpath("shard-000000.tar")
        .read_bytes()
    )
    with pytest.raises(DataError, match=r"shard-000002\.tar holds other members"):
        open_index(shards)  # it was written after the index
    os.utime(path, (0, 0))
    assert len(open_index(shards)) == 22  # an old time hides it from all but --verify
    with pytest.raises(DataError, match=r"shard-000002\.tar holds other members"):
        build_index(shards, verify=True)


def test_verify_without_an_index_says_so(shards: Path) -> None:
    with pytest.raises(DataError, match=r"no index in .*deepclust index"):
        build_index(shards, verify=True)


def test_a_folder_that_cannot_be_written_says_how_to_place_the_index(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mkdir = Path.mkdir

    def read_only(path: Path, *args: object, **options: object) -> None:
        if shards in path.parents:
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DiskError, match=r"Read-only file system.*data\.index=FOLDER"):
        open_index(shards)
    assert len(open_index(shards, tmp_path / "elsewhere")) == 22
    assert (
        len(Index(tmp_path / "elsewhere", open_index(shards, tmp_path / "elsewhere").shards)) == 22
    )


def test_an_index_never_replaces_a_folder_of_other_things(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(DataError, match="holds files that are not an index"):
        build_index(shards, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_damaged_index_is_named(shards: Path) -> None:
    folder = open_index(shards).folder
    np.save(folder / "sizes.npy", np.zeros(3, np.uint32))
    with pytest.raises(DataError, match=r"damaged: sizes\.npy had 216 bytes .*deepclust index"):
        open_index(shards)
    assert len(build_index(shards)) == 22


def test_a_sample_without_a_good_image_keeps_its_id_and_is_excluded(tmp_path: Path) -> None:
    shard(tmp_path, sample("a"), [("b.txt", b"x"), ("b.cls", b"4")], sample("c", image=b""))
    index = open_index(tmp_path)
    assert list(index.keys) == ["a", "b", "c"]
    assert index.excluded == {1: "no image member, only .txt, .cls", 2: "image of 0 bytes"}
    assert index.labels is not None
    assert index.labels.tolist() == [-1, 4, -1]


def test_shards_without_any_image_are_an_error(tmp_path: Path) -> None:
    shard(tmp_path, [("a.txt", b"x")], [("b.txt", b"y")])
    with pytest.raises(DataError, match=r"none of the 2 samples has an image .*\.jpg"):
        open_index(tmp_path)


def test_a_tar_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s\.tar: holds no samples"):
        open_index(shard(tmp_path))


def test_a_key_that_comes_back_is_an_error_with_shard_key_offset_and_fix(tmp_path: Path) -> None:
    shard(tmp_path, [("a.png", IMAGE), ("b.png", IMAGE), ("a.cls", b"0")])
    with pytest.raises(
        DataError, match=r"s\.tar: key 'a' appears again at offset \d+.*--sort=name"
    ):
        open_index(tmp_path)


@pytest.mark.parametrize("between", [[], sample("b")])
def test_two_samples_of_a_shard_with_one_key_are_an_error(
    tmp_path: Path, between: list[tuple[str, bytes]]
) -> None:
    shard(tmp_path, sample("a"), between, sample("a"))
    with pytest.raises(DataError, match=r"key 'a' names two samples.*offset \d+"):
        open_index(tmp_path)


def test_one_key_in_two_shards_is_legal(tmp_path: Path) -> None:
    shard(tmp_path, sample("a"), name="s-0.tar")
    shard(tmp_path, sample("a"), name="s-1.tar")
    assert list(open_index(tmp_path).keys) == ["a", "a"]


def test_labels_come_from_cls_or_json_and_the_rest_is_unknown(tmp_path: Path) -> None:
    fields = [{"label": 3}, {"class": 5, "caption": "x"}, {"label": "cat"}, {"label": True}, [1]]
    samples = [[("c.png", IMAGE), ("c.cls", b" 7\n")], sample("d")]
    for i, field in enumerate(fields):
        samples.append([*sample(f"j{i}"), (f"j{i}.json", json.dumps(field).encode())])
    labels = open_index(shard(tmp_path, *samples)).labels
    assert labels is not None
    assert labels.tolist() == [7, -1, 3, 5, -1, -1, -1]


def test_shards_without_labels_have_none(tmp_path: Path) -> None:
    index = open_index(make_shards(tmp_path, n=4, shards=1, size=8, labels=False))
    assert index.labels is None
    assert index.class_names is None


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"-2", b"99999999999", b"\xff", b"1_0"])
def test_a_label_that_cannot_be_read_is_no_label_and_is_counted(
    tmp_path: Path, text: bytes
) -> None:
    index = open_index(shard(tmp_path, sample("a", cls=text), sample("b", cls=b"3")))
    assert index.labels is not None
    assert index.labels.tolist() == [-1, 3]
    (note,) = index.notes()
    assert re.match(r"1 of 2 samples have no label: 1 x .*: a$", note)


@pytest.mark.parametrize("text", [b"{", b"", b"[" * 100_000, b" " * (1 << 20) + b"{}"])
def test_json_that_cannot_be_read_is_no_label(tmp_path: Path, text: bytes) -> None:
    index = open_index(shard(tmp_path, [*sample("a"), ("a.json", text)]))
    assert index.labels is None
    assert "1 of 1 samples have no label" in index.notes()[0]


def test_fewer_class_names_than_labels_are_an_error(shards: Path) -> None:
    (shards / "dataset.json").write_text('{"class_names": ["cat"]}')
    with pytest.raises(DataError, match="names 1 classes, but labels reach 2"):
        _ = open_index(shards).class_names


def test_a_pickle_in_a_shard_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple:
            return marker.touch, ()

    names = ("pyd", "pth", "pickle", "npy")
    members = [(f"a.{name}", pickle.dumps(Trap())) for name in names]
    assert len(open_index(shard(tmp_path, [*sample("a"), *members]))) == 1
    assert not marker.exists()


def test_hidden_and_meta_members_are_not_samples(tmp_path: Path) -> None:
    names = ["._a.png", "f/._b.png", "__meta__/x.png", "__info__", "README", "a.png", "A.PNG"]
    shard(tmp_path, [(name, IMAGE) for name in names])
    assert scan(tmp_path / "s.tar").keys.to_pylist() == ["a", "A"]


def test_a_copy_of_the_shards_is_checked_once_and_keeps_the_fingerprint(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", n=8, shards=1)
    before = open_index(folder).fingerprint
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes())
    assert open_index(folder).fingerprint == before
    manifest = folder / "deepclust-index" / "manifest.json"
    assert manifest.stat().st_mtime_ns >= shard.stat().st_mtime_ns
