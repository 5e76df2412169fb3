"""The contract of a term, and the terms of the table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster_jobs.results.evaluate import evaluate_run
from deepclust import Recipe
from deepclust.errors import RecipeError
from deepclust.methods.base import Now, Output, Setting
from deepclust.methods.terms import TERMS
from deepclust.recipe.named import part_of, section_of
from deepclust.recipe.sections import TermSection
from deepclust.run.directory import Run
from deepclust.world import ALONE, World
from tests.methods.cases import CASES, NAMES_OF, batch, method, recipe
from tests.ranks import on_ranks
from tests.tiny import assert_resumes_undisturbed, deepclust, tiny_recipe

ENTROPY = "terms.mean_entropy={weight: 0.5, ramp: 2}"


def entropy_of(logits: Tensor, world: World = ALONE) -> Tensor:
    """The term of some logits."""
    of = recipe("deepcluster", ENTROPY)
    one = method(of, world)
    output = Output(logits.sum(), logits=logits)
    value: Tensor = one.terms["mean_entropy"](one, batch(of), output)
    return value


def slow_entropy(logits: Tensor) -> float:
    """Minus the entropy of the mean softmax, one class after the other."""
    mean = [sum(column) / len(logits) for column in zip(*logits.softmax(1).tolist(), strict=True)]
    return sum(p * math.log(p) for p in mean if p > 0)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_every_term_of_the_table_builds_from_its_weight_alone(name: str) -> None:
    section = section_of(name, TERMS, TermSection)(weight=0.1)
    setting = Setting(recipe("simclr").method, None, 0, ALONE, classes=NAMES_OF)
    assert part_of(name, TERMS, "term")(section, 8, setting).weight_at(Now()) == 0.1


def test_a_weight_grows_linearly_and_then_stays() -> None:
    term = method(recipe("deepcluster", ENTROPY)).terms["mean_entropy"]
    weights = [term.weight_at(Now(epochs=e)) for e in (0, 1, 2, 50)]
    assert weights == [0, 0.25, 0.5, 0.5]


def test_a_term_is_added_to_the_loss_and_reported() -> None:
    with_term, without = recipe("deepcluster", ENTROPY), recipe("deepcluster")
    fixed = replace(batch(with_term), now=Now(epochs=1))
    output = method(with_term)(fixed)
    plain = method(without)(fixed)
    assert "term_mean_entropy" not in plain
    torch.testing.assert_close(output["loss"], plain["loss"] + 0.25 * output["term_mean_entropy"])


def test_mean_entropy_is_its_formula() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 7)
    assert float(entropy_of(logits)) == pytest.approx(slow_entropy(logits), abs=1e-6)


def test_mean_entropy_lies_between_one_class_and_all_classes() -> None:
    assert float(entropy_of(torch.zeros(5, 8))) == pytest.approx(-math.log(8))
    assert float(entropy_of(torch.tensor([[1e4, 0.0], [1e4, 0.0]]))) == 0


def of_ranks(world: World) -> tuple[float, Tensor]:
    logits = torch.arange(24.0).sin().view(6, 4).requires_grad_()
    own = logits.tensor_split(world.size)[world.rank]
    value = entropy_of(own, world)
    value.backward()
    return value.item(), logits.grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_mean_entropy_is_that_of_the_global_batch(ranks: int) -> None:
    value, gradient = of_ranks(World())
    results = on_ranks(ranks, of_ranks)
    assert all(other == pytest.approx(value, abs=1e-6) for other, _ in results)
    mean = sum(part for _, part in results) / ranks  # as DDP averages
    torch.testing.assert_close(mean, gradient)


def test_a_term_on_answers_is_refused_where_a_method_has_none() -> None:
    with pytest.raises(RecipeError, match=r"terms\.mean_entropy works on the answers"):
        recipe("simclr", ENTROPY)


def test_an_unknown_term_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"terms.mean_entropi: unknown .*mean_entropy"):
        recipe("deepcluster", "terms.mean_entropi.weight=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("terms.mean_entropy.wieght=1", r"terms.mean_entropy.wieght: unknown key.*'weight'"),
        ("terms.mean_entropy.ramp=1", "terms.mean_entropy.weight: is required"),
        ("terms.mean_entropy={weight: 1, ramp: -1}", "terms.mean_entropy.ramp: .*greater"),
    ],
)
def test_a_wrong_key_of_a_term_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe("deepcluster", override)


def test_the_terms_of_a_recipe_are_dumped_and_read_again(tmp_path: Path) -> None:
    given = recipe("deepcluster", ENTROPY)
    given.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == given
    assert given.flat()["terms.mean_entropy.ramp"] == 2


@pytest.mark.slow
def test_a_term_of_the_user_brings_labels_to_a_method_without_a_clustering(
    shards: Path, tmp_path: Path
) -> None:
    given = tiny_recipe(
        shards, "method.name=simclr", *CASES["simclr"], "train.lr=0.01",
        "terms={tests.toys.term: {weight: 1, classes: 4}}",
        "seeds={labels: shards, per_class: 20, share: 0.25}",
    )  # fmt: skip
    assert_resumes_undisturbed(given, tmp_path, 15)
    values = [
        record["term_tests_toys_term"] for record in Run(tmp_path / "straight").metrics("train")
    ]
    assert values[-1] < values[0]
    scores = evaluate_run(tmp_path / "straight", str(shards), str(shards))
    assert scores["knn"]["top1"] > 0.25
    deepclust("report", tmp_path / "straight")
