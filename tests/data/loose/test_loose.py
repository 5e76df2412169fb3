"""Image folders and lists as `data.shards`: the ids of `pack`, the files where they lie."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.loose.index import FileIndex
from deepclust.data.pack.pack import pack
from deepclust.data.read.dataset import Batches, Request
from deepclust.data.read.image_files import open_images
from deepclust.data.read.loader import resolve_read
from deepclust.data.read.mirror import mirror_shards
from deepclust.data.shards.check import LabelsChangedError
from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import DataError, DiskError, MissingError, RecipeError
from deepclust.files import open_append
from tests.images import draw, encode, make_shards

KINDS = ("png", "jpg", "webp", "gif", "tiff")


def photos(folder: Path, n: int = 40) -> Path:
    """Images of five formats in two classes, and everything that people have beside them."""
    for i in range(n):
        file = folder / f"c{i % 2}" / f"my {i}.{KINDS[i % 5]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(draw(i, 8, 8, i % 2), KINDS[i % 5]))
    odd = {"x" * 120: "png", "हिन्दी": "png", "é": "jpg", "my 0": "jpg"}
    for name, kind in odd.items():
        (folder / "c0" / f"{name}.{kind}").write_bytes(encode(draw(99, 8, 8), kind))
    (folder / "c1/empty.jpg").write_bytes(b"")
    (folder / "c1/damaged.gif").write_bytes(b"GIF89a")
    (folder / "top.jfif").write_bytes(encode(draw(98, 8, 8), "jpg"))
    (folder / "notes.txt").write_bytes(b"nothing")
    return folder


def rows_of(folder: Path) -> list[tuple[str, str]]:
    return [(f"photos/c{i % 2}/my {i}.{KINDS[i % 5]}", f"class{i % 2}") for i in range(40)]


def in_folder(folder: Path) -> Path:
    return folder / "photos"


def in_list(folder: Path) -> Path:
    (folder / "a.txt").write_text("".join(f"{p}\t{w}\n" for p, w in rows_of(folder)))
    return folder / "a.txt"


def in_csv(folder: Path) -> Path:
    lines = "".join(f"{p},{w[-1]}\n" for p, w in [*rows_of(folder), ("gone.png", "class1")])
    (folder / "a.csv").write_text("path,label\n" + lines)
    return folder / "a.csv"


def in_parquet(folder: Path) -> Path:
    names, words = zip(*rows_of(folder), strict=True)
    pq.write_table(pa.table({"path": names, "label": words}), folder / "a.parquet")
    return folder / "a.parquet"


def same(one: Index, other: Index) -> bool:
    assert one.fingerprint == other.fingerprint
    assert one.manifest["shards"] == other.manifest["shards"]
    assert list(one.keys) == list(other.keys)
    assert one.excluded == other.excluded
    assert one.class_names == other.class_names
    assert (one.labels is None) == (other.labels is None)
    return one.labels is None or np.array_equal(one.labels, other.labels)


def bytes_of(index: Index) -> list[bytes]:
    files = open_images(index)
    places = zip(*index.locate(np.arange(len(index))), strict=True)
    return [files.read(*map(int, place)) for place in places]


@pytest.mark.parametrize("made", [in_folder, in_list, in_csv, in_parquet])
def test_images_in_place_have_the_ids_and_bytes_of_packed_ones(tmp_path: Path, made) -> None:
    photos(tmp_path / "photos")
    source = made(tmp_path)
    packed, loose = pack(source, tmp_path / "out"), open_index(source)
    assert isinstance(loose, FileIndex)
    assert same(loose, packed)
    assert bytes_of(loose) == bytes_of(packed)
    assert same(build_index(source, verify=True), packed)
    again = pickle.loads(pickle.dumps(loose))
    assert again.where(3) == loose.where(3)
    assert str(loose.paths[3]) in loose.where(3)


def test_what_is_left_out_of_a_folder_is_counted_and_the_index_is_not(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    notes = " ".join(open_index(folder).notes())
    assert "1 x .txt: notes.txt" in notes
    assert "1 x that cannot be converted: c1/damaged.gif" in notes
    assert "same name" in notes
    assert " ".join(build_index(folder).notes()) == notes
    lines: list[str] = []
    pack(folder, tmp_path / "out", emit=lines.append)
    assert "left out: 2 files" in lines


@pytest.mark.parametrize("labels", ["none", "last", "names"])
def test_classes_go_by_the_rules_of_pack(tmp_path: Path, labels: str) -> None:
    folder = photos(tmp_path / "photos")
    if labels == "names":
        (tmp_path / "Names.txt").write_text("c1\nc0\n")
        labels = str(tmp_path / "Names.txt")
    if labels != "none":
        packed = pack(folder, tmp_path / "out", classes=labels)
        assert same(open_index(folder, labels=labels), packed)
        return
    unlabelled, labelled = open_index(folder, labels="none"), open_index(folder)
    assert unlabelled.labels is None
    assert unlabelled.fingerprint == labelled.fingerprint  # a run meets its labels later
    assert len(list(folder.glob("deepclust-index*"))) == 1


def test_labels_that_cannot_be_read_end_no_run_that_needs_none(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    lines = "".join(f"{p},{w if i else 3}\n" for i, (p, w) in enumerate(rows_of(tmp_path)))
    (tmp_path / "a.csv").write_text("path,label\n" + lines)
    with pytest.raises(DataError, match="some are not"):
        open_index(tmp_path / "a.csv")
    assert open_index(tmp_path / "a.csv", labels="none").labels is None
    assert open_index(tmp_path / "a.csv", labels="none", build=False).labels is None


def test_a_file_that_is_new_gone_or_changed_is_named_when_the_index_is_opened(
    tmp_path: Path,
) -> None:
    folder = photos(tmp_path / "photos")
    open_index(folder)
    later = (folder / "deepclust-index/manifest.json").stat().st_mtime + 100
    new = folder / "c0/new.png"
    shutil.copy(folder / "c0/my 0.png", new)
    os.utime(folder / "c0", (later, later))
    with pytest.raises(DataError, match=r"not those that were indexed.*c0/new\.png is new"):
        open_index(folder)
    new.rename(tmp_path / "new.png")
    os.utime(folder / "c0", (later, later))
    assert open_index(folder).fingerprint  # as before: only the folder's time is another
    (folder / "c0/my 10.png").write_bytes(encode(draw(5, 9, 9)))
    os.utime(folder / "c0", (later + 200, later + 200))
    os.utime(folder / "c0/my 10.png", (later + 200, later + 200))
    with pytest.raises(DataError, match=r"my 10\.png had .* bytes and now has"):
        open_index(folder)
    (folder / "c0/my 10.png").unlink()
    with pytest.raises(DataError, match=r"c0/my 10\.png is gone"):
        open_index(folder)


def test_changed_labels_of_a_list_are_read_again(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    source = in_csv(tmp_path)
    index = open_index(source)
    source.write_text(source.read_text().replace("my 0.png,0", "my 0.png,1"))
    later = (index.folder / "manifest.json").stat().st_mtime + 100
    os.utime(source, (later, later))
    with pytest.raises(LabelsChangedError, match=r"a\.csv"):
        open_index(source, build=False)
    again = open_index(source)
    assert again.fingerprint == index.fingerprint
    assert int((again.labels != index.labels).sum()) == 1  # type: ignore[operator]


def test_a_file_that_vanishes_or_changes_is_one_bad_image_and_a_lost_folder_stops(
    tmp_path: Path,
) -> None:
    folder = photos(tmp_path / "photos")
    index = open_index(folder)
    ids = np.arange(len(index))
    names = {index.paths[i].name: i for i in ids}  # type: ignore[attr-defined]
    (folder / "c0/my 0.png").unlink()
    (folder / "c1/my 5.png").write_bytes(encode(draw(5, 9, 9)))
    crops = (Crop(CentreCrop(8, 8), None),)
    loaded = Batches(index)[Request(ids, ids, 0, crops)]
    reasons = {bad.sample_id: bad.reason for bad in loaded.bad}
    gone, other = reasons[names["my 0.png"]], reasons[names["my 5.png"]]
    assert "photos/c0/my 0.png" in gone
    assert "No such file" in gone
    assert "when it was indexed" in other
    assert len(reasons) == 3  # and the empty one, which the index excludes
    folder.rename(tmp_path / "away")
    with pytest.raises(UnreachableError, match="Finished work is kept"):
        Batches(index)[Request(ids, ids, 0, crops)]


def test_what_image_files_do_not_have_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    index = open_index(folder)
    with pytest.raises(RecipeError, match=r"data\.read=block"):
        resolve_read(index, "block")
    assert resolve_read(index, "auto") == "offset"
    with pytest.raises(RecipeError, match=r"data\.stage"):
        mirror_shards(index, tmp_path / "stage")
    with pytest.raises(RecipeError, match=r"data\.image"):
        open_index(folder, image="input.jpg")
    with pytest.raises(RecipeError, match=r"data\.labels=cls"):
        open_index(folder, labels="cls")
    with pytest.raises(MissingError):
        open_index(folder, tmp_path / "elsewhere", build=False)
    with pytest.raises(DataError, match="some are shards"):
        open_index([str(folder), str(make_shards(tmp_path / "tars", n=8))])


def test_images_that_are_no_files_are_packed_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("c0/a.png", encode(draw(1, 8, 8)))
    table = pa.table({"image": [{"bytes": encode(draw(1, 8, 8)), "path": "a.png"}]})
    pq.write_table(table, tmp_path / "b.parquet")
    for name in ("a.zip", "b.parquet"):
        with pytest.raises(DataError, match=rf"deepclust pack .*{name} OUT"):
            open_index(tmp_path / name)
        assert len(pack(tmp_path / name, tmp_path / f"out-{name}")) == 1


def test_several_folders_are_one_as_they_are_packed_together(tmp_path: Path) -> None:
    a, b = photos(tmp_path / "a"), photos(tmp_path / "b", 12)
    (b / "c2").mkdir()
    (b / "c2/only.png").write_bytes(encode(draw(3, 8, 8)))
    lines: list[str] = []
    packed = pack([a, b], tmp_path / "out", emit=lines.append)
    loose = open_index({str(a): 2.0, str(b): 1.0})
    assert same(loose, packed)
    assert loose.class_names == ["c0", "c1", "c2"]
    assert {key.partition("/")[0] for key in loose.keys} == {"a", "b"}
    assert any("key in common" in line for line in lines)
    of_b = [key.startswith("b/") for key in loose.keys]
    assert loose.source_ids.tolist() == [int(one) for one in of_b]
    assert bytes_of(loose) == bytes_of(packed)


def test_the_bytes_of_images_are_compared_where_they_were_hashed(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 10)
    build_index(folder, bodies=True)
    build_index(folder, verify=True)
    file = folder / "c0/my 0.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="other bytes"):
        build_index(folder, verify=True)


def test_a_folder_that_cannot_be_written_to_says_where_the_index_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "photos", 4)

    def refuse(path: Path) -> object:
        if "photos" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return open_append(path)

    monkeypatch.setattr("deepclust.data.shards.file_lock.open_append", refuse)
    with pytest.raises(DiskError, match=r"data\.index=FOLDER"):
        open_index(folder)
    assert len(open_index(folder, tmp_path / "elsewhere")) == 10
