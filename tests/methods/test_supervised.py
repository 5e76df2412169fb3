"""Training on labels, and Pseudo-Label."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Method, Output
from deepclust.stages.build import wrap_ddp
from deepclust.world import ALONE, World
from tests.methods.cases import CASES, CLASSES, batch, method, recipe
from tests.methods.cases import share as part_of
from tests.ranks import on_ranks


def plain(*overrides: str, world: World = ALONE) -> Method:
    return method(recipe("supervised", "terms={}", *overrides), world)


def test_the_loss_is_the_mean_over_labelled_rows() -> None:
    one, given = plain("method.smoothing=0.1").eval(), batch(recipe("supervised"))
    output = one(given)
    known = given.labels >= 0
    logits = one.classify(one.backbone(given.crops[0]))[known]
    expected = F.cross_entropy(logits, given.labels[known], label_smoothing=0.1)
    torch.testing.assert_close(output["loss"], expected)
    right = (logits.argmax(1) == given.labels[known]).float().mean()
    torch.testing.assert_close(output["accuracy"], right)


def test_a_batch_without_labels_has_loss_zero_and_no_gradient() -> None:
    one, given = plain(), batch(recipe("supervised"))
    output = one(replace(given, labels=torch.full_like(given.labels, -1)))
    output["loss"].backward()
    assert output["loss"] == 0
    assert not any(p.grad.any() for p in one.parameters() if p.grad is not None)


def test_it_answers_with_the_classes_of_the_seeds() -> None:
    assert plain().classify(torch.zeros(3, 384)).shape == (3, CLASSES)


def test_it_needs_seeds_and_does_not_cluster() -> None:
    with pytest.raises(RecipeError, match="seeds: are required by method supervised"):
        recipe("supervised", "seeds=null", "terms={}")
    with pytest.raises(RecipeError, match="supervised does not cluster"):
        recipe("supervised", "cluster={k: 3}")


def uneven(world: World) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients where nearly all labels are on the last rank."""
    one, given = plain(world=world).eval(), batch(recipe("supervised"))
    labels = given.labels.clone()
    labels[1:17] = -1
    model = wrap_ddp(one, world)  # DDP's hooks end with it
    output = model(part_of(replace(given, labels=labels), world))
    output["loss"].backward()
    return output["loss"].item(), {n: p.grad for n, p in one.named_parameters()}


def test_ranks_with_unequal_numbers_of_labels_have_the_gradient_of_the_whole_batch() -> None:
    whole, slopes = uneven(World())
    for ranks in (2, 3):
        parts = on_ranks(ranks, uneven)
        assert sum(part[0] for part in parts) / ranks == pytest.approx(whole, rel=1e-5)
        for name, slope in slopes.items():
            torch.testing.assert_close(parts[-1][1][name], slope, atol=2e-6, rtol=1e-4)


def test_pseudo_labels_are_sure_answers_of_unlabelled_rows() -> None:
    of = recipe("supervised", "terms={pseudo_label: {weight: 1, threshold: 0.9}}")
    one, given = method(of), replace(batch(of, 4), labels=torch.tensor([-1, -1, 0, -1]))
    logits = torch.tensor(
        [[4.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 5.0, 0, 0], [0, 0, 0, 3.5]], requires_grad=True
    )
    value = one.terms["pseudo_label"](one, given, Output(logits.sum(), {}, None, logits))
    value.backward()
    sure = [math.exp(x) / (math.exp(x) + 3) for x in (4.0, 3.5)]
    assert float(value.detach()) == pytest.approx(-sum(map(math.log, sure)) / 4)
    slope = (logits.detach().softmax(1) - torch.eye(4)[[0, 0, 0, 3]]) / 4
    slope[1:3] = 0  # not sure, and labelled
    torch.testing.assert_close(logits.grad, slope)


def test_the_case_has_all_terms_of_few_labels() -> None:
    told = method(recipe("supervised", *CASES["supervised"]))(batch(recipe("supervised")))
    assert {"term_cm", "term_pseudo_label", "term_vat", "accuracy"} <= told.keys()
