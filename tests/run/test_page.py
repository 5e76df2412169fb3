"""What Python shows of our objects: a line for each, and a table of a run in notebooks."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import deepclust
from deepclust import EpochPlan, Recipe, Whitening, kmeans, load_run, open_index
from deepclust.run.directory import Run


class Cells(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_dir_has_the_public_names_alone() -> None:
    assert sorted([*deepclust.__all__, "__version__"]) == dir(deepclust)


def test_every_object_of_the_interface_is_shown_in_a_line(final_run: Path, shards: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    shown = [
        Recipe.load("demo-fashion"), open_index(shards), Run(final_run), load_run(final_run),
        EpochPlan.build(np.zeros(500, np.int32), 0, 0, 50), Whitening.fit(rows, 4),
        kmeans(rows, 5),
    ]  # fmt: skip
    for one in shown:
        text = repr(one)
        assert text.startswith(type(one).__name__.split(".")[-1].lstrip("_")[:5])
        assert len(text) < 200
        assert "\n" not in text
    assert repr(shown[0]) == "Recipe(deepcluster, conv4, k=100, 16 epochs)"
    assert repr(shown[1]) == "Index(300 samples in 3 shards, 4 classes)"
    assert repr(shown[4]) == "EpochPlan(10 steps of 50 images)"


def test_a_token_is_not_shown(final_run: Path) -> None:
    assert "hunter2" not in repr(Run(final_run, "hunter2"))


def test_a_notebook_shows_a_table_of_the_run(final_run: Path) -> None:
    page = Cells(load_run(final_run)._repr_html_())
    assert {*page.tags} == {"table", "caption", "tr", "th", "td"}
    assert page.texts[1:3] == ["state", "finished"]
    assert "2.0 of 2" in page.texts


def test_a_hostile_or_broken_run_is_shown_as_text(final_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "<script>x<"
    shutil.copytree(final_run, run)
    (run / "recipe.yaml").write_text("<b>: [")
    page = Cells(Run(run)._repr_html_())
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "cannot be read" in page.texts
