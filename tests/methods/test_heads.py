"""Heads: what a reset draws, what it leaves, and the centroid head against a slow reference."""

from __future__ import annotations

import torch

from deepclust.methods.parts.heads import CentroidHead, LinearHead


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_head_is_deepclusters_and_depends_on_its_seed_alone() -> None:
    first = LinearHead(200, 300, seed=1)
    torch.rand(3)
    same, other = LinearHead(200, 300, seed=1), LinearHead(200, 300, seed=2)
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    assert abs(first.weight.std().item() - 0.01) < 1e-4
    assert abs(first.weight.mean().item()) < 1e-4
    assert not first.bias.any()


def test_a_reset_of_rows_leaves_all_others_and_the_parameters_themselves() -> None:
    head = LinearHead(8, 5, seed=1)
    weight = head.weight
    with torch.no_grad():
        head.weight.fill_(3.0)
        head.bias.fill_(3.0)
    head.reset(2, rows=torch.tensor([1, 4]))
    fresh = LinearHead(8, 5, seed=2).weight
    assert head.weight is weight
    assert torch.equal(head.weight[[1, 4]], fresh[[1, 4]])
    assert (head.weight[[0, 2, 3]] == 3).all()
    assert head.bias.tolist() == [3, 0, 3, 3, 0]


def test_a_reset_of_no_rows_changes_nothing_and_of_all_is_a_fresh_head() -> None:
    head = LinearHead(4, 3, seed=1)
    head.reset(2, rows=torch.tensor([], dtype=torch.int64))
    assert torch.equal(head.weight, LinearHead(4, 3, seed=1).weight)
    head.reset(2)
    assert torch.equal(head.weight, LinearHead(4, 3, seed=2).weight)


def test_the_centroid_head_equals_a_slow_reference() -> None:
    f, mean, matrix, c = random(4, 6), random(6, seed=1), random(6, 3, seed=2), random(5, 3, seed=3)
    logits = CentroidHead(mean, matrix, c)(f)
    for i in range(4):
        white = sum((f[i, j] - mean[j]) * matrix[j] for j in range(6))
        white = white / white.square().sum().sqrt()
        for j in range(5):
            assert abs(logits[i, j] - (white * c[j]).sum() / 0.1) < 1e-4


def test_the_centroid_head_answers_in_float32_under_autocast_and_passes_gradients() -> None:
    head = CentroidHead(random(6), 1e3 * random(6, 3), random(5, 3))
    features = (100 + random(4, 6)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features)
    assert torch.equal(logits, head(features))
    logits.sum().backward()
    assert features.grad is not None
    assert features.grad.any()


def test_the_centroid_head_is_all_in_its_state_and_none_of_it_trains() -> None:
    head = CentroidHead(random(6), random(6, 3), random(5, 3))
    other = CentroidHead(torch.zeros(6), torch.zeros(6, 3), torch.zeros(5, 3))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(random(2, 6)), head(random(2, 6)))
    assert not list(head.parameters())


def test_a_feature_at_the_mean_has_equal_logits() -> None:
    head = CentroidHead(random(6), random(6, 3), random(5, 3))
    assert not head(random(6)[None]).any()
