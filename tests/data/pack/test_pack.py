"""Packing: the same bytes every time, nothing lost, and images that can be found again."""

from __future__ import annotations

import errno
import gzip
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deepclust.data.images.decode import decode
from deepclust.data.pack.image_sources import open_source
from deepclust.data.pack.pack import pack
from deepclust.data.pack.stored import LeftOutError
from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DataError, DiskError, RecipeError
from deepclust.files import read_json
from tests.images import draw, encode, make_image_folder


def make_idx(folder: Path, n: int = 40, split: str = "train", labels: int | None = None) -> str:
    """Grey 9 x 7 images; the first is plain, the second gzip'd, as in the wild."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 9, 7), dtype=np.uint8)
    header = struct.pack(">4B3i", 0, 0, 8, 3, n, 9, 7)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    count = n if labels is None else labels
    numbers = struct.pack(">4Bi", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count))
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(numbers))
    return f"idx:{folder}/{split}"


def make_jpegs(folder: Path) -> str:
    return str(make_image_folder(folder, n=30, format="jpg"))


def images(index: Index) -> Iterator[Tensor]:
    for shard, offset, size in zip(*index.locate(np.arange(len(index))), strict=True):
        yield decode(index.shards[shard].read_bytes()[offset : offset + size])


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def photo(path: Path, *size: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(draw(1, *size), path.suffix[1:], **options))
    return path


def test_an_image_folder_keeps_its_bytes_labels_and_names(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", n=20, classes=3)
    index = pack(source, tmp_path / "out")
    assert index.class_names == ["class-0", "class-1", "class-2"]
    for i, (shard, offset, size) in enumerate(zip(*index.locate(np.arange(20)), strict=True)):
        data = index.shards[shard].read_bytes()[offset : offset + size]
        assert data == (source / f"{index.keys[i]}.png").read_bytes()
        assert index.keys[i].startswith(f"class-{index.labels[i]}/")  # type: ignore[index]


@pytest.mark.parametrize("resize_short", [None, 6])
@pytest.mark.parametrize("make", [make_jpegs, make_idx])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, make: Callable[[Path], str], resize_short: int | None
) -> None:
    source = make(tmp_path / "in")
    for workers in (1, 2, 4):
        pack(source, tmp_path / f"{workers}", workers=workers, resize_short=resize_short)
    alone = tree(tmp_path / "1")
    assert len(alone.keys() - {"paths.parquet"}) == 16 + 1 + 5  # shards, dataset.json, index
    assert alone == tree(tmp_path / "2") == tree(tmp_path / "4")


def test_another_seed_gives_another_order_of_the_same_images(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", n=20)
    one, two = (list(pack(source, tmp_path / f"{seed}", seed=seed).keys) for seed in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two)
    assert one != sorted(one)


def test_idx_files_become_png_with_running_keys(tmp_path: Path) -> None:
    source = make_idx(tmp_path / "idx")
    index = pack(source, tmp_path / "out", class_names=[f"digit {i}" for i in range(10)])
    assert list(index.keys) == [f"{i:09d}" for i in range(40)]
    assert index.class_names is not None
    assert index.class_names[9] == "digit 9"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7), dtype=np.uint8)
    packed = {
        (image[0].numpy().tobytes(), label)
        for image, label in zip(images(index), index.labels, strict=True)
    }  # type: ignore[arg-type]
    assert packed == {(pixels[i].tobytes(), i % 10) for i in range(40)}


@pytest.mark.parametrize(
    ("n", "shard_size", "sizes"),
    [(40, None, [2, 3] * 8), (3, None, [1] * 3), (40, 12, [10] * 4), (10, 4, [3, 3, 4])],
)
def test_shards_are_even_and_at_least_16_when_small(
    tmp_path: Path, n: int, shard_size: int | None, sizes: list[int]
) -> None:
    index = pack(make_idx(tmp_path / "idx", n), tmp_path / "out", shard_size=shard_size)
    assert sorted(np.diff(index.bases)) == sorted(sizes)


def test_resize_short_reduces_what_is_larger_and_is_recorded(tmp_path: Path) -> None:
    small = photo(tmp_path / "in/a/small.jpg", 20, 30, quality=90).read_bytes()
    photo(tmp_path / "in/a/large.jpg", 80, 120, quality=90)
    photo(tmp_path / "in/a/tall.png", 90, 50)
    index = pack(tmp_path / "in", tmp_path / "out", resize_short=32)
    found = {
        key: tuple(image.shape[1:]) for key, image in zip(index.keys, images(index), strict=True)
    }
    assert found == {"a/small": (20, 30), "a/large": (32, 48), "a/tall": (58, 32)}
    assert any(small in data for data in tree(tmp_path / "out").values())
    assert read_json(tmp_path / "out/dataset.json")["resize_short"] == 32


def test_resizing_is_close_to_the_original_downsampled(tmp_path: Path) -> None:
    photo(tmp_path / "in/a/x.png", 64, 96)
    (image,) = images(pack(tmp_path / "in", tmp_path / "out", resize_short=32))
    mean = torch.nn.functional.avg_pool2d(draw(1, 64, 96).float(), 2)
    assert (image.float() - mean).abs().mean() < 4


def test_a_broken_image_is_packed_as_it_is(tmp_path: Path) -> None:
    photo(tmp_path / "in/a/good.png", 8, 8)
    (tmp_path / "in/a/bad.jpg").write_bytes(b"\xff\xd8 not a photo")
    (tmp_path / "in/a/zero.jpg").touch()
    index = pack(tmp_path / "in", tmp_path / "out", resize_short=4)
    assert sorted(index.keys) == ["a/bad", "a/good", "a/zero"]
    assert list(index.excluded.values()) == ["image of 0 bytes"]


def test_odd_file_names_become_keys_that_are_safe_and_unique(tmp_path: Path) -> None:
    names = [
        "a.b.png",
        "a_b.png",
        "a b.png",
        "c.png",
        "c.jpg",
        "日本.png",
        "é ü!.PNG",
        "x" * 180 + ".png",
    ]
    for i, name in enumerate(names):
        path = tmp_path / "in" / "sp ace.d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(i, 8, 8)))
    keys = list(pack(tmp_path / "in", tmp_path / "out").keys)
    assert len(set(keys)) == len(names)
    assert {"sp_ace_d/日本", "sp_ace_d/é_ü_"} <= set(keys)
    assert sum(key.startswith("sp_ace_d/a_b~") for key in keys) == 3
    assert not any("." in key or " " in key for key in keys)


def test_images_outside_class_folders_have_no_label(tmp_path: Path) -> None:
    photo(tmp_path / "in/cat/a.png", 8, 8)
    photo(tmp_path / "in/b.png", 8, 8)
    index = pack(tmp_path / "in", tmp_path / "out")
    assert dict(zip(index.keys, index.labels, strict=True)) == {"cat/a": 0, "b": -1}  # type: ignore[arg-type]
    photo(tmp_path / "flat/b.png", 8, 8)
    assert pack(tmp_path / "flat", tmp_path / "flat-out").labels is None


def test_other_formats_become_png_and_other_files_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "in/a"
    folder.mkdir(parents=True)
    for name in ("x.bmp", "y.tif", "z.gif"):
        Image.fromarray(draw(2, 8, 8).permute(1, 2, 0).numpy()).save(folder / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._x.png"):
        (folder / name).touch()
    index = pack(tmp_path / "in", tmp_path / "out")
    assert sorted(index.keys) == ["a/x", "a/y", "a/z"]
    assert all(image.shape == (3, 8, 8) for image in images(index))


def test_a_torchvision_set_is_packed_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tiny:
        classes = ["cat", "dog"]
        targets = [1, 0]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, train, download) == (str(tmp_path), True, True)

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (8, 8), (i * 90, 0, 0)), self.targets[i]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Tiny)
    index = pack(f"torchvision:CIFAR10:train@{tmp_path}", tmp_path / "out")
    assert index.class_names == ["cat", "dog"]
    assert {
        (int(image[0, 0, 0]), int(label))
        for image, label in zip(images(index), index.labels, strict=True)
    } == {(0, 1), (90, 0)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0}/nowhere", "no folder .*nowhere to pack"),
        ("{0}/empty", r"no images below .*Images end in"),
        ("{0}/idx", r"It holds idx files: pack 'idx:.*/idx/train'"),
        ("idx:{0}/idx/t10k", r"no .*t10k-images.*Give 'idx:DIR/train'"),
        ("idx:{0}/odd/train", "40 images, but 39 labels"),
        ("idx:{0}/cut/train", "cannot read .*train-images-idx3-ubyte.*Fetch it again"),
        ("torchvision:ImageNet", "is not a data set.*CIFAR10"),
        ("torchvision:CIFAR10:valid@{0}", "splits are train and test, not 'valid'"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    make_idx(tmp_path / "idx")
    make_idx(tmp_path / "odd", labels=39)
    make_idx(tmp_path / "cut")
    (tmp_path / "cut/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\3\0\0")
    with pytest.raises(DataError, match=message):
        pack(source.format(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_folder_is_never_overwritten(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", n=4)
    index = pack(source, tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        pack(source, tmp_path / "out")
    assert open_index(tmp_path / "out").fingerprint == index.fingerprint


def test_a_pack_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DiskError, match="No space left on device"):
        pack(make_image_folder(tmp_path / "in", n=4), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("option", ["shard_size", "workers", "resize_short"])
def test_numbers_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(RecipeError, match=f"{option} must be at least 1, not 0"):
        pack(tmp_path, tmp_path / "out", **{option: 0})  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_image_folder(tmp_path / "in", n=6, classes=3)
    real = os.scandir

    def forbidden(folder: str) -> Iterator[os.DirEntry]:  # root, as CI is, may list everything
        if str(folder).endswith("class-1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match=r"cannot read the folder .*class-1: Permission denied"):
        open_source(source)


def test_an_image_that_vanishes_while_packing_is_counted_by_name(tmp_path: Path) -> None:
    originals = open_source(make_image_folder(tmp_path / "in", n=1))
    (tmp_path / "in/class-0/0000.png").unlink()
    with pytest.raises(LeftOutError):
        originals.read(0)
    lines = originals.packer.left.lines()
    assert lines == ["1 unreadable: No such file or directory (class-0/0000.png)"]
