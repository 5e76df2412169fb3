"""LARS against its formula, step by step."""

from __future__ import annotations

import torch
from torch import nn

from deepclust.optim.lars import LARS, TRUST, trust


def fixed(*shape: int) -> nn.Parameter:
    random = torch.Generator().manual_seed(sum(shape))
    weight = nn.Parameter(torch.randn(*shape, generator=random))
    weight.grad = torch.randn(*shape, generator=random)
    return weight


def test_two_steps_follow_the_formula() -> None:
    weight, w, v = fixed(4, 3), fixed(4, 3).detach().double(), torch.zeros(4, 3).double()
    optimizer = LARS([{"params": [weight], "decay": 0.01}], lr=0.5, momentum=0.9)
    g = fixed(4, 3).grad
    for _ in range(2):
        weight.grad = g.clone()
        optimizer.step()
        full = g.double() + 0.01 * w
        v = 0.9 * v + TRUST * w.norm() / full.norm() * full
        w = w - 0.5 * v
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-6)


def test_biases_and_norms_take_plain_sgd() -> None:
    bias, plain = fixed(5), fixed(5)
    LARS([bias], lr=0.1, momentum=0.9).step()
    torch.optim.SGD([plain], lr=0.1, momentum=0.9).step()
    assert torch.equal(bias, plain)


def test_the_step_does_not_depend_on_the_scale_of_the_gradient() -> None:
    one, other = fixed(4, 3), fixed(4, 3)
    other.grad *= 1000
    for weight in (one, other):
        LARS([weight], lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_zero_weights_or_gradients_give_a_trust_of_one() -> None:
    some, none = torch.ones(2, 2), torch.zeros(2, 2)
    assert trust([some, none], [none, some]).tolist() == [1.0, 1.0]
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    LARS([{"params": [weight], "decay": 0.1}], lr=0.1, momentum=0.9).step()
    assert torch.equal(weight, torch.zeros(2, 2))


def test_the_step_of_many_weights_is_that_of_each_alone_to_the_bit() -> None:
    together = [fixed(5, 4), fixed(3), fixed(2, 3, 3, 3)]
    together[2].data = together[2].data.to(memory_format=torch.channels_last)
    expected = []
    for weight in together:
        grad = weight.grad.add(weight, alpha=0.1)
        if weight.ndim > 1:
            grad = grad.mul(0.001 * weight.norm() / grad.norm())
        expected.append(weight.detach() - 0.1 * grad)
    LARS([{"params": together, "decay": 0.1}], lr=0.1, momentum=0.9).step()
    for weight, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, atol=1e-7, rtol=1e-6)
