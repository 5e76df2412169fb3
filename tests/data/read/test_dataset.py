from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import CentreCrop, RandomResizedCrop
from deepclust.data.read.dataset import REPLACEMENTS, Batches, Request
from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DataError
from deepclust.world import derive
from tests.images import draw, make_shards

LABELS = (np.arange(32) % 4).astype(np.int32)


@pytest.fixture
def index(tmp_path) -> Index:
    """32 samples of 4 classes; the images of 5 and 9 (class 1) are damaged after indexing."""
    index = open_index(make_shards(tmp_path / "shards", n=32, shards=4))
    for sample in (5, 9):
        damage(index, sample)
    np.save(tmp_path / "assignments.npy", LABELS[None])
    return index


def damage(index: Index, sample: int) -> None:
    shard, offset, _ = (int(column[0]) for column in index.locate(np.array([sample])))
    with open(index.shards[shard], "r+b") as file:
        file.seek(offset)
        file.write(b"no image")


def request(ids, tmp_path: Path | None = None, key: int = 3, first: int = 100) -> Request:
    path = None if tmp_path is None else tmp_path / "assignments.npy"
    positions = np.arange(first, first + len(ids))
    return Request(np.array(ids), positions, key, CentreCrop(32, 32), path)


def test_a_bad_sample_is_replaced_by_a_member_of_its_cluster(index, tmp_path):
    loaded = Batches(index)[request(range(32), tmp_path)]
    assert [entry.sample_id for entry in loaded.bad] == [5, 9]
    assert (LABELS[loaded.ids] == LABELS).all()
    assert set(loaded.ids).isdisjoint({5, 9})
    assert torch.equal(loaded.images[0], torch.stack([draw(i, 32, 32, i % 4) for i in loaded.ids]))
    entry = loaded.bad[0]
    assert (entry.position, entry.replacement) == (105, loaded.ids[5])
    assert "shard-000000.tar, key '0000005', offset" in entry.reason


def test_the_replacement_depends_on_position_and_key_not_on_the_batch(index, tmp_path):
    batches = Batches(index)
    whole = batches[request(range(32), tmp_path)]
    alone = batches[request([5], tmp_path, first=105)]
    assert alone.ids[0] == whole.ids[5]
    assert torch.equal(alone.images[0, 0], whole.images[0, 5])
    many = batches[request([5] * 40, tmp_path)]
    assert set(many.ids) == {1, 13, 17, 21, 25, 29}


def test_a_replacement_gets_the_view_of_its_position(index, tmp_path):
    asked = request([5], tmp_path)
    asked = Request(asked.ids, asked.positions, 3, RandomResizedCrop(16), asked.assignments)
    batches = Batches(index)
    loaded = batches[asked]
    direct = Request(loaded.ids, asked.positions, 3, RandomResizedCrop(16))
    assert torch.equal(loaded.images, batches[direct].images)


def cropped(ids, **options) -> Request:
    positions = np.arange(100, 100 + len(ids))
    return Request(np.array(ids), positions, 3, RandomResizedCrop(16), **options)


def test_views_differ_and_each_is_what_a_request_for_it_alone_gives(index):
    batches, ids = Batches(index), [4, 6, 8]
    three = batches[cropped(ids, views=3)].images
    assert three.shape == (3, 3, 3, 16, 16)
    assert torch.equal(three[:1], batches[cropped(ids)].images)
    for v in (1, 2):
        alone = replace(cropped(ids), key=derive(3, "view", v))
        assert torch.equal(three[v], batches[alone].images[0])
        assert not torch.equal(three[v], three[v - 1])


def test_an_image_is_read_once_for_all_its_views(index, monkeypatch):
    batches, places = Batches(index), []
    read = batches.files.read
    monkeypatch.setattr(batches.files, "read", lambda *at: places.append(at) or read(*at))
    assert len(batches[cropped([4, 6, 8], views=5)].images) == 5
    assert len(places) == 3


def test_colours_are_changed_after_the_crop_each_view_by_draws_of_its_own(index):
    batches, colour = Batches(index), Colour((0.4, 0.4, 0.4, 0.1), 1.0, 0.2, 0.5)
    asked = cropped([4, 6, 8], views=2, colour=colour)
    plain = batches[replace(asked, colour=None)].images
    changed = batches[asked].images
    for v in range(2):
        draws = colour.draws(derive(3, "colour", v), asked.positions)
        assert torch.equal(changed[v], colour(plain[v], draws))
        assert not torch.equal(changed[v], plain[v])


@pytest.mark.parametrize("clustered", [True, False])
def test_all_views_show_the_sample_that_replaced_a_bad_one(index, tmp_path, clustered):
    path = tmp_path / "assignments.npy" if clustered else None
    asked = cropped([5, 6], views=2, colour=Colour(grey=1.0), assignments=path, replace=True)
    loaded = Batches(index)[asked]
    assert loaded.bad[0].replacement == loaded.ids[0] != 5
    direct = replace(asked, ids=loaded.ids, assignments=None, replace=False)
    assert torch.equal(loaded.images, Batches(index)[direct].images)


def test_without_clusters_any_sample_that_is_not_excluded_replaces_a_bad_one(index):
    index.excluded.update(dict.fromkeys(range(10, 32), "no image member"))
    batches, asked = Batches(index), cropped([5] * 60, replace=True)
    loaded = batches[asked]
    assert set(loaded.ids) == {0, 1, 2, 3, 4, 6, 7, 8}
    again = replace(asked, ids=asked.ids[7:9], positions=asked.positions[7:9])
    assert np.array_equal(batches[again].ids, loaded.ids[7:9])
    other = batches[replace(asked, key=4)]
    assert not np.array_equal(other.ids, loaded.ids)


def test_without_clusters_nothing_readable_is_an_error_too(index):
    for sample in range(32):
        damage(index, sample)
    with pytest.raises(DataError, match="Is the storage there"):
        Batches(index)[cropped([2], replace=True)]


def test_without_assignments_a_bad_row_is_black_and_reported(index):
    loaded = Batches(index)[request([4, 5, 6])]
    assert loaded.ids.tolist() == [4, 5, 6]
    assert [(entry.sample_id, entry.replacement) for entry in loaded.bad] == [(5, -1)]
    assert loaded.images[0, 1].sum() == 0
    assert loaded.images[0, 0].sum() > 0 < loaded.images[0, 2].sum()


def test_a_cluster_without_a_readable_member_borrows_from_the_others(index, tmp_path):
    alone = np.where(np.arange(32) == 5, 7, LABELS).astype(np.int32)
    alone[:4] = -1
    np.save(tmp_path / "assignments.npy", alone)
    loaded = Batches(index)[request([5] * 30, tmp_path)]
    assert set(loaded.ids).isdisjoint({0, 1, 2, 3, 5, 9})
    assert len(set(loaded.ids)) > 10


def test_when_nothing_can_be_read_the_run_fails_and_says_where(index, tmp_path):
    for sample in range(32):
        damage(index, sample)
    with pytest.raises(DataError, match=f"key '0000002'.* nor could {2 * REPLACEMENTS} samples"):
        Batches(index)[request([2], tmp_path)]


def test_a_sample_excluded_by_the_index_keeps_its_reason(index):
    index.excluded[6] = "no image member"
    damage(index, 6)
    loaded = Batches(index)[request([6])]
    assert loaded.bad[0].reason.endswith(": no image member")


def test_a_bomb_is_a_bad_sample(index):
    loaded = Batches(index, max_pixels=1000)[request([0])]
    assert "more than the limit of 1000" in loaded.bad[0].reason
