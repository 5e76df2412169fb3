"""`data.max_bad` is judged before any image is read, and as soon as it is certain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepclust.data.shards.index import open_index
from deepclust.errors import DataError
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run
from deepclust.stages.extract import _fill, extract
from deepclust.world import World
from tests.images import draw, encode, write_tar


def context(folder: Path, good: int, bad: int, **options: Any) -> SimpleNamespace:
    image = encode(draw(0, 8, 8))
    members = [(f"{i:03d}.png", image) for i in range(good)]
    write_tar(folder / "s.tar", [*members, *((f"x{i:03d}.txt", b"x") for i in range(bad))])
    config = Data(shards=str(folder), size=8, extract_batch=10)
    place = {"raw_dir": folder / "raw", "chunk_path": lambda number: folder / str(number)}
    work = {"config": config, "world": World(), "run": Run(folder)}
    return SimpleNamespace(index=open_index(folder), **place, **work, **options)


def test_what_the_index_knows_ends_a_run_before_an_image_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"9 of 33 samples cannot be used") as caught:
        extract(context(tmp_path, 24, 9), lambda images: pytest.fail("an image was read"))
    assert "s.tar, key 'x000'" in str(caught.value)
    assert str(caught.value).count("\n  ") == 5


def test_extraction_ends_with_the_batch_that_makes_it_certain(tmp_path: Path) -> None:
    asked = []

    def stream(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            asked.append(request.sample_ids)
            ids = request.sample_ids
            bad = [SimpleNamespace(sample_id=i, reason=f"{i} is bad") for i in ids[:2]]
            images = [torch.zeros(len(ids), 1)]
            yield SimpleNamespace(images=images, sample_ids=ids, bad=bad, tag=request.tag)

    silent = SimpleNamespace(alive=lambda: None, show=lambda *done: None)
    fakes = {
        "loader": SimpleNamespace(stream=stream),
        "draw": lambda queue, numbers: iter(numbers),
        "report": silent,
        "progress": lambda stage: silent,
    }
    whole = context(tmp_path, 300, 0, **fakes)
    with pytest.raises(DataError, match=r"4 of 300 samples cannot be used"):
        _fill(whole, lambda images: images, [range(300)], [0], torch.zeros(1))  # type: ignore[arg-type]
    assert len(asked) == 2
