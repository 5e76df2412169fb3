"""A stage of an hour is not a hang: signs of life in it, and no time limit for those who wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepclust import files, open_index, pipeline
from deepclust.data.read.loader import Loader
from deepclust.errors import DataError
from deepclust.files import read_json, remove_folder, sync, write_tensors
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run, manifest, verify, whole_file
from deepclust.run.lock import hold
from deepclust.run.signs import computing
from deepclust.stages import project as projection
from deepclust.stages import raw_chunk
from deepclust.stages.extract import ExtractContext, extract
from deepclust.stages.project import project
from deepclust.stages.shared_rows import SharedRows
from deepclust.world import World
from tests.ranks import on_ranks
from tests.stages.test_cluster import Recorder, embed
from tests.tiny import tiny_shards

LIMIT_S = 1.0  # of a collective


class Signs:
    """How often something has shown a sign of life."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def context_of(run: Run, shards: Path, world: World) -> ExtractContext:
    index = open_index(shards)
    data = Data(shards=str(shards), size=16, resize=16, extract_batch=64)
    report: Any = Recorder()
    loader = Loader(index, 0)
    return ExtractContext(run, 0, world, index, loader, data, report, lambda: False)


def features(world: World, run_dir: Path, token: str, shards: Path) -> str:
    """Extract and project; each of two ranks is once later than a collective may take."""
    run, finish = Run(run_dir, token), projection._finish_features
    late = [1.5 * LIMIT_S if world.size > 1 else 0.0]

    def sleep_once() -> None:
        time.sleep(late.pop() if late else 0.0)

    def embed_slowly(images: torch.Tensor) -> torch.Tensor:
        if world.rank:
            sleep_once()
        return embed(images)

    def finish_slowly(*given: Any) -> None:
        sleep_once()
        finish(*given)

    projection._finish_features = finish_slowly
    try:
        context = context_of(run, shards, world)
        extract(context, embed_slowly)
        project(context, None)
        return str(manifest(run.round(0) / "features")["files"]["rows.npy"]["blake2b"])
    finally:
        projection._finish_features = finish


def test_ranks_wait_for_a_slow_one_and_any_number_of_them_writes_the_same(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "shards", 300)
    hashes = []
    for size in (1, 2):
        run_dir = tmp_path / str(size)
        run_dir.mkdir()
        with hold(run_dir) as token:
            hashes += on_ranks(size, features, run_dir, token, shards, limit=LIMIT_S)
        verify(run_dir / "rounds" / "0000" / "features")
    assert len(set(hashes)) == 1


def rows_of(run: Run, ranks: int) -> Path:
    """A committed stage whose rows were written by so many ranks."""
    rows = np.arange(60, dtype=np.float16).reshape(20, 3)
    path = run.path / "rows-x.npy"
    files_ = [SharedRows(path, run, rank) for rank in range(ranks)]
    files_[0].create(20, 3)
    for rank, shared in enumerate(files_):
        shared.open()
        for first in range(rank * 5, 20, ranks * 5):
            stretch = shared.stretch(first)
            stretch.add(rows[first : first + 2])
            stretch.add(rows[first + 2 : first + 5])
            stretch.end()
        shared.finish()
    stage = run.path / "stage"
    parts = files_[0].all_parts(ranks)
    run.commit(stage, lambda f: os.replace(path, f / "rows.npy"), {}, hashes={"rows.npy": parts})
    np.testing.assert_array_equal(np.load(stage / "rows.npy"), rows)
    return stage


def test_the_ranks_that_write_rows_hash_them_and_those_that_read_share_the_reading(
    tmp_path: Path,
) -> None:
    with hold(tmp_path) as token:
        stage = rows_of(Run(tmp_path, token), ranks=2)
    parts = manifest(stage)["files"]["rows.npy"]["parts"]
    assert len(parts) == 1 + 4  # the header, and a part for each stretch
    verify(stage)
    data = bytearray((stage / "rows.npy").read_bytes())
    data[parts[1][0] + 1] ^= 1  # in part 2
    (stage / "rows.npy").write_bytes(data)
    whole_file(stage, "rows.npy", share=(1, 2))  # reads parts 1 and 3
    for share in ((0, 2), (0, 1)):
        with pytest.raises(DataError, match="has changed since it was written"):
            whole_file(stage, "rows.npy", share=share)


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: parts[:-1],
        lambda parts: parts[::-1],
        lambda parts: [[end, "0" * 32] for end, _ in parts],
        lambda parts: [[str(end), digest] for end, digest in parts],
        lambda parts: "none",
    ],
)
def test_parts_that_do_not_belong_to_the_file_are_a_damaged_manifest(
    tmp_path: Path, damage: Callable[[Any], Any]
) -> None:
    with hold(tmp_path) as token:
        stage = rows_of(Run(tmp_path, token), ranks=1)
    record = read_json(stage / "manifest.json")
    record["files"]["rows.npy"]["parts"] = damage(record["files"]["rows.npy"]["parts"])
    files.write_json(stage / "manifest.json", record)
    with pytest.raises(DataError, match="is damaged"):
        verify(stage)


def test_rows_that_no_rank_wrote_are_not_committed(tmp_path: Path) -> None:
    shared = SharedRows(tmp_path / "rows.npy", Run(tmp_path), 0)
    shared.create(10, 2)
    stretch = shared.open().stretch(0)
    stretch.add(np.zeros((5, 2), np.float16))
    stretch.end()
    shared.finish()
    with pytest.raises(DataError, match="was not written to its end"):
        shared.all_parts(1)


def test_a_large_file_is_written_forced_to_disk_and_hashed_with_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SYNC_PIECE", 1 << 12)
    monkeypatch.setattr(raw_chunk, "HASH_BLOCK", 1 << 12)
    rows = {"rows": torch.zeros(1 << 14, dtype=torch.uint8)}
    written, forced, chunk = Signs(), Signs(), Signs()
    write_tensors(tmp_path / "plain", rows, alive=written)
    sync(tmp_path / "plain", forced)
    raw_chunk.write(tmp_path / "chunk", rows, {}, lambda: None, chunk)
    assert written.count == forced.count == 5
    assert chunk.count >= 3 * 4  # written, hashed, forced to disk
    removed = Signs()
    remove_folder(tmp_path, removed)
    assert removed.count == 2
    assert not tmp_path.exists()


def test_a_call_that_computes_shows_signs_of_life_and_one_that_waits_does_not() -> None:
    computes, waits = Signs(), Signs()
    with computing(computes):
        until = time.monotonic() + 2.3
        while time.monotonic() < until:
            sum(range(1000))
    with computing(waits):
        time.sleep(2.3)
    assert computes.count >= 1
    assert waits.count == 0


@pytest.mark.parametrize(("inline", "sign"), [(True, 0), (False, 1)])
def test_waiting_for_another_rank_is_no_sign_of_life_and_for_the_worker_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inline: bool, sign: int
) -> None:
    """Else a rank 0 that hangs would never be noticed, as the others would show signs for it."""
    signs = Signs()
    monkeypatch.setattr(pipeline.cluster, "wait_for", lambda stage, asked: not asked())
    context: Any = SimpleNamespace(
        inline=None, run=Run(tmp_path), world=World(), emit=lambda *given, **more: None,
        recipe=SimpleNamespace(cluster=object(), clusters_inline=inline),
        asked=lambda: False, stopping=lambda: bool(signs()),
    )  # fmt: skip
    pipeline.await_stage(context, 0, "assignments")
    assert signs.count == sign
