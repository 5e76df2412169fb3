from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop
from deepclust.data.images.device_crops import crop as crop_there
from deepclust.data.images.reduced import decode_for
from deepclust.data.read import dataset, sending
from deepclust.data.read.dataset import Batches, Request
from deepclust.data.read.substitutes import Labels
from deepclust.data.shards.index import Index, open_index
from deepclust.data.shards.remote import UnreachableError
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
    return Request(np.array(ids), positions, key, (Crop(CentreCrop(32, 32)),), path)


def test_a_bad_sample_is_replaced_by_a_member_of_its_cluster(index, tmp_path):
    loaded = Batches(index)[request(range(32), tmp_path)]
    assert [entry.sample_id for entry in loaded.bad] == [5, 9]
    assert (LABELS[loaded.sample_ids] == LABELS).all()
    assert set(loaded.sample_ids).isdisjoint({5, 9})
    assert torch.equal(
        loaded.images[0], torch.stack([draw(i, 32, 32, i % 4) for i in loaded.sample_ids])
    )
    assert "shard-000000.tar, key '0000005', offset" in loaded.bad[0].reason


def test_the_replacement_depends_on_position_and_key_not_on_the_batch(index, tmp_path):
    batches = Batches(index)
    whole = batches[request(range(32), tmp_path)]
    alone = batches[request([5], tmp_path, first=105)]
    assert alone.sample_ids[0] == whole.sample_ids[5]
    assert torch.equal(alone.images[0][0], whole.images[0][5])
    many = batches[request([5] * 40, tmp_path)]
    assert set(many.sample_ids) == {1, 13, 17, 21, 25, 29}


def same(images: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(images, others, strict=True))


def test_a_replacement_gets_the_crop_of_its_position(index, tmp_path):
    batches, wanted = Batches(index), cropped([5], assignments=tmp_path / "assignments.npy")
    loaded = batches[wanted]
    direct = replace(wanted, sample_ids=loaded.sample_ids, assignments=None)
    assert same(loaded.images, batches[direct].images)


CROP = Crop(RandomResizedCrop(16))
SIZES = CROP, Crop(RandomResizedCrop(16)), Crop(RandomResizedCrop(8, (0.05, 0.3)))


def cropped(ids, crops: tuple[Crop, ...] = (CROP,), **options) -> Request:
    positions = np.arange(100, 100 + len(ids))
    return Request(np.array(ids), positions, 3, crops, **options)


def test_crops_differ_and_each_is_what_a_request_for_it_alone_gives(index):
    batches, ids = Batches(index), [4, 6, 8]
    together = batches[cropped(ids, SIZES)].images
    assert [images.shape[2] for images in together] == [16, 16, 8]
    assert not torch.equal(together[0], together[1])
    for v, crop in enumerate(SIZES):
        key = 3 if v == 0 else derive(3, "view", v)
        assert torch.equal(together[v], batches[replace(cropped(ids, (crop,)), key=key)].images[0])


def test_an_image_is_read_and_decoded_once_for_all_its_crops(index, monkeypatch):
    batches, decoded = Batches(index), []
    monkeypatch.setattr(dataset, "decode_for", lambda *of: decoded.append(1) or decode_for(*of))
    assert len(batches[cropped([4, 6, 8], SIZES)].images) == 3
    assert len(decoded) == 3


def test_colours_are_changed_after_the_crop_each_crop_by_its_own_settings_and_draws(index):
    batches, ids = Batches(index), [4, 6, 8]
    colours = Colour((0.4, 0.4, 0.4, 0.1), 1.0, 0.2, 0.5), Colour(solarise=1.0), None
    crops = tuple(replace(crop, colour=c) for crop, c in zip(SIZES, colours, strict=True))
    plain = batches[cropped(ids, SIZES)].images
    changed = batches[cropped(ids, crops)].images
    for v, colour in enumerate(colours[:2]):
        draws = colour.draws(derive(3, "colour", v), cropped(ids).positions)
        assert torch.equal(changed[v], colour(plain[v], draws))
        assert not torch.equal(changed[v], plain[v])
    assert torch.equal(changed[2], plain[2])


@pytest.mark.parametrize("clustered", [True, False])
def test_all_crops_show_the_sample_that_replaced_a_bad_one(index, tmp_path, clustered):
    path = tmp_path / "assignments.npy" if clustered else None
    crops = tuple(replace(crop, colour=Colour(grey=1.0)) for crop in SIZES)
    wanted = cropped([5, 6], crops, assignments=path, replace=True)
    loaded = Batches(index)[wanted]
    assert loaded.bad[0].sample_id == 5 != loaded.sample_ids[0]
    direct = replace(wanted, sample_ids=loaded.sample_ids, assignments=None, replace=False)
    assert same(loaded.images, Batches(index)[direct].images)


def test_without_clusters_any_sample_that_is_not_excluded_replaces_a_bad_one(index):
    index.excluded.update(dict.fromkeys(range(10, 32), "no image member"))
    batches, wanted = Batches(index), cropped([5] * 60, replace=True)
    loaded = batches[wanted]
    assert set(loaded.sample_ids) == {0, 1, 2, 3, 4, 6, 7, 8}
    again = replace(wanted, sample_ids=wanted.sample_ids[7:9], positions=wanted.positions[7:9])
    assert np.array_equal(batches[again].sample_ids, loaded.sample_ids[7:9])
    other = batches[replace(wanted, key=4)]
    assert not np.array_equal(other.sample_ids, loaded.sample_ids)


def test_without_clusters_nothing_readable_is_an_error_too(index):
    for sample in range(32):
        damage(index, sample)
    with pytest.raises(DataError, match="Check that the storage can be reached"):
        Batches(index)[cropped([2], replace=True)]


def test_without_assignments_a_bad_row_is_black_and_reported(index):
    loaded = Batches(index)[request([4, 5, 6])]
    assert loaded.sample_ids.tolist() == [4, 5, 6]
    assert [entry.sample_id for entry in loaded.bad] == [5]
    first, bad, last = loaded.images[0].sum((1, 2, 3))
    assert bad == 0 < min(first, last)


def test_a_packed_batch_has_the_pixels_of_one_that_readers_crop(index, tmp_path):
    for path in (tmp_path, None):  # a bad sample is replaced, or its row is black
        asked = replace(request([4, 5, 6], path), crops=(Crop(RandomResizedCrop(9)), CROP))
        made, later = Batches(index)[asked], Batches(index)[replace(asked, packed=True)]
        sent = sending.received(sending.share(later))
        assert same([crop_there(packed) for packed in sent.images], made.images)
        assert made.sample_ids.tolist() == later.sample_ids.tolist()


def test_a_cluster_without_a_readable_member_borrows_from_the_others(index, tmp_path):
    alone = np.where(np.arange(32) == 5, 7, LABELS).astype(np.int32)
    alone[:4] = -1
    np.save(tmp_path / "assignments.npy", alone)
    loaded = Batches(index)[request([5] * 30, tmp_path)]
    assert set(loaded.sample_ids).isdisjoint({0, 1, 2, 3, 5, 9})
    assert len(set(loaded.sample_ids)) > 10


def test_when_nothing_can_be_read_the_run_fails_and_says_where(index, tmp_path):
    for sample in range(32):
        damage(index, sample)
    with pytest.raises(DataError, match=r"key '0000002'.* neither could 16 samples"):
        Batches(index)[request([2], tmp_path)]


KNOWN = Labels(np.array([1, 5, 7, 8, 9, 12]), np.array([0, 0, 0, 1, 2, 1], np.int32))


@pytest.mark.parametrize("clustered", [True, False])
def test_a_labelled_sample_is_replaced_by_one_of_its_class_and_others_by_one_without_a_label(
    index, tmp_path, clustered
):
    damage(index, 6)
    path = tmp_path / "assignments.npy" if clustered else None
    batches = Batches(index, labels=KNOWN)
    of_class = batches[cropped([5] * 40, assignments=path, replace=True)]
    assert set(of_class.sample_ids) == {1, 7}
    unlabelled = batches[cropped([6] * 40, assignments=path, replace=True)].sample_ids
    assert set(unlabelled).isdisjoint(KNOWN.sample_ids)
    assert len(set(unlabelled)) > 4


def test_a_class_that_cannot_be_read_at_all_is_replaced_by_any_sample(index):
    damage(index, 1)
    damage(index, 7)
    loaded = Batches(index, labels=KNOWN)[cropped([5] * 20, replace=True)]
    assert set(loaded.sample_ids).isdisjoint({1, 5, 7, 9})


def test_labelled_rows_have_crops_and_colours_of_their_own(index):
    light = Crop(RandomResizedCrop(16, (0.9, 1.0)), Colour(grey=0.0, jitter_p=0.0))
    crops = (Crop(RandomResizedCrop(16), Colour(grey=1.0), labelled=light), CROP)
    known = np.array([True, False, True, False])
    loaded = Batches(index)[cropped([4, 6, 8, 10], crops, known=known)]
    heavy = Batches(index)[cropped([4, 6, 8, 10], crops)].images
    plain = Batches(index)[cropped([4, 6, 8, 10], (replace(light, colour=None), CROP))].images
    rows = torch.from_numpy(known)
    assert torch.equal(loaded.images[0][~rows], heavy[0][~rows])
    assert torch.equal(loaded.images[0][rows], plain[0][rows])
    assert torch.equal(loaded.images[1], heavy[1])


def test_a_storage_that_fails_is_no_bad_sample(index, tmp_path, monkeypatch):
    def pread(handle: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    for wanted in (request([0], tmp_path), request([0]), cropped([0], replace=True)):
        batches = Batches(index)
        batches.files.patience_s = 0.0
        with pytest.raises(UnreachableError, match="Input/output error"):
            batches[wanted]


def test_a_sample_excluded_by_the_index_keeps_its_reason(index):
    index.excluded[6] = "no image member"
    damage(index, 6)
    loaded = Batches(index)[request([6])]
    assert loaded.bad[0].reason.endswith(": no image member")


def test_a_decompression_bomb_counts_as_a_bad_sample(index):
    loaded = Batches(index, max_pixels=1000)[request([0])]
    assert "more than the limit of 1000" in loaded.bad[0].reason
