"""The newest metrics and the epochs of a run: as from the whole files, without reading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepclust.recipe import Recipe
from deepclust.run import glance
from deepclust.run.directory import Run, create
from deepclust.run.glance import epochs_in, newest_metrics


def write(file: Path, *records: tuple[int, int], kind: str = "train") -> None:
    with file.open("a") as log:
        for attempt, step in records:
            record = {"kind": kind, "attempt": attempt, "step": step, "round": 0, "loss": 1.0}
            log.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("piece", [64, 1000, 2**20])
def test_the_newest_metrics_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(glance, "PIECE", piece)
    file = tmp_path / "metrics.jsonl"
    assert newest_metrics(file, "train", 5) == []
    write(file, *((1, step) for step in range(40)))
    write(file, (2, 38), (2, 39), (1, 40), (2, 40))  # the older attempt writes once more
    write(file, *((2, step) for step in range(20)), kind="other")
    with file.open("a") as log:
        log.write('{"kind": "train", "ste')
    for count in (1, 3, 5, 100):
        assert newest_metrics(file, "train", count) == Run(tmp_path).metrics("train")[-count:]


def test_the_epochs_are_those_of_the_recipe_however_it_is_written(tmp_path: Path) -> None:
    recipe = Recipe.load("small-photos", "data.shards=a", "train.epochs=7")
    create(tmp_path / "run", recipe)
    file = tmp_path / "run" / "recipe.yaml"
    assert epochs_in(file) == Run(tmp_path / "run").epochs == 7
    text = file.read_text().partition("\n")[2]
    for changed in (text, "train: {epochs: 9}", "train:\n    epochs: 9\n"):
        file.write_text(changed)
        assert epochs_in(file) is None
    assert Run(tmp_path / "run").epochs == 9
