from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import CentreCrop, Crop, RandomResizedCrop
from deepclust.data.plan import EpochPlan
from deepclust.data.read import patience, shard_cache
from deepclust.data.read.loader import Loader, Request
from deepclust.data.shards.index import Index, open_index
from deepclust.data.shards.remote import UnreachableError
from deepclust.errors import RecipeError, RequeueWanted, ResourceError
from tests.images import draw, make_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return open_index(make_shards(tmp_path_factory.mktemp("shards"), n=64, shards=8))


@pytest.fixture
def loader(index, tmp_path, request) -> Iterator[Loader]:
    workers, read = getattr(request, "param", (2, "offset"))
    loader = Loader(index, workers, read=read, scratch=tmp_path / "scratch")
    yield loader
    loader.close()


every_loader = pytest.mark.parametrize(
    "loader",
    [(0, "offset"), (1, "offset"), (2, "offset"), (0, "block"), (2, "block"), (1, "auto")],
    indirect=True,
)


def requests(steps: int = 12, start: int = 0, **options) -> Iterator[Request]:
    labels = (np.arange(64) % 4).astype(np.int32)
    plan = EpochPlan.build(labels, seed=0, epoch=0, global_batch=16, steps=steps, **options)
    places = plan.positions.reshape(steps, 2, 8)[start:, 1]
    for mine, where in zip(plan.for_rank(1, 2, start), places, strict=True):
        yield Request(mine, where, key=5, crops=(Crop(RandomResizedCrop(24)),))


def images(loaded) -> torch.Tensor:
    return torch.cat([part.images[0] for part in loaded])


@every_loader
def test_the_loader_gives_the_same_bytes_however_it_reads(index, loader):
    here = [loader._batches[request] for request in requests()]
    for _ in range(2):  # the second time from processes and copies that are there already
        there = list(loader.stream(requests()))
        assert torch.equal(images(there), images(here))
        assert [part.sample_ids.tolist() for part in there] == [
            part.sample_ids.tolist() for part in here
        ]
        assert [part.positions.tolist() for part in there] == [
            part.positions.tolist() for part in here
        ]


def test_workers_give_every_crop_in_its_size_and_colours_and_the_tag(loader):
    colour = Colour((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5)
    crops = Crop(RandomResizedCrop(24), colour), Crop(RandomResizedCrop(8))
    wanted = [replace(request, crops=crops, tag=tag) for tag, request in enumerate(requests(3))]
    there = list(loader.stream(wanted))
    assert [part.tag for part in there] == [0, 1, 2]
    assert [images.shape for images in there[0].images] == [(8, 3, 24, 24), (8, 3, 8, 8)]
    for request, part in zip(wanted, there, strict=True):
        here = loader._batches[request].images
        assert all(torch.equal(a, b) for a, b in zip(part.images, here, strict=True))


@every_loader
def test_a_stream_that_is_left_early_resumes_as_a_slice(loader):
    whole = images(loader.stream(requests(steps=10)))
    early = loader.stream(requests(steps=10))
    first = [next(early) for _ in range(4)]
    early.close()
    rest = list(loader.stream(requests(steps=10, start=4)))
    assert torch.equal(images(first + rest), whole)
    assert not loader.cache or len(loader.cache._copies) == 8


@pytest.mark.parametrize("loader", [(0, "offset"), (2, "offset"), (2, "block")], indirect=True)
def test_requests_are_taken_lazily(loader):
    taken = []

    def endless() -> Iterator[Request]:
        while True:
            taken.append(1)
            yield next(requests(1))

    next(loader.stream(endless()))
    assert len(taken) <= (shard_cache.AHEAD + 10 if loader.cache else 6)


def test_the_image_of_every_sample_is_in_its_row(loader):
    ids = np.random.default_rng(0).permutation(64)
    wanted = [Request(part, part, 0, (Crop(CentreCrop(32, 32)),)) for part in ids.reshape(4, 16)]
    loaded = images(loader.stream(wanted))
    assert torch.equal(loaded, torch.stack([draw(i, 32, 32, i % 4) for i in ids]))


def test_waiting_is_counted_and_the_global_generator_is_not_moved(loader):
    before = torch.random.get_rng_state()
    began = time.perf_counter()
    for _ in loader.stream(requests()):
        time.sleep(0.01)
    passed = time.perf_counter() - began
    assert 0 < loader.waited < passed - 12 * 0.01
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_error_in_the_requests_arrives_where_batches_are_taken(loader, index, tmp_path):
    def broken() -> Iterator[Request]:
        yield next(requests(1))
        raise KeyError("plan")

    for one in (loader, Loader(index, 0, read="block", scratch=tmp_path)):
        with pytest.raises(KeyError, match="plan"):
            list(one.stream(broken()))
        assert len(list(one.stream(requests(3)))) == 3
        one.close()


def test_an_empty_stream_is_empty(loader):
    assert list(loader.stream([])) == []


def test_a_stream_ends_the_one_before_it(loader):
    old = loader.stream(requests(9))
    next(old)
    next(loader.stream(requests(9)))
    with pytest.raises(AssertionError, match="newer"):
        next(old)


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_stream_works(loader):
    stream = loader.stream(requests(steps=500))
    next(stream)
    victim = loader._processes[0].pid
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(ResourceError, match=rf"pid {victim} \(SIGKILL\)"):
        list(stream)
    assert loader._processes == []
    assert len(list(loader.stream(requests()))) == 12


@pytest.mark.parametrize("asked", [True, False])
def test_a_stopped_reader_is_not_awaited_for_ever(loader, monkeypatch, asked):
    """Not after a request to stop, and not when nobody watches this process."""
    look = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))
    monkeypatch.setattr(patience, "STOP_S", 0.3)
    stream = loader.stream(requests(steps=500))
    next(stream)
    until_up(loader)
    readers = list(loader._processes)
    loader.patience.limit_s = 60.0 if asked else 0.3
    loader.patience.stopping = lambda: asked
    for reader in readers:
        os.kill(reader.pid, signal.SIGSTOP)
    error = RequeueWanted if asked else ResourceError
    with pytest.raises(error, match=rf"pid {readers[0].pid} is stopped by a signal"):
        list(stream)
    assert not any(reader.is_alive() for reader in readers)


def test_silence_while_readers_come_up_is_no_hang(monkeypatch):
    monkeypatch.setattr(patience, "LOOK_S", 0.01)
    signs: list[float] = []
    limits = patience.Patience(limit_s=0.05, alive=lambda: signs.append(time.monotonic()))
    up, ready = multiprocessing.Pipe(duplex=False)
    limits.let_start(up, readers=2)
    with limits.waiting():
        time.sleep(0.2)
        assert limits.end() is None
        assert len(signs) > 3
        ready.send_bytes(b"1")
        ready.send_bytes(b"1")
        while limits.starting:
            time.sleep(0.01)
        assert isinstance(limits.end(), ResourceError)


def test_readers_that_are_killed_before_they_are_up_end_the_wait(monkeypatch):
    monkeypatch.setattr(patience, "LOOK_S", 0.01)
    limits = patience.Patience(limit_s=0.05, alive=lambda: None)
    up, ready = multiprocessing.Pipe(duplex=False)
    limits.let_start(up, readers=2)
    ready.send_bytes(b"1")
    ready.close()  # as the last reader's end is closed by a kill
    deadline = time.monotonic() + 10
    while limits.starting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    later, _open = multiprocessing.Pipe(duplex=False)
    limits.let_start(later, readers=1)
    limits._await_start(up, 1)  # the first wait, which ends late, leaves the second alone
    assert limits.starting
    limits.end_start()


def test_every_reader_says_that_it_is_up(loader):
    list(loader.stream(requests()))
    until_up(loader)


def until_up(loader: Loader) -> None:
    while loader.patience.starting:
        time.sleep(0.01)


def test_more_readers_than_cores_are_no_warning_of_torch(index, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = Loader(index, 2, read="offset", scratch=tmp_path / "scratch")
        assert len(list(loader.stream(requests(2)))) == 2
        loader.close()


def test_an_error_of_a_reader_arrives_as_it_was_raised(loader, tmp_path):
    lost = Index(loader._batches.index.folder, [tmp_path / "no.tar"] * 8)
    other = Loader(lost, 1, read="offset")
    with pytest.raises(UnreachableError, match=r"^cannot read .*no.tar: No such file"):
        next(other.stream(requests()))
    other.close()


def test_workers_do_not_hear_the_signals_that_are_for_the_rank(loader):
    stream = loader.stream(requests())
    next(stream)
    for name in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        os.kill(loader._processes[0].pid, name)
    assert len(list(stream)) == 11
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


SCRIPT = """
import sys, time
from deepclust.data.shards.index import open_index
from deepclust.data.read.loader import Loader, Request
from deepclust.data.images.crops import CentreCrop, Crop
import numpy as np
shards, scratch = sys.argv[1:]
loader = Loader(open_index(shards), 2, read="block", scratch=scratch)
request = Request(np.arange(16), np.arange(16), 0, (Crop(CentreCrop(32, 32)),))
for _ in loader.stream(request for _ in range(10**9)):
    print(*[process.pid for process in loader._processes], flush=True)
    time.sleep(1000)
"""


def run_script(index: Index, folder: Path) -> subprocess.Popen[str]:
    script = folder / "script.py"  # without a __main__ guard: workers must not run it again
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(index.shards[0].parent), str(folder / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed_even_stopped_ones(index, tmp_path):
    with run_script(index, tmp_path) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
        assert all(gone(pid) for pid in pids)
    left = list((tmp_path / "s").glob("*"))
    assert len(left) == 1
    Loader(index, 0, read="block", scratch=tmp_path / "s").close()
    assert not any(folder.exists() for folder in left)


def forked(pid: int) -> list[int]:
    """Return the pids of the children of a process that are fork servers, or forked from one."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in listing.stdout.splitlines() if "forkserver" in line]


def first_reader(parent: int) -> int:
    """Return the first process of the fork server, soon after it is there."""
    while True:
        for reader in (pid for server in forked(parent) for pid in forked(server)):
            time.sleep(0.05)  # the first thing that it does is to ask for its end
            return reader


@pytest.mark.slow
def test_a_worker_that_is_stopped_at_its_start_ends_with_its_parent(index, tmp_path):
    with run_script(index, tmp_path) as parent:
        reader = first_reader(parent.pid)
        os.kill(reader, signal.SIGSTOP)
        parent.kill()
        assert gone(reader)


@pytest.mark.parametrize(
    "options", [{"read": "blocks"}, {"workers": -1}, {"prefetch": 0}], ids=lambda o: next(iter(o))
)
def test_impossible_settings_of_a_loader_are_refused(index, options):
    with pytest.raises(RecipeError, match="auto, offset, block"):
        Loader(index, **{"workers": 0, **options})


@pytest.mark.gpu
def test_images_are_in_pinned_memory_where_there_is_a_gpu(loader):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert all(part.images[0].is_pinned() for part in loader.stream(requests()))
