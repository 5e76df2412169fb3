"""A run's recipe.yaml that changed since the run wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepclust.errors import RunDiffersError
from deepclust.recipe import Recipe
from deepclust.recipe.sealed import MARK, check_seal, seal
from deepclust.run.directory import Run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The recipe of a run."""
    recipe = Recipe.load("small-photos", "data.shards=/somewhere", "ray.address=auto")
    recipe.save(tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("old", "new"),
    [("seed: 0", "seed: 4"), ("lr: 0.", "lr: 1."), ("epochs: ", "epochs: 1"),
     ("\n  k: ", "\n  k: 1"),
     ("flip: ", "grey: "), ("\ninit:", "\ninti:"), ("\nkeep:", "  clip: 1.0\nkeep:")],
)  # fmt: skip
def test_a_changed_key_that_decides_the_results_is_refused(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises((RunDiffersError, ValueError)):
        assert Run(file.parent).recipe


def test_a_recipe_cut_between_two_keys_is_refused(file: Path) -> None:
    file.write_text(file.read_text().partition("  weight_decay:")[0])
    with pytest.raises(RunDiffersError, match="has changed since the run wrote it"):
        assert Run(file.parent).recipe


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/somewhere", "/elsewhere"),
        ("address: auto", "address: there"),
        ("hang: 600.0", "hang: 60"),
    ],
)
def test_what_a_resume_may_change_may_be_edited_by_hand(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    assert Run(file.parent).recipe


def test_recipes_of_older_versions_are_taken_as_they_are(file: Path) -> None:
    file.write_text(file.read_text().partition("\n")[2].replace("seed: 0", "seed: 4"))
    assert Run(file.parent).recipe.seed == 4


def test_a_key_that_a_later_version_adds_is_no_change(file: Path) -> None:
    text = file.read_text().partition("\n")[2].replace("  clip_by: norm\n", "")
    file.write_text(seal(text))
    assert Run(file.parent).recipe.flat()["train.clip_by"] == "norm"


def test_every_shipped_recipe_is_whole_after_it_is_saved(tmp_path: Path) -> None:
    for name in ("demo-fashion", "small-photos"):
        recipe = Recipe.load(name, "data.shards=x", "train.lr=1e-7", "ray.env={a: 'é'}")
        recipe.save(tmp_path / name)
        check_seal(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(MARK)
        assert Recipe.load(tmp_path / name) == recipe
