"""The members of a tar: `tarfile` is the slow reference; what it passes over is an error here."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from deepclust.data.shards.tar import TarEntry, entries, open_shard
from deepclust.errors import DataError
from tests.images import write_tar

BLOCK = 512
LONG = "/".join(["a folder with a long name"] * 12) + "/x.jpg"
NAMES = [
    "a.jpg",
    "b/c.d/é ü.png",
    LONG,
    "日本/語.cls",
    "x" * 100 + ".jpg",
    "empty.txt",
    "last.webp",
]


def read(path: Path) -> list[TarEntry]:
    with open_shard(path) as shard:
        return list(entries(shard))


def by_tarfile(path: Path) -> list[TarEntry]:
    with tarfile.open(path) as tar:
        return [TarEntry(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def contents(names: list[str]) -> list[tuple[str, bytes]]:
    return [(n, b"" if "empty" in n else n.encode() * (i * 70)) for i, n in enumerate(names)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "s.tar", [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 10)])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "s.tar", contents(NAMES), format)
    assert read(path) == by_tarfile(path)
    assert [member.name for member in read(path)] == NAMES


def test_a_ustar_prefix_belongs_to_the_name(tmp_path: Path) -> None:
    name = "f" * 80 + "/" + "g" * 80 + ".jpg"
    path = write_tar(tmp_path / "s.tar", [(name, b"x"), ("b.jpg", b"y")], tarfile.USTAR_FORMAT)
    assert read(path) == by_tarfile(path)


def add(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def test_folders_are_passed_over_and_links_without_a_file_are_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "f", tarfile.DIRTYPE)
        add(tar, "l.jpg", tarfile.SYMTYPE, "a.jpg")
        add(tar, "h.jpg", tarfile.LNKTYPE, "a.jpg")  # a.jpg comes later
        add(tar, "p", tarfile.FIFOTYPE)
        tar.addfile(tarfile.TarInfo("a.jpg"))
    told: list[tuple[str, str]] = []
    with open_shard(tmp_path / "s.tar") as shard:
        members = list(entries(shard, lambda reason, name: told.append((name, reason))))
    assert [member.name for member in members] == ["a.jpg"]
    assert [name for name, _ in told] == ["l.jpg", "h.jpg", "p"]
    assert "--dereference" in told[0][1]
    assert "--hard-dereference" in told[1][1]


def test_a_hard_link_is_the_file_that_it_names(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("./a.jpg", LONG):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        add(tar, "b.jpg", tarfile.LNKTYPE, "./a.jpg")
        add(tar, "c.jpg", tarfile.LNKTYPE, LONG)
        add(tar, "d.jpg", tarfile.LNKTYPE, "c.jpg")  # a link to a link
        add(tar, "e.jpg", tarfile.LNKTYPE, "a.jpg")
    a, long, b, c, d, e = read(tmp_path / "s.tar")
    assert (b.offset, b.size) == (e.offset, e.size) == (a.offset, 3)
    assert (c.offset, c.size) == (d.offset, d.size) == (long.offset, 3)


def with_size(field: bytes) -> bytes:
    """A tar of one member whose header has these bytes as its size, and a right check sum."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field.ljust(12, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(header) + bytes(4 * BLOCK)


@pytest.mark.parametrize(
    "field",
    [
        *(b"-0000001000", b"-1", b"+12", b"1_0", b"0o17", b"77777777777", b"1e3", b"\xb2"),
        *(b"\xff" * 12, b"\xff" * 11 + b"\0", b"\x80" + b"\xff" * 11, b"\x80\0\0\0\x40"),
    ],
)
def test_a_hostile_size_is_an_error_and_reading_ends(tmp_path: Path, field: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(with_size(field))
    with pytest.raises(DataError, match=r"s\.tar: (damaged|not a tar|truncated)"):
        read(tmp_path / "s.tar")


def extended(kind: bytes, body: bytes, claimed: int | None = None) -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(body) if claimed is None else claimed
    return header.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % BLOCK)


@pytest.mark.parametrize(
    "before",
    [
        extended(b"x", b"12 size=-512\n"),
        extended(b"x", b"29 size=9223372036854775808\n"),
        extended(b"x", b"999 path=a\n"),
        extended(b"x", b"0 path=a\n"),
        extended(b"x", b"9" * 500_000),
        extended(b"x", b"", claimed=2**62),
        extended(b"L", b"", claimed=2**33),
        extended(b"g", b"14 path=a.jpg\n"),
        extended(b"x", b"23 GNU.sparse.map=a,b\n"),
    ],
)
def test_a_hostile_extended_header_is_an_error(tmp_path: Path, before: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(before + with_size(b"0"))
    with pytest.raises(DataError, match=r"s\.tar: (damaged|truncated|'a\.jpg' is a sparse)"):
        read(tmp_path / "s.tar")


def test_thousands_of_extended_headers_are_read(tmp_path: Path) -> None:
    many = extended(b"x", b"15 mtime=12345\n") * 3000
    (tmp_path / "s.tar").write_bytes(many + with_size(b"0"))
    assert [member.name for member in read(tmp_path / "s.tar")] == ["a.jpg"]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("\udcff.jpg", b"x")], tarfile.GNU_FORMAT)
    assert read(path) == by_tarfile(path)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 100, 3 * BLOCK, 3 * BLOCK + 1])
def test_a_tar_that_is_cut_anywhere_is_an_error_with_shard_offset_and_fix(
    shard: Path, size: int
) -> None:
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(DataError, match=r"s\.tar: (truncated|not a tar).*(again)"):
        read(shard)


def test_a_missing_end_of_archive_marker_is_an_error(shard: Path) -> None:
    end = 5 * BLOCK  # header, 2 blocks, header, 1 block
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(DataError, match=f"no end-of-archive marker at offset {end}"):
        read(shard)


def test_a_damaged_header_names_its_offset(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[3 * BLOCK] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged or cut short at offset 1536"):
        read(shard)


def test_a_long_name_without_its_file_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(LONG, b"x" * 9)])
    path.write_bytes(path.read_bytes()[: 2 * BLOCK])
    with pytest.raises(DataError, match=r"damaged or cut short|truncated"):
        read(path)


def test_tars_joined_by_cat_are_an_error(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(DataError, match=r"data follows its end-of-archive marker.*--concatenate"):
        read(shard)


def test_a_compressed_tar_says_how_to_unpack_it(shard: Path) -> None:
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"compressed.*gunzip"):
        read(shard)


@pytest.mark.parametrize("data", [b"PK\3\4 a zip, say", b"not a tar" * 500])
def test_a_file_of_another_kind_is_not_a_tar(shard: Path, data: bytes) -> None:
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"s\.tar: not a tar file"):
        read(shard)


def test_an_empty_file_is_an_error(shard: Path) -> None:
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty \(0 bytes"):
        read(shard)


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    with pytest.raises(DataError, match=r"'a\.jpg' is a sparse file"):
        read(tmp_path / "s.tar")


def test_a_shard_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(tmp_path / "s.tar")


def test_members_hold_the_bytes_that_were_written(tmp_path: Path) -> None:
    written = contents(NAMES)
    data = write_tar(tmp_path / "s.tar", written).read_bytes()
    for member, (_, content) in zip(read(tmp_path / "s.tar"), written, strict=True):
        assert io.BytesIO(data[member.offset :]).read(member.size) == content


def test_a_pipe_or_folder_called_like_a_shard_is_an_error_and_nobody_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    for name in ("a.tar", "b.tar"):
        with pytest.raises(DataError, match=f"{name} is not a regular file"):
            read(tmp_path / name)


def test_a_shard_that_ends_in_zeros_where_members_should_be_is_noted(shard: Path) -> None:
    os.truncate(shard, 2 << 20)
    notes: list[str] = []
    with open_shard(shard) as opened:
        assert len(list(entries(opened, lambda reason, name: notes.append(reason)))) == 2
    assert "unfinished copy" in notes[0]


def test_a_tail_of_zeros_is_passed_quickly_and_what_follows_it_is_not_lost(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", b"x")])
    with open(tmp_path / "a.tar", "ab") as file:
        file.truncate(2**42)  # 4 TiB of holes
    left: list[str] = []
    with open_shard(tmp_path / "a.tar") as shard:
        assert [one.name for one in entries(shard, lambda reason, name: left.append(reason))]
        assert "1 MiB of zeros" in left[0]
    with open(tmp_path / "a.tar", "r+b") as file:
        file.seek(2**41)
        file.write(b"y")
    with open_shard(tmp_path / "a.tar") as shard, pytest.raises(DataError, match="data follows"):
        list(entries(shard))
