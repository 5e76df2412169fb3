"""Entropy of single predictions and of their mean: identities, the prior, the past, ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepclust import pretrain
from deepclust.errors import RecipeError
from deepclust.launch.start import resume
from deepclust.methods.base import Method, Output
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks
from tests.tiny import tiny_recipe

C = 5
EQUAL, BALANCED = torch.zeros(20, C), 1e4 * torch.eye(C).repeat(4, 1)


def built(name: str, keys: str = "", world: World = ALONE) -> Method:
    """A method that carries one term."""
    return method(recipe("deepcluster", f"terms.{name}={{weight: 1{keys}}}"), world)


def value(one: Method, logits: Tensor) -> Tensor:
    """The only term of a method, of some logits."""
    (term,) = one.terms.values()
    result: Tensor = term(one, batch(recipe("deepcluster")), Output(logits.sum(), logits=logits))
    return result


def test_equal_answers_have_the_largest_entropies() -> None:
    assert float(value(built("sample_entropy"), EQUAL)) == pytest.approx(math.log(C))
    assert float(value(built("batch_entropy"), EQUAL)) == pytest.approx(-math.log(C))


def test_decided_and_balanced_answers_have_none_of_the_one_and_all_of_the_other() -> None:
    assert float(value(built("sample_entropy"), BALANCED)) == 0
    assert float(value(built("batch_entropy"), BALANCED)) == pytest.approx(-math.log(C))


def test_both_together_are_minus_the_information_of_sample_and_class() -> None:
    logits = 3 * torch.randn(40, C, generator=torch.Generator().manual_seed(0))
    joint = logits.double().softmax(1) / len(logits)
    independent = joint.sum(0) / len(logits)
    information = float((joint * (joint / independent).log()).sum())
    both = sum(float(value(built(name), logits)) for name in ("sample_entropy", "batch_entropy"))
    assert both == pytest.approx(-information, abs=1e-6)
    assert -math.log(C) <= both <= 0


@pytest.mark.parametrize("name", ["sample_entropy", "batch_entropy"])
def test_a_class_that_no_answer_has_gives_a_finite_gradient(name: str) -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [1e4, 0.0, -1e4]], requires_grad=True)
    value(built(name), logits).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_old_name_is_the_same_term() -> None:
    logits = torch.arange(30.0).sin().view(6, C)
    assert torch.equal(value(built("mean_entropy"), logits), value(built("batch_entropy"), logits))


def test_a_new_run_by_the_old_name_is_told_of_both_terms_and_an_old_run_of_none(
    shards: Path, tmp_path: Path
) -> None:
    run = pretrain(
        tiny_recipe(shards, "terms.mean_entropy.weight=0.1", "train.epochs=1"), tmp_path / "run"
    )
    resume(tmp_path / "run", "train.epochs=2")
    told = [event["text"] for event in run.events() if event["event"] == "warning"]
    (old,) = [text for text in told if "old name" in text]
    assert "terms.batch_entropy" in old
    assert "terms.sample_entropy" in old


def test_a_prior_is_where_the_term_is_least_whatever_its_sum() -> None:
    shares = torch.tensor([8.0, 1, 1, 1, 1])
    one = built("batch_entropy", ", prior: [8, 1, 1, 1, 1]")
    best = float(value(one, shares.log()[None]))
    assert best == pytest.approx(-math.log(C))
    other = shares.log()[None] + 0.1 * torch.randn(20, 1, C)
    assert all(float(value(one, row)) > best for row in other)


def test_an_equal_prior_changes_nothing() -> None:
    logits = torch.arange(30.0).sin().view(6, C)
    with_prior, without = built("batch_entropy", ", prior: [2, 2, 2, 2, 2]"), built("batch_entropy")
    torch.testing.assert_close(value(with_prior, logits), value(without, logits))


def test_a_prior_of_another_number_of_classes_is_named() -> None:
    with pytest.raises(RecipeError, match=r"prior of 3 numbers for the 5 classes"):
        value(built("batch_entropy", ", prior: [1, 1, 1]"), EQUAL)


@pytest.mark.parametrize("prior", ["[1, 0]", "[1, -1]", "[1]", "[]"])
def test_a_prior_that_is_none_is_refused_in_the_recipe(prior: str) -> None:
    with pytest.raises(RecipeError, match=r"terms\.batch_entropy\.prior"):
        built("batch_entropy", f", prior: {prior}")


def test_the_past_makes_a_batch_as_large_as_all_of_them() -> None:
    parts = torch.randn(4, 6, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
    one = built("batch_entropy", ", queue: 2").train()
    values = [value(one, part) for part in parts]  # the first is forgotten
    whole = value(built("batch_entropy"), parts[1:].flatten(0, 1))
    torch.testing.assert_close(values[-1], whole)
    (of_last,) = torch.autograd.grad(values[-1], parts)
    (of_all,) = torch.autograd.grad(whole, parts)
    torch.testing.assert_close(of_last[3], 3 * of_all[3])
    assert not of_last[:3].any()


def test_the_past_is_saved_and_does_not_grow_in_evaluation() -> None:
    one = built("batch_entropy", ", queue: 2").train()
    value(one, EQUAL)
    other = built("batch_entropy", ", queue: 2").eval()
    other.load_state_dict(one.state_dict())
    name = "terms.batch_entropy.past"
    before = other.state_dict()[name].clone()
    assert before.shape == (2, C)
    torch.testing.assert_close(value(other, BALANCED), value(one.eval(), BALANCED))
    assert torch.equal(other.state_dict()[name], before)
    assert not any("past" in name for name in built("batch_entropy").state_dict())


def of_ranks(world: World, name: str, keys: str) -> Tensor:
    """The gradient of this rank's share, after a first batch."""
    logits = torch.arange(60.0).sin().view(2, 6, C).requires_grad_()
    one = built(name, keys, world).train()
    for part in logits:
        result = value(one, part.tensor_split(world.size)[world.rank])
    result.backward()
    return logits.grad


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["sample_entropy", "batch_entropy"])
def test_ranks_together_have_the_gradient_of_the_global_batch(name: str, ranks: int) -> None:
    keys = ", prior: [3, 1, 1, 1, 1], queue: 3" if name == "batch_entropy" else ""
    parts = on_ranks(ranks, of_ranks, name, keys)
    torch.testing.assert_close(sum(parts) / ranks, of_ranks(World(), name, keys))


def test_means_of_single_ranks_would_have_another_gradient() -> None:
    logits = torch.arange(60.0).sin().view(12, C).requires_grad_()
    one = built("batch_entropy")
    (whole,) = torch.autograd.grad(value(one, logits), logits)
    local = sum(value(one, part) for part in logits.tensor_split(3)) / 3
    (other,) = torch.autograd.grad(local, logits)
    assert (whole - other).norm() > 0.1 * whole.norm()


def test_logits_of_a_batch_are_what_the_terms_work_on() -> None:
    of = recipe("deepcluster", "terms.sample_entropy.weight=1", "terms.batch_entropy.weight=1")
    one, given = method(of), replace(batch(of))
    told, logits = one(given), one.classify(one.backbone(given.crops[0]))
    expected = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(told["term_sample_entropy"], expected.detach())
