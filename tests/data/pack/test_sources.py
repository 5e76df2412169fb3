"""Lists, tables, archives and idx files: the same images, whatever they come in."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepclust.data.pack.blobs import Blobs
from deepclust.data.pack.image_sources import open_source
from deepclust.data.pack.pack import pack
from deepclust.errors import DataError, DiskError, RecipeError
from tests.data.pack.test_pack import tree
from tests.data.pack.test_walk import PNG, packed, put
from tests.images import draw, encode

N = 8
IMAGES = [encode(draw(i, 8, 8)) for i in range(N)]
NAMES = [f"photos/c{i % 2}/my {i}.png" for i in range(N)]
KEYS = {f"c{i % 2}/my_{i}": i % 2 for i in range(N)}


def in_folder(folder: Path) -> Path:
    for name, data in zip(NAMES, IMAGES, strict=True):
        put(folder / name, data)
    return folder / "photos"


def in_list(folder: Path) -> Path:
    in_folder(folder)
    return put(
        folder / "a.txt", "".join(f"{name} {i % 2}\r\n" for i, name in enumerate(NAMES)).encode()
    )


def in_mxnet(folder: Path) -> Path:
    in_folder(folder)
    return put(
        folder / "a.lst", "".join(f"{i}\t{i % 2}\t{n}\n" for i, n in enumerate(NAMES)).encode()
    )


def in_csv(folder: Path) -> Path:
    in_folder(folder)
    rows = "".join(f'{i};"{name}";c{i % 2}\n' for i, name in enumerate(NAMES))
    return put(folder / "a.csv", b"\xef\xbb\xbfid;File_Name;class\n" + rows.encode())


def in_parquet(folder: Path) -> Path:
    rows = [{"bytes": data, "path": name} for name, data in zip(NAMES, IMAGES, strict=True)]
    table = pa.table({"image": rows, "label": [i % 2 for i in range(N)]})
    table = table.rename_columns(["image", "species"])
    about = {"info": {"features": {"species": {"names": ["c0", "c1"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def in_paths_parquet(folder: Path) -> Path:
    in_folder(folder)
    pq.write_table(
        pa.table({"path": NAMES, "label": [f"c{i % 2}" for i in range(N)]}), folder / "a.parquet"
    )
    return folder / "a.parquet"


def in_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name, data in zip(NAMES, IMAGES, strict=True):
            archive.writestr(name, data)
    return folder / "a.zip"


def in_tar(
    folder: Path, suffix: str = ".tar", members: list[tarfile.TarInfo] | None = None
) -> Path:
    path = folder / f"a{suffix}"
    with tarfile.open(path, f"w:{suffix.removeprefix('.tar').removeprefix('.')}") as tar:
        for name, data in zip(NAMES, IMAGES, strict=True):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in members or []:
            tar.addfile(member)
    return path


def in_tar_gz(folder: Path) -> Path:
    return in_tar(folder, ".tar.gz")


SOURCES = [
    in_list, in_mxnet, in_csv, in_parquet, in_paths_parquet, in_zip, in_tar, in_tar_gz,
]  # fmt: skip


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_images_keys_and_labels_of_the_folder(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    source = make(tmp_path)
    index, lines = packed(source)
    assert index.labels is not None
    labels = {
        key.removeprefix("photos/"): int(label)
        for key, label in zip(index.keys, index.labels, strict=True)
    }
    assert labels == KEYS
    assert not any("left out" in line for line in lines)
    for key, shard, offset, size in zip(index.keys, *index.locate(np.arange(N)), strict=True):
        data = index.shards[shard].read_bytes()[offset : offset + size]
        assert data == IMAGES[int(key[-1])]
    if make not in (in_list, in_mxnet):
        assert index.class_names == ["c0", "c1"]
    pack(source, tmp_path / "threads", workers=3)
    assert tree(tmp_path / "threads") == tree(tmp_path / "out")


def test_a_list_may_lack_files_and_labels_and_repeat_images(tmp_path: Path) -> None:
    in_folder(tmp_path)
    lines = [
        NAMES[0],
        NAMES[0],
        "photos/c0/my missing.png",
        "/dev/zero",
        "photos",
        "a\0b.png",
        "x" * 5000 + ".png",
    ]
    index, said = packed(put(tmp_path / "a.txt", "\n".join(lines).encode()))
    assert len(index) == 2
    assert index.labels is None
    assert said[1] == "left out: 5 files"


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["3", "", "7"], [3, -1, 7]), (["3.0", "nan", "7.0"], [3, -1, 7]),
        (["99999999999", "-5", "2"], [-1, -1, 2]), (["b", "a", ""], [1, 0, -1]),
    ],
)  # fmt: skip
def test_labels_of_a_table_are_ids_or_names(
    tmp_path: Path, words: list[str], labels: list[int]
) -> None:
    rows = "".join(f"{name},{word}\n" for name, word in zip(NAMES, words, strict=False))
    source = open_source(put(tmp_path / "a.csv", f"path,label\n{rows}".encode()))
    assert source.labels.numbers.tolist() == labels
    again = open_source(tmp_path / "a.csv", None)
    assert again.keys == source.keys


@pytest.mark.parametrize("header", ["path,label,label", "path,Label, label", "path,class,PATH"])
def test_a_column_that_stands_twice_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError, match=r"a\.csv has 2 columns"):
        packed(put(tmp_path / "a.csv", f"{header}\na.png,1,2\n".encode()))


def test_numbers_among_names_are_refused_unless_labels_are_not_wanted(tmp_path: Path) -> None:
    in_folder(tmp_path)
    source = put(tmp_path / "a.txt", f"{NAMES[0]} 3\n{NAMES[1]} cat\n".encode())
    with pytest.raises(DataError, match="some labels are integers"):
        packed(source)
    assert packed(source, classes="none")[0].labels is None


@pytest.mark.parametrize("end", ["", ".txt", ".csv", ".parquet", ".zip", ".tar.gz"])
@pytest.mark.parametrize("stem", ["x" * 300, "a\0b", "nowhere"])
def test_a_source_that_cannot_exist_is_a_clear_error(tmp_path: Path, stem: str, end: str) -> None:
    for source in (f"{stem}{end}", f"idx:{stem}", ""):
        with pytest.raises(DataError, match=r"cannot read|^no |Give a folder"):
            pack(source, tmp_path / "out")
    with pytest.raises(RecipeError, match="no file of class names"):
        pack(tmp_path, tmp_path / "out", classes=stem)


def test_names_in_a_list_may_be_latin1(tmp_path: Path) -> None:
    put(tmp_path / os.fsdecode(b"gr\xfcn.png"))
    index, _ = packed(put(tmp_path / "a.txt", b"gr\xfcn.png kl\xe4sse\n"))
    assert index.class_names == [r"kl\xe4sse"]


def test_rows_without_an_image_are_counted(tmp_path: Path) -> None:
    rows = [{"bytes": PNG, "path": None}, {"bytes": None, "path": "q.png"}, None]
    pq.write_table(pa.table({"image": rows, "label": [[1], [2], [3]]}), tmp_path / "a.parquet")
    index, lines = packed(tmp_path / "a.parquet")
    assert list(index.keys) == ["000000000"]
    assert index.labels is not None
    assert index.labels.tolist() == [1]  # a list of one class
    assert "  2 row without the bytes of an image (000000002, q.png)" in lines


def test_a_folder_of_tables_is_one_source_and_splits_are_named(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        path = tmp_path / "in/data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        in_parquet(tmp_path).rename(path)
    index, lines = packed(tmp_path / "in")
    assert len(index) == len(set(index.keys)) == 3 * N
    assert any("may be splits" in line for line in lines)


def test_links_in_a_tar_are_resolved_or_counted(tmp_path: Path) -> None:
    links = {
        "photos/c1/hard.png": (tarfile.LNKTYPE, f"./{NAMES[0]}"),
        "photos/c1/soft.png": (tarfile.SYMTYPE, "../c0/my 2.png"),
        "photos/c1/twice.png": (tarfile.SYMTYPE, "soft.png"),
        "photos/c1/out.png": (tarfile.SYMTYPE, "/etc/passwd"),
        "photos/c1/loop.png": (tarfile.SYMTYPE, "loop.png"),
    }
    members = []
    for name, (kind, target) in links.items():
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        members.append(member)
    index, lines = packed(in_tar(tmp_path, ".tar.xz", members))
    assert {f"photos/c1/{name}" for name in ("hard", "soft", "twice")} < set(index.keys)
    assert len(index) == N + 3
    assert lines[-1].startswith("  2 link that leads to no image of the archive")


def test_members_of_a_zip_that_are_no_images_are_counted(tmp_path: Path) -> None:
    path = in_zip(tmp_path)
    link = zipfile.ZipInfo("photos/c0/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/photos/._0.png", b"x")
        archive.writestr(link, "0.png")
        archive.writestr("../../up.png", PNG)
    damaged = path.read_bytes().replace(IMAGES[0][:40], bytes(40))
    index, lines = packed(put(tmp_path / "b.zip", damaged))
    assert len(index) == N
    assert "up" in list(index.keys)
    assert "left out: 3 files" in lines


def flipped(data: bytes) -> bytes:
    return data[:100] + b"\xff" * 9 + data[109:]


def negative(data: bytes) -> bytes:
    """The first header with a size of -512, and the right checksum."""
    head = bytearray(data[:512])
    head[124:136], head[148:156] = b"-0000001000\0", b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


@pytest.mark.parametrize(
    ("make", "damage"),
    [
        (in_tar_gz, lambda data: data[: len(data) // 2]), (in_tar_gz, lambda data: data[:-8]),
        (in_tar_gz, flipped), (in_tar, negative), (in_tar, lambda data: data[:700]),
        (in_tar, lambda data: data[:2048] + b"junk" * 128 + data[2560:]),
        (in_tar, lambda data: b""), (in_tar, lambda data: b"junk" * 999),
        (in_zip, lambda data: data[:-30]), (in_zip, lambda data: b""),
        (in_parquet, lambda data: data[:-50]), (in_parquet, lambda data: b""),
        (in_csv, lambda data: b""), (in_csv, lambda data: b'path,label\n"' + b"x" * 200_000),
        (in_csv, lambda data: b"a,b\n1,2\n"), (in_list, lambda data: b"\n\n"),
        (in_list, lambda data: b"x.png 1\ny.png 2\n"),
    ],
)  # fmt: skip
def test_a_damaged_source_is_a_clear_error_before_any_shard(
    tmp_path: Path, make: Callable[[Path], Path], damage: Callable[[bytes], bytes]
) -> None:
    source = make(tmp_path)
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(DataError, match=r"cannot read|no column|not a table|no image|lists no"):
        packed(source)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_under_the_copy_of_an_archive_is_a_disk_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = in_tar_gz(tmp_path)
    monkeypatch.setattr(Blobs, "copy", full)
    with pytest.raises(DiskError, match="No space left on device"):
        packed(source)


def idx(values: np.ndarray, kind: int = 8, dtype: str = ">u1") -> bytes:
    sizes = b"".join(struct.pack(">I", size) for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + values.astype(dtype).tobytes()


def test_the_labels_of_qmnist_are_read(tmp_path: Path) -> None:
    put(tmp_path / "q-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((6, 12, 12)))))
    labels = np.array([[i % 3] + [0] * 7 for i in range(6)])
    put(tmp_path / "q-labels-idx2-int.gz", gzip.compress(idx(labels, 0x0C, ">i4")))
    assert open_source(f"idx:{tmp_path}/q").labels.numbers.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (idx(np.zeros((0, 12, 12))), "0 images"),
        (idx(np.zeros((2, 3, 12, 12))), "images of shape"),
        (idx(np.zeros((2, 4, 4)), 0x0D, ">f4"), "type float32"),
        (idx(np.zeros((2, 4, 4))) + b"more", "cannot read"),
        (b"\0\0\x08\3" + b"\xff" * 12, "its sizes are"), (b"\0\0\x77\3", "not an idx file"),
    ],
)  # fmt: skip
def test_an_idx_file_without_images_is_refused(tmp_path: Path, images: bytes, message: str) -> None:
    put(tmp_path / "train-images-idx3-ubyte", images)
    with pytest.raises(DataError, match=message):
        open_source(f"idx:{tmp_path}/train")


def test_a_gz_with_a_wrong_block_is_fetched_again(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(idx(np.zeros((2, 4, 4))), mtime=0))
    data[10] = 7
    put(tmp_path / "train-images-idx3-ubyte.gz", bytes(data))
    with pytest.raises(DataError, match=r"invalid block type\. Fetch it again"):
        open_source(f"idx:{tmp_path}/train")
