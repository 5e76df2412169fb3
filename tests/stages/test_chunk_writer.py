"""Chunks are committed in order beside the extraction, and what goes wrong is raised."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepclust.clustering.moments import Moments
from deepclust.errors import DiskError
from deepclust.stages import raw_chunk
from deepclust.stages.chunk_writer import ChunkWriter
from deepclust.stages.extract import _add_batch, _Open, merge_moments
from deepclust.stages.unusable import NOT_FINITE


def test_chunks_are_on_disk_in_order_and_each_is_reported_when_it_is() -> None:
    written: list[tuple[int, str]] = []
    said: list[tuple[int, int]] = []
    main = threading.get_ident()

    def commit(number: int, chunk: str) -> None:
        assert threading.get_ident() != main
        written.append((number, chunk))

    with ChunkWriter(commit, lambda number: said.append((number, threading.get_ident()))) as writer:
        for number in (3, 1, 2):
            writer.put(number, f"chunk {number}")
            assert len(said) == number % 3  # those before it
    assert written == [(3, "chunk 3"), (1, "chunk 1"), (2, "chunk 2")]
    assert said == [(3, main), (1, main), (2, main)]


@pytest.mark.parametrize("more", [0, 1])
def test_a_disk_that_is_full_ends_the_extraction_with_its_own_error(more: int) -> None:
    def commit(number: int, chunk: int) -> None:
        raise DiskError("full")

    said: list[int] = []

    def extract() -> None:
        with ChunkWriter(commit, said.append) as writer:
            for number in range(1 + more):
                writer.put(number, number)

    with pytest.raises(DiskError, match="full"):
        extract()
    assert said == []


def test_an_error_of_the_extraction_waits_for_the_chunk_that_is_being_written() -> None:
    written: list[int] = []
    writing, go = threading.Event(), threading.Event()

    def commit(number: int, chunk: int) -> None:
        writing.set()
        go.wait(10)
        written.append(number)

    def extract() -> None:
        with ChunkWriter(commit, lambda number: None) as writer:
            writer.put(0, 0)
            writing.wait(10)
            go.set()
            raise KeyError("of a reader")

    with pytest.raises(KeyError, match="of a reader"):
        extract()
    assert written == [0]


@pytest.mark.parametrize("bad", [[], [7], [7, 9]])
def test_a_batch_has_the_moments_of_its_usable_rows_and_zeros_for_the_others(
    bad: list[int],
) -> None:
    rows, pivot = torch.randn(10, 4), torch.randn(4)
    rows[2, 1] = torch.inf if bad else 0.0
    ids = np.arange(5, 15)
    given = [type("Bad", (), {"sample_id": i, "reason": f"{i} is bad"}) for i in bad]
    chunk = _Open()
    loaded = SimpleNamespace(sample_ids=ids, bad=given)
    context = SimpleNamespace(dtype=torch.float16, moments=True)
    reasons = _add_batch(context, chunk, rows, loaded, pivot)
    if bad:
        assert reasons.pop(7) == "7 is bad"  # it was broken before its feature was not finite
    assert set(reasons) == set(bad) - {7}
    usable = ~np.isin(ids, bad)
    (half,) = chunk.rows
    expected = torch.where(torch.from_numpy(usable)[:, None], (rows - pivot).half(), 0)
    assert torch.equal(half, expected)
    assert chunk.moments is not None
    assert chunk.moments.count == usable.sum()
    rows[3] = torch.nan
    later = _add_batch(context, _Open(), rows, loaded, pivot)
    assert later[8].endswith(NOT_FINITE)


@pytest.mark.parametrize("dim", [1, 7, 8, 20])
def test_moments_are_packed_on_disk_and_those_of_older_runs_are_read(
    tmp_path: Path, dim: int
) -> None:
    pivot = torch.randn(dim)
    parts = [Moments.zero(pivot).add(torch.randn(30, dim)) for _ in range(2)]
    for number, one in enumerate(parts):
        known = {"pivot": pivot, "count": torch.tensor(one.count), "sum": one.sum}
        outer = {"outer": one.outer} if number else {"outer_panels": one.packed()}
        path = tmp_path / f"unit-{number:05d}.safetensors"
        raw_chunk.write(path, known | outer, {}, lambda: None)
    silent = SimpleNamespace(report=SimpleNamespace(alive=lambda: None), show=lambda *_: None)
    merged, whole = merge_moments(tmp_path, silent), parts[0].merge(parts[1])
    assert merged.count == whole.count == 60
    assert torch.equal(merged.outer, whole.outer)
    assert torch.equal(merged.covariance(), whole.covariance())
    assert whole.packed().numel() <= {20: 0.6}.get(dim, 1.0) * dim**2
