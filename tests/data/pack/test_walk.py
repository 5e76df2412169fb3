"""A walk that counts: links, loops, odd names, pages, and what vanishes or cannot be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust.data.pack.names import keys_of
from deepclust.data.pack.pack import pack
from deepclust.data.pack.stored import Packer
from deepclust.data.pack.tally import Tally
from deepclust.data.pack.walk import walk
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DiskError
from deepclust.files import read_json
from tests.data.images.test_formats import HEIC
from tests.data.images.test_levels import RAMP, png16, tiff
from tests.images import draw, encode

PNG = encode(draw(1, 8, 8))
JPG = encode(draw(1, 8, 8), "jpg")


def put(path: Path, data: bytes = PNG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def packed(source: Path, **options: object) -> tuple[Index, list[str]]:
    lines: list[str] = []
    return pack(source, source.with_name("out"), emit=lines.append, **options), lines


def test_jpegs_of_any_name_are_packed_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.jpe", "c.JPG_large", "d.jpg?w=300&h=200", "e"):
        put(tmp_path / "in/x" / name, JPG)
    put(tmp_path / "in/x/f.avif", encode(draw(1, 8, 8), "AVIF"))
    put(tmp_path / "in/x/g.jp2", encode(draw(1, 8, 8), "JPEG2000"))
    put(tmp_path / "in/x/h.png")
    for name in ("notes.txt", "more.txt", "film.mp4", "README", "photo.nef", ".DS_Store"):
        put(tmp_path / "in/x" / name, b"no image at all")
    put(tmp_path / "in/.git/z.png")
    index, lines = packed(tmp_path / "in")
    assert sorted(index.keys) == [f"x/{letter}" for letter in "abcdefgh"]
    assert lines[:2] == ["1 class: x", "left out: 7 files"]
    assert "  2 .txt (x/more.txt, x/notes.txt)" in lines
    assert sum("hidden" in line for line in lines) == 2
    assert sum(read_json(tmp_path / "out/dataset.json")["left_out"].values()) == 7


def test_loops_of_links_end_and_every_image_is_packed_once(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "in" / name / "0.png")
        (tmp_path / "in" / name / "up").symlink_to("..")
    put(tmp_path / "far/deep/1.png")
    (tmp_path / "far/deep/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/a-link").symlink_to("cat")  # before the folder that it leads to
    (tmp_path / "in/far").symlink_to(tmp_path / "far")
    (tmp_path / "in/again").symlink_to(tmp_path / "far")
    index, lines = packed(tmp_path / "in")
    assert sorted(index.keys) == ["again/deep/1", "cat/0", "dog/0"]
    assert index.class_names == ["again", "cat", "dog"]
    assert "  2 link to a folder around it (cat/up, dog/up)" in lines
    assert any(line.startswith("  3 link to a folder that was read already") for line in lines)


def test_dangling_links_pipes_and_devices_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "in/cat/0.png")
    (tmp_path / "in/cat/9.png").symlink_to("/nowhere/annex/9.png")
    (tmp_path / "in/cat/8.png").symlink_to("8.png")
    (tmp_path / "in/cat/7.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "in/cat/6.jpg")
    index, lines = packed(tmp_path / "in")
    assert list(index.keys) == ["cat/0"]
    assert lines[1] == "left out: 4 files"
    assert "  2 neither file nor folder (cat/6.jpg, cat/7.png)" in lines


def test_a_folder_that_vanishes_in_the_walk_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in/a/0.png")
    put(tmp_path / "in/b/0.png")
    real = os.scandir

    def gone(folder: Path) -> Iterator[os.DirEntry]:
        if str(folder).endswith("b"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", gone)
    tally = Tally()
    assert walk(tmp_path / "in", tally) == ["a/0.png"]
    assert tally.lines() == ["1 vanished folder (b)"]


@pytest.mark.parametrize(
    "data",
    [b"GIF89a damaged", b"BM damaged", tiff(np.zeros((4, 4)), 3), HEIC, b"", b"P5 9 9 255\n12"],
)
def test_a_damaged_file_that_must_be_converted_is_left_out_by_name(
    tmp_path: Path, data: bytes
) -> None:
    put(tmp_path / "in/x/0.png")
    put(tmp_path / "in/x/bad.tif", data)
    index, lines = packed(tmp_path / "in", workers=2)
    assert list(index.keys) == ["x/0"]
    assert lines[2].startswith("  1 that cannot be converted (x/bad.tif: ")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["shard-000000.tar"]


def test_a_source_whose_images_are_all_left_out_says_why(tmp_path: Path) -> None:
    put(tmp_path / "in/bad.gif", b"GIF89a damaged")
    with pytest.raises(DataError, match=r"no image could be packed: 1 .*bad\.gif: damaged"):
        packed(tmp_path / "in")
    put(tmp_path / "texts/a.txt")
    put(tmp_path / "texts/a.txt", b"text")
    with pytest.raises(DataError, match=r"no images below .*Left out: 1 \.txt \(a\.txt\)"):
        packed(tmp_path / "texts")
    assert not (tmp_path / "out").exists()


def test_a_storage_that_fails_ends_the_packing_and_a_file_does_not() -> None:
    def fails(number: int) -> bytes:
        raise OSError(number, os.strerror(number))

    packer = Packer()
    with pytest.raises(DataError, match=r"cannot read a\.png: Stale"):
        packer.member("a.png", lambda: fails(errno.ESTALE))
    with pytest.raises(Exception, match=r"^$"):
        packer.member("a.png", lambda: fails(errno.EIO))
    assert packer.left.lines() == ["1 unreadable: Input/output error (a.png)"]


@pytest.mark.parametrize("format", ["TIFF", "GIF", "WEBP", "PNG", "AVIF"])
def test_an_image_of_several_pages_gives_its_first_which_is_said(
    tmp_path: Path, format: str
) -> None:
    pages = [Image.fromarray(draw(i, 8, 8).permute(1, 2, 0).numpy()) for i in range(3)]
    path = put(tmp_path / f"in/x.{format.lower().removesuffix('f')}")
    pages[0].save(path, format, save_all=True, append_images=pages[1:])
    pages[0].save(path.with_name(f"one{path.suffix}"), format)
    _, lines = packed(tmp_path / "in")
    assert lines[-1] == f"1 of several pages: only the first is packed ({path.name})"


def test_values_of_an_unknown_range_are_left_out_until_it_is_given(tmp_path: Path) -> None:
    dim = np.rint(RAMP * 4095).astype("u2")
    put(tmp_path / "in/a.png", png16(dim))
    put(tmp_path / "in/b.tif", tiff(dim, 1))
    full = put(tmp_path / "in/c.png", png16(np.rint(RAMP * 65535).astype("u2"))).read_bytes()
    index, lines = packed(tmp_path / "in")
    assert list(index.keys) == ["c"]
    assert full in index.shards[0].read_bytes()  # byte for byte
    assert "--range LOW:HIGH" in lines[2]
    assert len(pack(tmp_path / "in", tmp_path / "given", range="0:4095")) == 3


def test_a_copied_name_does_not_hide_what_a_file_is(tmp_path: Path) -> None:
    put(tmp_path / "in/page.jpg", b"<html>404</html>")
    put(tmp_path / "in/deep.jpg", tiff(np.rint(RAMP * 4095).astype("u2"), 1))
    put(tmp_path / "in/a.png")
    put(tmp_path / "in/zero.jpg", b"")
    index, lines = packed(tmp_path / "in")
    assert sorted(index.keys) == ["a", "page", "zero"]
    assert lines[4] == "1 packed, but excluded by the index: image of 0 bytes (zero)"
    assert "deep.jpg: unsigned 16 bits" in lines[2]
    assert lines[3] == "2 not an image by its first bytes: packed as it is (page.jpg, zero.jpg)"


def test_marks_stay_in_keys_and_masks_are_told_from_photos() -> None:
    tally = Tally()
    files = ["c/हिन्दी.png", "c/Mu\u0308ller.png", "c/x.jpg", "c/x.png", "c/a b.png", "c/a_b.png"]
    keys = keys_of([*files, "../up/./d.png", "d.png", "d.png"], tally)
    assert keys[:4] == ["c/हिन्दी", "c/Mu\u0308ller", "c/x~jpg", "c/x~png"]
    assert all(key.startswith("c/a_b~") for key in keys[4:6])
    assert len(set(keys)) == 9
    assert tally.total() == 6


def test_names_that_are_not_utf8_are_packed_with_readable_classes(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xfcsrc")
    put(source / os.fsdecode(b"V\xf6gel/gr\xfcn.png"))
    put(source / "cat/b.png")
    lines: list[str] = []
    index = pack(source, tmp_path / "out", emit=lines.append)
    assert index.class_names == [r"V\xf6gel", "cat"]
    assert sorted(index.keys) == ["V_gel/gr_n", "cat/b"]
    assert lines == [r"2 classes: V\xf6gel, cat"]


def test_the_folder_for_the_shards_is_looked_at_first(tmp_path: Path) -> None:
    source = put(tmp_path / "in/a.png").parent
    (tmp_path / "dangling").symlink_to("nowhere")
    for out, error in [
        ("dangling", DataError), ("dangling/x", DiskError), ("in/a.png", DataError),
        ("in/a.png/x", DiskError), ("o" * 300, DiskError), (os.fsdecode(b"\xff"), DataError),
    ]:  # fmt: skip
        with pytest.raises(error, match=r"Choose another folder"):
            pack(source, tmp_path / out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    pack(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/dataset.json").exists()


def test_the_rest_of_a_killed_pack_is_named(tmp_path: Path) -> None:
    source = put(tmp_path / "in/a.png").parent
    (tmp_path / ".out.123-abc.tmp").mkdir()
    _, lines = packed(source)
    assert ".out.123-abc.tmp" in lines[0]
    assert "Delete it" in lines[0]


def test_a_tally_keeps_five_examples_that_a_terminal_can_show() -> None:
    tally = Tally()
    for i in reversed(range(9)):
        tally.add("bad", f"{i}\x1b[2J")
    tally.add("long", "x" * 5000)
    assert tally.lines()[0].count("\\x1b") == 5
    assert tally.lines()[0].endswith(", ...)")
    assert len(tally.lines()[1]) < 250
