"""What is measured: labels that meet by class name, and features made as the method makes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deepclust import Recipe, open_index
from deepclust.errors import DataError
from deepclust.evaluate.frozen import embed_labelled, freeze, freeze_shards
from tests.evaluate.blobs import splits
from tests.images import make_shards

DATA = Recipe.load("demo-fashion", "data.shards=s", "data.workers=0", "data.size=16").data


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean((2, 3))


def named_shards(folder: Path, names: list[str] | None, **options: object) -> Path:
    make_shards(folder, n=60, classes=3, **options)
    facts = json.loads((folder / "dataset.json").read_text() if names is None else "{}")
    (folder / "dataset.json").write_text(json.dumps({**facts, "class_names": names}))
    return folder


def test_arrays_keep_their_order_and_labels_become_positions_in_the_classes() -> None:
    (x, y), (test_x, test_y) = splits(100)
    frozen = freeze((x, y * 7 + 5), (test_x, test_y * 7 + 5))
    assert frozen.classes == ["5", "12", "19", "26"]
    assert (frozen.train.labels == y).all()
    assert (frozen.test.labels == test_y).all()
    assert frozen.train.features is x


def test_labels_of_two_tables_are_joined_by_name_and_never_by_number(tmp_path: Path) -> None:
    train = open_index(named_shards(tmp_path / "train", ["cat", "dog", "owl"]))
    test = open_index(named_shards(tmp_path / "test", ["owl", "emu", "cat"]))
    frozen = freeze_shards(mean_colour, train, test, DATA)
    assert frozen.classes == ["cat", "dog", "owl", "emu"]
    names = [["owl", "emu", "cat"][label] for label in np.asarray(test.labels)]
    assert [frozen.classes[label] for label in frozen.test.labels] == names
    assert (frozen.train.labels == np.asarray(train.labels)).all()


def test_tables_without_a_common_name_are_refused(tmp_path: Path) -> None:
    train = open_index(named_shards(tmp_path / "train", ["cat", "dog", "owl"]))
    test = open_index(make_shards(tmp_path / "test", n=60, classes=3))
    with pytest.raises(DataError, match=r"share no class name .*'cat'.*class_names"):
        freeze_shards(mean_colour, train, test, DATA)


def test_shards_without_labels_are_refused_with_the_fix(tmp_path: Path) -> None:
    index = open_index(make_shards(tmp_path / "plain", n=20, labels=False))
    with pytest.raises(DataError, match=r"plain has no labels.*KEY.cls"):
        embed_labelled(mean_colour, index, DATA)


def test_every_labelled_sample_has_its_row_whatever_the_batches(tmp_path: Path) -> None:
    index = open_index(make_shards(tmp_path / "shards", n=60, classes=3))
    one = embed_labelled(mean_colour, index, DATA)
    other = embed_labelled(mean_colour, index, DATA.model_copy(update={"extract_batch": 7}))
    assert (one.sample_ids == np.arange(60)).all()
    assert (one.features == other.features).all()
    assert torch.tensor(one.features).isfinite().all()


def test_large_class_ids_are_names_as_any_others(tmp_path: Path) -> None:
    index = open_index(make_shards(tmp_path / "shards", n=60, classes=3))
    (tmp_path / "shards" / "dataset.json").unlink(missing_ok=True)
    index.labels = np.array([5, 10**9 + 7, 2**31 - 1], np.int32)[np.asarray(index.labels)]
    index.class_names = None
    frozen = freeze_shards(mean_colour, index, index, DATA)
    assert frozen.classes == ["5", "1000000007", "2147483647"]
    assert [int(frozen.classes[y]) for y in frozen.test.labels] == index.labels.tolist()


def test_what_is_odd_about_two_tables_is_told(tmp_path: Path) -> None:
    train = open_index(named_shards(tmp_path / "train", ["cat", "dog", "owl"]))
    test = open_index(named_shards(tmp_path / "test", ["owl", "emu", "cat"]))
    (note,) = freeze_shards(mean_colour, train, test, DATA).notes
    assert re.match(
        r"\d+ of 60 test images are of 1 classes without a training image \(emu\)", note
    )
    numbers = open_index(named_shards(tmp_path / "numbers", ["0", "1", "2"]))
    bare = open_index(make_shards(tmp_path / "bare", n=60, classes=3))
    bare.class_names = None
    frozen = freeze_shards(mean_colour, numbers, bare, DATA)
    assert "bare has no class names" in frozen.notes[0]
    assert frozen.classes == ["0", "1", "2"]
    assert freeze_shards(mean_colour, bare, bare, DATA).notes == ()
