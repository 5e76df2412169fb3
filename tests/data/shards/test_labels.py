"""Which member is the image and which the label, and labels that change after they were indexed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deepclust.data.shards.index import Index, build_index, open_index
from deepclust.errors import DataError
from tests.images import draw, encode, write_tar

IMAGE = encode(draw(0, 8, 8))
Members = list[tuple[str, bytes]]


def shards(folder: Path, **tars: Members) -> Path:
    for name, members in tars.items():
        write_tar(folder / f"{name}.tar", members)
    return folder


def labels_of(index: Index) -> list[str | None]:
    """The names of the samples' classes."""
    assert index.labels is not None
    names = index.class_names
    return [None if i < 0 else str(i) if names is None else names[i] for i in index.labels]


def test_an_image_field_of_two_parts_is_taken_when_named(tmp_path: Path) -> None:
    one = [("a.left.png", IMAGE), ("a.right.png", IMAGE + b" "), ("b.txt", b"x")]
    index = open_index(shards(tmp_path, s=one), image="right.png")
    assert index.sizes.tolist() == [len(IMAGE) + 1, 0]
    assert index.excluded == {1: "no .right.png, only .txt"}
    other = open_index(tmp_path, image=".LEFT.png")
    assert other.sizes.tolist() == [len(IMAGE), 0]
    assert other.folder != index.folder
    assert other.fingerprint == index.fingerprint


def test_the_only_image_field_of_all_samples_is_used_and_said(tmp_path: Path) -> None:
    members = [(f"{k}.{e}", IMAGE) for k in "ab" for e in ("input.jpg", "outputs.txt")]
    index = open_index(shards(tmp_path, s=members, t=members))
    assert not index.excluded
    assert index.notes() == ["the image of every sample is KEY.input.jpg"]
    assert len(build_index(tmp_path, verify=True)) == 4


def test_names_with_dots_that_glue_frames_together_are_refused(tmp_path: Path) -> None:
    frames = [(f"clip.{i:04d}.png", IMAGE) for i in range(2000)]
    shards(tmp_path, plain=[("0.png", IMAGE)], video=frames)
    with pytest.raises(DataError, match=r"video\.tar: key 'clip' holds 2000 images") as caught:
        open_index(tmp_path)
    assert len(str(caught.value)) < 600
    assert "clip_0001.png" in str(caught.value)


def test_a_mask_beside_an_image_is_counted_and_not_the_image(tmp_path: Path) -> None:
    index = open_index(shards(tmp_path, s=[("a.jpg", IMAGE), ("a.png", b"mask")]))
    assert index.sizes.tolist() == [len(IMAGE)]
    assert "1 x further image of a sample that has one: a.png" in index.notes()[0]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("cls", ["tench", None, "tench", "3 7"]),
        (".TXT", [None, "a dog", None, None]),
        ("json", ["5", None, None, None]),
        ("json.name", ["x", None, "3", None]),
        ("json.deep.key", [None, None, "y", None]),
        ("folder", ["f", "g", "f", "g"]),
    ],
)
def test_a_label_field_names_the_classes(
    tmp_path: Path, field: str, expected: list[str | None]
) -> None:
    one = [("f/a.png", IMAGE), ("f/a.cls", b"tench\n"), ("f/a.json", b'{"label": 5, "name": "x"}')]
    two = [("d/g/b.png", IMAGE), ("d/g/b.txt", b"a dog"), ("d/g/b.json", b"[")]
    three = [("./f/c.png", IMAGE), ("./f/c.cls", b" tench")]
    three += [("./f/c.json", b'{"name": 3.0, "deep": {"key": "y"}}')]
    four = [("g/d.png", IMAGE), ("g/d.cls", b"3 7")]
    index = open_index(shards(tmp_path, s=one + two, t=three + four), labels=field)
    assert labels_of(index) == expected
    assert labels_of(build_index(tmp_path, labels=field, verify=True)) == expected


def test_label_fields_of_numbers_keep_their_numbers(tmp_path: Path) -> None:
    members = [m for i in (7, 2**31 - 1) for m in ((f"{i}.png", IMAGE), (f"{i}.cls", b"%d" % i))]
    index = open_index(shards(tmp_path, s=members), labels="cls")
    assert index.labels is not None
    assert index.labels.tolist() == [7, 2**31 - 1]
    assert index.class_names is None


def test_a_label_field_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.labels=txt: no sample .*1 x no \.txt: a"):
        open_index(shards(tmp_path, s=[("a.png", IMAGE)]), labels="txt")


def test_labels_none_reads_none_with_the_usual_index_or_one_of_its_own(tmp_path: Path) -> None:
    members = [("a.png", IMAGE), ("a.cls", b"1")]
    alone = open_index(shards(tmp_path / "x", s=members), labels="none")
    usual = open_index(shards(tmp_path / "y", s=members))
    view = open_index(tmp_path / "y", labels="none")
    assert alone.labels is view.labels is None
    assert view.folder == usual.folder
    assert alone.folder.name != "deepclust-index"
    assert open_index(tmp_path / "x").labels is not None


def test_an_index_in_a_given_folder_is_not_used_for_other_fields(tmp_path: Path) -> None:
    members = [("a.png", IMAGE), ("a.cls", b"1"), ("a.txt", b"x")]
    open_index(shards(tmp_path / "x", s=members), tmp_path / "i", labels="txt")
    with pytest.raises(DataError, match=r"made with data\.image=auto data\.labels=txt"):
        open_index(tmp_path / "x", tmp_path / "i")


def test_labels_that_were_corrected_are_noticed_and_read_again(tmp_path: Path) -> None:
    members = [m for i in "0123" for m in ((f"{i}.cls", i.encode()), (f"{i}.png", IMAGE))]
    before = build_index(shards(tmp_path, s=members))
    shards(tmp_path, s=[(name, b"9" if name == "1.cls" else data) for name, data in members])
    os.utime(tmp_path / "s.tar", (0, 0))
    with pytest.raises(DataError, match=r"the labels in s\.tar are not those"):
        build_index(tmp_path, verify=True)
    os.utime(tmp_path / "s.tar", None)
    os.utime(before.folder / "manifest.json", (1, 1))
    assert open_index(tmp_path, labels="none").labels is None  # who uses none does not mind
    after = open_index(tmp_path)
    assert labels_of(after) == ["0", "9", "2", "3"]
    assert after.fingerprint == before.fingerprint


def test_an_index_of_an_older_version_notices_corrected_labels_too(tmp_path: Path) -> None:
    place = build_index(shards(tmp_path, s=[("a.png", IMAGE), ("a.cls", b"1")])).folder
    manifest = json.loads((place / "manifest.json").read_bytes())
    kept = ("format", "fingerprint", "labelled", "excluded")
    old = {key: manifest[key] for key in kept}
    old["shards"] = [{k: v for k, v in e.items() if k != "labels"} for e in manifest["shards"]]
    (place / "manifest.json").write_text(json.dumps(old))
    os.utime(place / "manifest.json", (1, 1))
    assert labels_of(open_index(tmp_path)) == ["1"]
    shards(tmp_path, s=[("a.png", IMAGE), ("a.cls", b"2")])
    with pytest.raises(DataError, match=r"the labels in s\.tar are not those"):
        build_index(tmp_path, verify=True)
    assert labels_of(open_index(tmp_path)) == ["2"]


DOUBLED = b'{"class_names": ["a"], "class_names": ["b"]}'


@pytest.mark.parametrize(
    "text", [b"[", b"[]", b'{"class_names": 3}', b'{"class_names": [1]}', DOUBLED]
)
def test_a_dataset_json_that_makes_no_sense_is_named(tmp_path: Path, text: bytes) -> None:
    index = open_index(shards(tmp_path, s=[("a.png", IMAGE)]))
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(DataError, match=r"dataset\.json .*Correct it"):
        _ = index.class_names


def test_members_that_are_no_samples_are_counted_by_reason(tmp_path: Path) -> None:
    odd = ["._a.png", "README", "__meta__/x.png", "caf\udce9.\udce9t\udce9", "\x1b[2J.png"]
    index = open_index(shards(tmp_path, s=[(name, IMAGE) for name in odd]))
    (excluded, left) = index.notes()
    assert excluded.startswith("1 of 2 samples left out: 1 x no image member, only .")
    assert "3 files and members left out" in left
    assert all(text in left for text in ("hidden file: ._a.png", "extension: README"))
    assert "\x1b" not in "".join(index.notes())
