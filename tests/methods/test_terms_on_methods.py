"""Each term alone on every method that can carry it: one step, told, and the loss is finite."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deepclust.errors import RecipeError
from deepclust.methods.terms import TERMS
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe import Recipe
from deepclust.recipe.declare import Pass
from deepclust.recipe.named import section_of
from deepclust.recipe.sections import TermSection, TrainSection
from deepclust.stages.build import parameter_groups
from tests.methods.cases import NAMES, NAMES_OF, TOY, batch, method, recipe
from tests.methods.test_every_method import passes, state_bytes

SEEDS = "seeds={labels: shards, per_class: 20, share: 0.25}"
SETTINGS = dict.fromkeys(TERMS, "weight: 0.1")  # a term that needs more keys has a line here
SETTINGS["vat"] = "weight: 0.1, eps: 1, iterations: 2"
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
@pytest.mark.parametrize("name", ["supervised", "deepcluster", "suave"])
def test_what_a_term_says_of_its_cost_is_what_it_costs_beside_the_method(
    name: str, term: str
) -> None:
    if term == "locality" and name not in LINEAR:
        return
    with_term = carrying(name, term)
    alone = with_term.replace("terms={}", *(["seeds=null"] if name == "deepcluster" else []))
    one, given = method(with_term).eval(), batch(with_term)
    width, rows = one.trunk.dim, len(given.sample_ids)
    cost = with_term.cost(width)
    expected = {key: count * rows for key, count in counted(cost.passes).items()}
    assert passes(one, given) == expected
    grown = state_bytes(one) - state_bytes(method(alone))
    more = with_term.terms[term].cost(with_term, width)
    assert grown == more.per_class * len(NAMES_OF) + more.fixed
    assert cost.per_class == alone.cost(width).per_class + more.per_class


def counted(passes: tuple[Pass, ...]) -> Counter[tuple[str, int, bool]]:
    """How often an image is in each kind of pass."""
    kinds: Counter[tuple[str, int, bool]] = Counter()
    for one in passes:
        kinds[one.network, one.size, one.trained] += one.count
    return kinds


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
