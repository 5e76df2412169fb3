"""Each term alone on every method that can carry it: one step, told, and the loss is finite."""

from __future__ import annotations

import pytest
import torch

from deepclust.errors import RecipeError
from deepclust.methods.terms import TERMS
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe import Recipe
from deepclust.recipe.named import section_of
from deepclust.recipe.sections import TermSection, TrainSection
from deepclust.stages.build import parameter_groups
from tests.methods.cases import NAMES, TOY, batch, method, recipe

SEEDS = "seeds={labels: shards, per_class: 20, share: 0.25}"
SETTINGS = dict.fromkeys(TERMS, "weight: 0.1")  # a term that needs more keys has a line here
SETTINGS["vat"] = "weight: 0.1, eps: 1"
SETTINGS["pseudo_label"] = "weight: 0.1, threshold: 0.1"
LINEAR = {"deepcluster", "deepercluster", "sela", "supervised", TOY}  # answer from pooled features


def carrying(name: str, term: str) -> Recipe:
    """A small recipe with the term alone."""
    needs = section_of(term, TERMS, TermSection).uses_labels
    return recipe(name, *([SEEDS] if needs else []), f"terms={{{term}: {{{SETTINGS[term]}}}}}")


def can_carry(name: str, term: str) -> bool:
    works_on = section_of(term, TERMS, TermSection).works_on
    return works_on == "features" or recipe(name, "terms={}").method.answers != "nothing"


@pytest.mark.parametrize("term", sorted(TERMS))
@pytest.mark.parametrize("name", NAMES)
def test_a_term_alone_takes_a_step_and_tells_its_value(name: str, term: str) -> None:
    if not can_carry(name, term):
        with pytest.raises(RecipeError, match=f"terms.{term} works on the answers"):
            carrying(name, term)
        return
    of = carrying(name, term)
    if term == "locality" and name not in LINEAR:
        with pytest.raises(RecipeError, match=r"terms\.locality"):
            method(of)
        return
    one, given = method(of).train(), batch(of)
    optimizers = Optimizers(parameter_groups(one), TrainSection(epochs=1, lr=0.01))
    told = one(given)
    told["loss"].backward()
    trained = {n for group in parameter_groups(one) for n in group.parameters}
    assert all(one.get_parameter(n).grad is not None for n in trained if n.startswith("terms."))
    optimizers.step()
    after = one(given)
    for values in (told, after):
        assert torch.isfinite(values["loss"])
        assert torch.isfinite(values[f"term_{term}"])
