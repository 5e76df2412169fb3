"""NT-Xent against its formula and lightly's, its closed forms, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from deepclust.methods.parts.projection import projection
from deepclust.methods.simclr.method import nt_xent
from deepclust.world import ALONE


def views(n: int, d: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    a, b = (F.normalize(torch.randn(n, d, generator=random)) for _ in range(2))
    return a, b


def slow(a: Tensor, b: Tensor, temperature: float) -> float:
    """Equation 1 of the paper, one ordered pair after the other."""
    z = torch.cat([a, b]).double()
    n, total = len(a), 0.0
    for i in range(2 * n):
        scores = [float(z[i] @ z[k]) / temperature for k in range(2 * n)]
        positive = scores[(i + n) % (2 * n)]
        total -= positive - math.log(sum(math.exp(s) for k, s in enumerate(scores) if k != i))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_it_is_the_papers_sum(temperature: float) -> None:
    a, b = views(7, 5)
    assert float(nt_xent(a, b, ALONE, temperature)) == pytest.approx(slow(a, b, temperature), 1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_value_and_gradient_are_lightlys(temperature: float) -> None:
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours = nt_xent(*F.normalize(rows).chunk(2), ALONE, temperature)
    theirs = NTXentLoss(temperature)(*rows.chunk(2))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    slopes = [torch.autograd.grad(loss, rows)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=0)


def test_collapsed_projections_cost_the_logarithm_of_all_others() -> None:
    same = F.normalize(torch.ones(8, 4))
    assert float(nt_xent(same, same, ALONE, 0.2)) == pytest.approx(math.log(15))


def test_orthonormal_pairs_cost_what_the_formula_says() -> None:
    eye, t = torch.eye(6), 0.5
    expected = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 10))
    assert float(nt_xent(eye, eye, ALONE, t)) == pytest.approx(expected, rel=1e-5)


def test_swapping_the_views_changes_nothing() -> None:
    a, b = views(9, 4)
    torch.testing.assert_close(nt_xent(a, b, ALONE, 0.5), nt_xent(b, a, ALONE, 0.5))


def test_the_loss_of_a_single_image_is_zero() -> None:
    a, b = views(1, 4)
    assert float(nt_xent(a, b, ALONE, 0.5)) == 0


def test_the_projection_depends_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one, state = projection([4, 8, 3], 0), torch.random.get_rng_state()
    other = projection([4, 8, 3], 0)
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [type(layer).__name__ for layer in one] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
