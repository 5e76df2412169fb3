from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepclust.data import owned_folder as owner
from deepclust.data.images.crops import CentreCrop, Crop
from deepclust.data.plan import EpochPlan
from deepclust.data.read.dataset import Request
from deepclust.data.read.shard_cache import ShardCache, on_network
from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DiskError
from tests.images import make_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return open_index(make_shards(tmp_path_factory.mktemp("shards"), n=96, shards=24, size=8))


def request(*ids: int) -> Request:
    return Request(np.array(ids), np.array(ids), 0, (Crop(CentreCrop(8, 8)),))


def copies(one: ShardCache) -> set[int]:
    return {int(path.name) for path in one.folder.iterdir() if not path.name.startswith(".")}


def test_a_request_comes_out_when_its_shards_are_copied(index, tmp_path):
    one = ShardCache(index, tmp_path)
    for wanted in one.stream([request(0, 95), request(40)]):
        needed = set(index.locate(wanted.sample_ids).shard)
        assert needed <= copies(one)
        one.release_oldest()
    for shard in copies(one):
        assert (one.folder / str(shard)).read_bytes() == index.shards[shard].read_bytes()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_shards_that_stay_are_copied_once(index, tmp_path, monkeypatch):
    copied = []
    real = ShardCache._copy
    monkeypatch.setattr(ShardCache, "_copy", lambda s, n: copied.append(n) or real(s, n))
    one = ShardCache(index, tmp_path)
    for _ in range(3):
        list(one.stream([request(0, 1, 5), request(2, 9)]))
    assert copied == [0, 1, 2]
    one.close()


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_there_are_never_more_copies_than_the_limit(index, tmp_path, limit):
    rng, one, most = np.random.default_rng(0), ShardCache(index, tmp_path, limit), 0
    for number, _ in enumerate(one.stream(request(*rng.integers(0, 96, 6)) for _ in range(60))):
        most = max(most, len(copies(one)))
        if number % 3 == 2:  # up to three batches under way, as with worker processes
            for _ in range(3):
                one.release_oldest()
    assert 1 <= most <= limit
    one.close()


def test_a_plan_with_lanes_reads_no_shard_from_its_source(index, tmp_path, monkeypatch):
    plan = EpochPlan.build(
        np.zeros(96, np.int32), 0, 0, global_batch=4, lanes=2, blocks=index.bases
    )
    one, files = ShardCache(index, tmp_path, limit=20), 0
    # a consumer that is never in a hurry, however slow this machine copies now
    monkeypatch.setattr(one._starving, "set", lambda: None)
    for wanted in one.stream(request(*row) for row in plan.for_rank(0, 1)):
        files += len(set(index.locate(wanted.sample_ids).shard) - copies(one))
        one.release_oldest()
    assert files == 0
    one.close()


def test_a_consumer_that_waits_is_never_kept_waiting_for_room(index, tmp_path):
    one = ShardCache(index, tmp_path, limit=1)
    taken = list(one.stream(request(i, 95 - i) for i in range(20)))  # nothing is ever delivered
    assert len(taken) == 20
    assert len(copies(one)) == 1
    one.close()


def test_leaving_early_stops_the_thread(index, tmp_path):
    def endless() -> Iterator[Request]:
        while True:
            yield request(0)

    one = ShardCache(index, tmp_path)
    stream = one.stream(endless())
    next(stream)
    stream.close()
    assert [wanted.sample_ids.tolist() for wanted in one.stream([request(4)])] == [[4]]
    one.close()


def test_a_shard_that_cannot_be_copied_is_left_to_the_readers(index, tmp_path):
    broken = Index(index.folder, [Path("/nowhere.tar"), *index.shards[1:]])
    one = ShardCache(broken, tmp_path)
    assert len(list(one.stream([request(0, 5)]))) == 1
    assert copies(one) == {1}
    one.close()


def test_a_full_scratch_is_an_error_that_names_it(index, tmp_path, monkeypatch):
    def full(self: ShardCache, source: object, partial: Path) -> bool:
        raise DiskError(f"cannot write {self.folder}: No space left on device.")

    monkeypatch.setattr(ShardCache, "_write", full)
    one = ShardCache(index, tmp_path)
    with pytest.raises(DiskError, match="No space left"):
        list(one.stream([request(0)]))
    one.close()


def test_a_folder_of_a_dead_process_of_this_machine_is_deleted(index, tmp_path):
    left, alive = ShardCache(index, tmp_path), ShardCache(index, tmp_path)
    record = json.loads((left.folder / owner.FILE).read_text())
    (left.folder / owner.FILE).write_text(json.dumps({**record, "started": "0"}))
    ShardCache(index, tmp_path).close()
    assert [cache.folder.exists() for cache in (left, alive)] == [False, True]
    alive.close()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/x.tar", True),
        ("/data/local/x.tar", False),
        ("/s3/a/x.tar", True),
        ("/with space/x.tar", True),
        ("/usb/x.tar", False),
        ("/home/x.tar", False),
    ],
)
def test_network_file_systems_are_recognised_by_the_innermost_mount(tmp_path, path, expected):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/data /data nfs4 rw 0 0\n/dev/sdb /data/local xfs rw 0 0\n"
        "s3fs /s3 fuse.s3fs rw 0 0\n//host/x /with\\040space cifs rw 0 0\n"
        "/dev/sdc /usb fuseblk rw 0 0\n"
    )
    assert on_network(Path(path), mounts) is expected
    assert on_network(Path(path), tmp_path / "absent") is False
