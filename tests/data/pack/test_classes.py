"""Classes are what the user means: folders with images, by a rule or by a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepclust.data.pack.classes import Labels, describe, labels_by_folder
from deepclust.data.pack.pack import pack
from deepclust.errors import DataError, RecipeError
from tests.data.pack.test_walk import packed, put

SPLITS = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png"]


def labels(classes: str, files: list[str] = SPLITS) -> tuple[list[int], list[str] | None]:
    numbers, names = labels_by_folder(files, classes)
    return numbers.tolist(), names


def names_file(folder: Path, *names: str) -> str:
    path = folder / "names.txt"
    path.write_text("\n".join(names))
    return str(path)


def test_the_rules_take_the_first_the_last_or_all_folders() -> None:
    assert labels("first") == ([0, 0, 1, 1], ["train", "val"])
    assert labels("last") == ([0, 1, 0, 1], ["cat", "dog"])
    assert labels("full") == ([0, 1, 2, 3], ["train/cat", "train/dog", "val/cat", "val/dog"])
    assert labels("none") == ([-1] * 4, None)
    assert labels("last", ["a.png", "x/b.png"]) == ([-1, 0], ["x"])


def test_a_file_of_names_decides_ids_and_the_rule(tmp_path: Path) -> None:
    assert labels(names_file(tmp_path, "dog", "bird", "cat"))[0] == [2, 0, 2, 0]
    assert labels(names_file(tmp_path, "val", "train"))[0] == [1, 1, 0, 0]
    full = names_file(tmp_path, "val/dog", "val/cat", "train/dog", "train/cat")
    assert labels(full)[0] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["cat"], "lacks the class 'train'"), (["a", "a"], "names 'a' 2 times"), ([], "is empty")],
)
def test_a_file_of_names_that_does_not_fit_says_so(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        labels(names_file(tmp_path, *names))


def test_a_rule_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'lats' is not none, first, last or full"):
        pack(put(tmp_path / "in/a/0.png").parents[1], tmp_path / "out", classes="lats")


def test_folders_without_images_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path / "in/__MACOSX/._x", b"\0\5\x16\7")
    put(tmp_path / "in/bee/a.png")
    put(tmp_path / "in/texts/a.txt", b"text")
    (tmp_path / "in/empty").mkdir()
    index, lines = packed(tmp_path / "in")
    assert index.class_names == ["bee"]
    assert lines[0] == "1 class: bee"


def test_splits_are_warned_about_and_many_classes_are_shortened() -> None:
    lines = list(describe(labels_by_folder(SPLITS, "first")))
    assert lines[0] == "2 classes: train, val"
    assert "warning: train, val look like the splits" in lines[1]
    many = labels_by_folder([f"{i:02d}/a.png" for i in range(12)], "first")
    assert list(describe(many)) == [
        "12 classes: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09, ... 11"
    ]  # "train" alone may be a class of vehicles
    assert len(list(describe(labels_by_folder(["train/a.png", "bus/b.png"], "first")))) == 1


def test_more_labels_than_names_are_refused_before_the_work(tmp_path: Path) -> None:
    put(tmp_path / "in/a/0.png")
    put(tmp_path / "in/b/0.png")
    with pytest.raises(DataError, match="there are 1 class names, but labels reach 1"):
        pack(tmp_path / "in", tmp_path / "out", class_names=["a"])
    assert isinstance(labels_by_folder(SPLITS, "first"), Labels)
