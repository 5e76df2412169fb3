"""`data.max_bad` is judged before any image is read, as soon as it is certain, on any rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepclust.data.read.loader import Bad
from deepclust.data.shards.index import open_index
from deepclust.errors import DataError, NumericalError
from deepclust.recipe.sections import Data
from deepclust.run.directory import Run
from deepclust.stages.extract import _fill, extract
from deepclust.stages.kept_crops import KeptCrops
from deepclust.stages.train import Meter, judge_bad
from deepclust.stages.unusable import check_bad, count_bad, not_finite
from deepclust.world import World
from tests.images import draw, encode, write_tar


def context(folder: Path, good: int, bad: int, **options: Any) -> SimpleNamespace:
    image = encode(draw(0, 8, 8))
    members = [(f"{i:03d}.png", image) for i in range(good)]
    write_tar(folder / "s.tar", [*members, *((f"x{i:03d}.txt", b"x") for i in range(bad))])
    config = Data(shards=str(folder), size=8, extract_batch=10)
    place = {"raw_dir": folder / "raw", "chunk_path": lambda number: folder / str(number)}
    work = {"config": config, "world": World(), "run": Run(folder), "round": 0}
    kept = {"dtype": torch.float16, "moments": True, "memory": None, "kept": KeptCrops()}
    return SimpleNamespace(index=open_index(folder), **place, **work, **kept, **options)


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


def two_ranks() -> list[Any]:
    """Two ranks that share what they count, as they do through their store."""
    shared: dict[str, int] = {}
    return [World(_totals=shared), World(_totals=shared)]


def test_ranks_count_bad_samples_together_and_those_of_an_earlier_attempt(tmp_path: Path) -> None:
    whole = context(tmp_path, 300, 0)
    one, other = (SimpleNamespace(**{**vars(whole), "world": world}) for world in two_ranks())
    count_bad(one, {1: "1 is bad", 2: "2 is bad"})  # type: ignore[arg-type]
    count_bad(other, {3: "3 is bad"})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"4 of 300 samples cannot be used(.|\n)*4 is bad"):
        count_bad(one, {4: "4 is bad"})  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_an_error_of_the_network(tmp_path: Path) -> None:
    whole = context(tmp_path, 300, 0)
    one, other = (SimpleNamespace(**{**vars(whole), "world": world}) for world in two_ranks())
    count_bad(one, {i: not_finite(i) for i in range(2)})  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"4 of 300 features are not finite(.|\n)*train\.lr"):
        count_bad(other, {i: not_finite(i) for i in range(2, 4)})  # type: ignore[arg-type]
    unread = {i: f"{i} is bad" for i in range(4)}
    with pytest.raises(DataError, match="Repair the shards"):  # they alone are too many
        check_bad(whole, 9, {**unread, **{i: not_finite(i) for i in range(4, 9)}})  # type: ignore[arg-type]


def test_a_network_that_diverges_ends_with_the_batch_that_shows_it(tmp_path: Path) -> None:
    def stream(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            ids = request.sample_ids
            images = [torch.full((len(ids), 1), torch.nan)]
            yield SimpleNamespace(images=images, sample_ids=ids, bad=[], tag=request.tag)

    silent = SimpleNamespace(alive=lambda: None, show=lambda *done: None)
    fakes = {
        "loader": SimpleNamespace(stream=stream),
        "draw": lambda queue, numbers: iter(numbers),
        "report": silent,
        "progress": lambda stage: silent,
    }
    whole = context(tmp_path, 300, 0, **fakes)
    with pytest.raises(NumericalError, match="10 of 300 features are not finite"):
        _fill(whole, lambda images: images, [range(300)], [0], torch.zeros(1))  # type: ignore[arg-type]


def test_training_ends_with_the_step_that_makes_it_certain_on_any_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    config = SimpleNamespace(train=SimpleNamespace(log=10, batch=20), data=Data(shards="s"))
    events: list[Any] = []
    report = SimpleNamespace(event=lambda name, **fields: events.append(fields))
    one, other = (
        SimpleNamespace(recipe=config, world=world, run=Run(tmp_path), report=report)
        for world in two_ranks()
    )

    def step(rank: Any, number: int, bad: int) -> None:
        meter = Meter(0.0)
        meter.add({}, 20, [Bad(i, f"{i} is bad") for i in range(bad)])
        judge_bad(rank, meter, SimpleNamespace(step=number, round=0))  # type: ignore[arg-type]

    step(one, 9, bad=2)  # of another ten steps
    step(one, 10, bad=1)
    step(other, 10, bad=1)
    with pytest.raises(DataError, match="3 of the 200 samples of steps 11 to 20 could not"):
        step(other, 11, bad=1)
    assert events == [{"step": 11, "count": 3, "first": ["0 is bad"]}]
    assert "0 is bad" in (tmp_path / "logs" / "replaced.jsonl").read_text()
