"""The clustering module of SuperCM, against its formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Method, Output, Setting
from deepclust.methods.supervised.config import Config as Supervised
from deepclust.methods.terms.cm.config import Config
from deepclust.methods.terms.cm.term import Term, energy, normed
from deepclust.world import ALONE, World
from tests.methods.cases import CLASSES, batch, method, recipe, share
from tests.ranks import on_ranks

SEEDS = "seeds={labels: shards, share: 0.25}"


def carrier(keys: str = "weight: 1", name: str = "supervised", world: World = ALONE) -> Method:
    """A method with the term alone."""
    return method(recipe(name, SEEDS, f"terms={{cm: {{{keys}}}}}"), world)


def term_of(one: Method) -> Term:
    term = one.terms["cm"]
    assert isinstance(term, Term)
    return term


def value(one: Method, features: Tensor, labels: list[int]) -> Tensor:
    """The term of some features, whose classifier is that of the method."""
    of = recipe("supervised")
    given = replace(batch(of, len(labels)), labels=torch.tensor(labels))
    result: Tensor = term_of(one)(
        one, given, Output(features.sum(), {}, features, one.classify(features))
    )
    return result


def eq_1(x: Tensor, g: Tensor, m: Tensor) -> Tensor:
    """Equation 1 of the paper with alpha = 1: reconstruction, variances and cross terms."""
    reconstruction = (x - g @ m).square().sum(1)
    variance = (g * (1 - g)) @ m.square().sum(1)
    products = m @ m.T
    cross = sum(
        -g[:, k] * g[:, j] * products[k, j] for k in range(len(m)) for j in range(len(m)) if j != k
    )
    return (reconstruction + variance + cross).mean() / x.shape[1]


def test_the_three_parts_of_eq_1_are_the_energy_of_soft_k_means() -> None:
    torch.manual_seed(0)
    x, m = 5 + torch.randn(9, 7).double().requires_grad_(), 5 + torch.randn(4, 7).double()
    g = torch.randn(9, 4).double().softmax(1).requires_grad_()
    slow = (g * (x[:, None] - m).square().sum(2)).sum(1).mean() / 7
    for other in (slow, eq_1(x, g, m)):
        torch.testing.assert_close(energy(x, g, m), other)
    slopes = [torch.autograd.grad(f, x)[0] for f in (energy(x, g, m), slow, eq_1(x, g, m))]
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[0], slopes[2])


def test_little_is_lost_to_rounding_far_from_zero() -> None:
    x, m = torch.tensor([[1000.0, 1000.0]]), torch.tensor([[1000.5, 1000.0], [999.5, 1000.0]])
    assert float(energy(x, torch.tensor([[0.5, 0.5]]), m)) == pytest.approx(0.125)


def test_class_means_are_those_of_all_rows_so_far_and_absent_classes_keep_theirs() -> None:
    one, rows = carrier(), torch.randn(3, 8, 384)
    labels = [[0, 0, 1, -1, -1, 0, 1, 0], [-1] * 8, [1, 1, 1, 1, -1, 2, 2, -1]]
    for features, given in zip(rows, labels, strict=True):
        value(one, features, given)
    flat, known = rows.flatten(0, 1), torch.tensor(labels).flatten()
    for c in range(CLASSES):
        mine = flat[known == c]
        expected = mine.mean(0) if len(mine) else torch.zeros(384)
        torch.testing.assert_close(term_of(one).means[c], expected, atol=1e-6, rtol=0)
    assert term_of(one).counts.tolist() == [4, 6, 2, 0]


def test_class_means_are_not_those_of_eq_2_as_printed_which_shrink_with_the_classes() -> None:
    one, features, labels = carrier(), 5 + torch.randn(8, 384), [0, 1, 2, 3, 0, 1, 2, 3]
    value(one, features, labels)
    printed = F.one_hot(torch.tensor(labels)).float().T @ features / len(labels)
    torch.testing.assert_close(term_of(one).means / CLASSES, printed)


def test_means_by_the_count_of_all_steps_stay_far_from_1000_classes_and_ours_do_not() -> None:
    torch.manual_seed(0)
    names = tuple(map(str, range(1000)))
    term = Term(Config(weight=1), 4, Setting(Supervised(), None, 0, ALONE, classes=names))
    rows, by_steps = 1 + torch.rand(1000, 4), torch.zeros(1000, 4)  # a class has one row
    for step in range(1, 501):
        labels = torch.randint(1000, (50,))
        term._follow(rows[labels], labels, ALONE)
        present = labels.unique()
        by_steps[present] += (rows[present] - by_steps[present]) / step  # as the authors do
    torch.testing.assert_close(term.means, rows)
    assert (by_steps / rows).mean() < 0.4


def test_a_moving_average_begins_with_the_first_mean() -> None:
    one = carrier("weight: 1, momentum: 0.75")
    first, second = torch.ones(2, 384), 5 * torch.ones(2, 384)
    value(one, first, [1, 1])
    value(one, second, [1, -1])
    assert term_of(one).means[:, 0].tolist() == [0, 2, 0, 0]


def test_a_class_without_a_row_takes_no_part_and_without_any_the_term_is_zero() -> None:
    one, features = carrier(), torch.randn(4, 384, requires_grad=True)
    nothing = value(one, features, [-1] * 4)
    nothing.backward()
    assert nothing == 0
    assert features.grad is not None
    assert not features.grad.any()
    expected = (features - features[0]).square().mean()  # all of every row belongs to class 2
    torch.testing.assert_close(value(one, features, [2, -1, -1, -1]), expected)


def test_the_means_have_no_gradient() -> None:
    one, features = carrier(), torch.randn(2, 384, requires_grad=True)
    value(one, features, [0, 0]).backward()
    mean = features.detach().mean(0)
    torch.testing.assert_close(features.grad, 2 * (features.detach() - mean) / (2 * 384))


def test_normed_features_do_not_change_with_their_scale() -> None:
    plain, free = carrier(), carrier("weight: 1, norm: true")
    features, labels = torch.randn(6, 384), [0, 0, 1, 1, -1, -1]
    small = [value(one, 0.01 * features, labels).item() for one in (plain, free)]
    assert small[0] < 1e-3
    assert small[1] > 0.1
    spread = normed(features, ALONE).var(0, correction=0)
    torch.testing.assert_close(spread, torch.ones(384), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["simclr", "swav"])
def test_a_method_without_classes_gets_a_layer_of_the_term(name: str) -> None:
    one = carrier(name=name)
    one(batch(recipe(name)))["loss"].backward()
    layer = one.get_parameter("terms.cm.own.weight")
    assert layer.shape == (CLASSES, 384)
    assert layer.grad is not None
    assert layer.grad.any()


def of_ranks(world: World, keys: str, name: str) -> tuple[float, dict[str, Tensor]]:
    """The means, and gradients of the term alone, of this rank's share of a batch."""
    one = carrier(keys, name, world).eval()
    given = share(batch(recipe(name)), world)
    features = one.backbone(given.crops[0])
    logits = one.classify(features) if name == "supervised" else None
    term = term_of(one)
    term(one, given, Output(features.sum(), {}, features, logits)).backward()
    slopes = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    return term.means.clone(), slopes


@pytest.mark.parametrize(
    ("keys", "name"),
    [("weight: 1", "supervised"), ("weight: 1, norm: true, momentum: 0.9", "simclr")],
)
def test_means_and_gradients_are_those_of_the_global_batch(keys: str, name: str) -> None:
    means, slopes = of_ranks(World(), keys, name)
    for ranks in (2, 3):
        parts = on_ranks(ranks, of_ranks, keys, name)
        for n, slope in slopes.items():
            mean = sum(part[1][n] for part in parts) / ranks  # as DDP averages
            torch.testing.assert_close(mean, slope, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(parts[-1][0], means)


def test_a_term_on_labels_is_refused_without_seeds() -> None:
    with pytest.raises(RecipeError, match=r"seeds: are required by terms\.cm: set seeds\.labels"):
        recipe("simclr", "terms.cm.weight=1")
