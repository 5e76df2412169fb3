"""The lists of what a recipe can name: complete, described, and made without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster_jobs.listing import KINDS, items, lines
from deepclust.errors import RecipeError
from deepclust.methods import METHODS
from deepclust.methods.terms import TERMS
from deepclust.models import BACKBONES
from deepclust.recipe import Recipe
from deepclust.recipe.recipe import shipped


def test_every_name_of_every_table_is_listed_and_described() -> None:
    listed = {kind: {one.name for one in items(kind)} for kind in KINDS}
    assert listed["methods"] == set(METHODS)
    assert listed["terms"] == set(TERMS)
    assert listed["recipes"] == set(shipped())
    assert listed["backbones"] >= set(BACKBONES)
    assert all(one.what for kind in KINDS for one in items(kind))


@pytest.mark.parametrize("kind", ["methods", "terms", "recipes"])
def test_most_of_what_is_listed_names_its_paper(kind: str) -> None:
    assert sum(bool(one.paper) for one in items(kind)) >= 0.8 * len(items(kind))


def test_every_key_of_a_recipe_is_listed() -> None:
    of = Recipe.load("swav-small-photos", "data.shards=s", "terms.mean_entropy.weight=1")
    known = {one.name for one in items("keys")} | {"method.name"}
    assert {key for key in of.flat() if not key.startswith(("ray", "slurm"))} <= {
        *known, "data.local", "cluster", "seeds", "notify",
    }  # fmt: skip


def test_a_pattern_chooses_by_name_or_description_and_what_is_unknown_has_a_hint() -> None:
    assert [one.name for one in items("keys", "SEEDS.share")] == ["seeds.share"]
    assert "swav" in {one.name for one in items("methods", "prototypes from another")}
    assert all(len(line.splitlines()) == 1 for line in lines(items("recipes")))
    with pytest.raises(RecipeError, match="no list of 'method'; did you mean 'methods'"):
        items("method")
    with pytest.raises(RecipeError, match="has 'zzz': deepclust list keys shows all"):
        items("keys", "zzz")


def test_nothing_is_listed_with_torch() -> None:
    code = (
        "import sys; from cluster_jobs.listing import KINDS, items; [items(k) for k in KINDS]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
