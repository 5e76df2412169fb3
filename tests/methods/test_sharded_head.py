"""The sharded sub-head against a whole one, and against one cross-entropy a sample in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from deepclust.methods.parts.sharded_head import SubHead
from deepclust.world import ALONE, World
from tests.ranks import on_ranks

D, S, ROWS = 5, 6, 12  # rows of all ranks together


def rows(subs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features and classes of a batch in which super-classes 1 and 4 are absent."""
    random = torch.Generator().manual_seed(subs)
    s = torch.tensor([0, 2, 3, 5])[torch.randint(4, (ROWS,), generator=random)]
    z = torch.randint(subs, (ROWS,), generator=random)
    return torch.randn(ROWS, D, generator=random, dtype=torch.float64), s, z


def loud(head: SubHead) -> SubHead:
    """In float64, with weights so large that the softmax is far from flat, and biases."""
    head.double()
    with torch.no_grad():
        head.weight.mul_(100)
        head.bias.copy_(head.weight[:, :, 0])
    return head


def slow(head: SubHead, f: Tensor, s: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by autograd, one sample at a time, with a head that holds all rows."""
    f, weight, bias = (t.detach().clone().requires_grad_() for t in (f, head.weight, head.bias))
    losses = [
        functional.cross_entropy(f[i] @ weight[s[i]].T + bias[s[i]], z[i]) for i in range(len(f))
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return {"loss": loss.detach(), "features": f.grad, "weight": weight.grad, "bias": bias.grad}


def sharded(world: World, subs: int) -> dict[str, Tensor]:
    """One rank's loss and gradients; every rank has its share of the rows."""
    f, s, z = (t.chunk(world.size)[world.rank] for t in rows(subs))
    head, f = loud(SubHead(D, S, subs, world, seed=3)), f.clone().requires_grad_()
    loss = head(f, s, z)
    loss.backward()
    return {"loss": loss.detach(), "features": f.grad, **grads(head)}


def one_of_three(rank: int) -> World:
    """A rank that meets nobody, for what needs no other."""
    return World(rank, 3)


def grads(head: SubHead) -> dict[str, Tensor]:
    return {name: p.grad for name, p in head.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("subs", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sharded_head_equals_one_cross_entropy_a_sample(size: int, subs: int) -> None:
    found = on_ranks(size, sharded, subs)
    want = slow(loud(SubHead(D, S, subs, ALONE, seed=3)), *rows(subs))
    torch.testing.assert_close(torch.stack([r["loss"] for r in found]).mean(), want["loss"])
    # DDP will divide the trunk's gradients by the number of ranks
    features = torch.cat([r["features"] for r in found]) / size
    torch.testing.assert_close(features, want["features"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(torch.cat([r[name] for r in found], 1), want[name])


def test_only_the_super_classes_of_the_batch_get_a_gradient() -> None:
    gradient = sharded(ALONE, 7)["weight"]
    present = rows(7)[1].unique()
    absent = [s for s in range(S) if s not in present]
    assert {1, 4} <= set(absent)
    assert not gradient[absent].any()
    assert gradient[present].flatten(1).any(1).all()


def test_one_sub_cluster_has_no_loss_and_no_gradient() -> None:
    for found in on_ranks(2, sharded, 1):
        assert found["loss"] == 0
        assert not any(found[name].any() for name in ("features", "weight", "bias"))


def columns(world: World) -> Tensor:
    f, s, _ = rows(7)
    return loud(SubHead(D, S, 7, world, seed=3)).logits(f, s)


def test_logits_are_the_ranks_columns_and_their_probabilities_sum_to_one() -> None:
    logits = torch.cat([columns(one_of_three(rank)) for rank in range(3)], 1)
    head = loud(SubHead(D, S, 7, ALONE, seed=3))
    f, s, z = rows(7)
    want = torch.einsum("bd,bkd->bk", f, head.weight[s]) + head.bias[s]
    torch.testing.assert_close(logits, want.detach())
    every = torch.stack([head(f[:1], s[:1], torch.tensor([z])) for z in range(7)])
    torch.testing.assert_close((-every).exp().sum().item(), 1.0)
    torch.testing.assert_close(head(f, s, z), functional.cross_entropy(logits, z))


def fresh(world: World, subs: int) -> tuple[Tensor, Tensor]:
    head = SubHead(64, 2, subs, world, seed=1)
    with torch.no_grad():
        head.bias.fill_(3.0)
    head.reset(2)
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("subs", [2, 2500])
def test_a_reset_does_not_depend_on_the_world(subs: int) -> None:
    whole, bias = fresh(ALONE, subs)
    parts = [fresh(one_of_three(rank), subs)[0] for rank in range(3)]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert not bias.any()


def test_a_reset_is_deepclusters_draw_and_a_row_depends_on_seed_and_place_alone() -> None:
    first, other = SubHead(64, 2, 2500, ALONE, seed=1), SubHead(64, 2, 2500, ALONE, seed=2)
    assert abs(first.weight.std().item() - 0.01) < 1e-4
    assert abs(first.weight.mean().item()) < 1e-4
    assert torch.equal(first.weight[:, :900], SubHead(64, 2, 900, ALONE, seed=1).weight)
    assert len(torch.cat([first.weight, other.weight]).flatten(0, 1).unique(dim=0)) == 10_000


@pytest.mark.parametrize("subs", [1, 2, 3, 8])
def test_the_ranges_follow_each_other_and_differ_by_one_at_most(subs: int) -> None:
    heads = [SubHead(D, S, subs, one_of_three(rank), seed=0) for rank in range(3)]
    found = [head.owned()["weight"] for head in heads]
    assert [o.start for o in found] + [subs] == [0] + [o.stop for o in found]
    assert max(o.count for o in found) - min(o.count for o in found) <= 1
    assert {(o.dim, o.total) for o in found} == {(1, subs)}
    assert [head.weight.shape[1] for head in heads] == [o.count for o in found]
    assert all(head.owned()["bias"] == o for head, o in zip(heads, found, strict=True))


class Net(nn.Module):
    """A trunk and a sub-head, as a method has them."""

    def __init__(self, world: World) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D).double()
        self.sub = loud(SubHead(D, S, 7, world, seed=3))

    def forward(self, f: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return self.sub(self.trunk(f).relu(), s, z)


def trained(world: World) -> tuple[Tensor, Tensor]:
    """The weights after three steps of momentum SGD; the head's beside DDP."""
    net = Net(world)
    model: nn.Module = net
    if world.size > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            net, ["sub.weight", "sub.bias"]
        )
        model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(*(t.chunk(world.size)[world.rank] for t in rows(7))).backward()
        optimizer.step()
    return net.trunk.weight.detach(), net.sub.weight.detach()


def test_trunk_and_head_learn_the_same_on_three_ranks_as_on_one() -> None:
    trunk, weight = trained(ALONE)
    found = on_ranks(3, trained)
    for other, _ in found:
        torch.testing.assert_close(other, trunk)
    torch.testing.assert_close(torch.cat([part for _, part in found], 1), weight)


def lopsided(world: World) -> Tensor:
    """The head's gradient when rank 0's loss counts three times, rank 1's once."""
    f, s, z = (t.chunk(world.size)[world.rank] for t in rows(7))
    head = loud(SubHead(D, S, 7, world, seed=3))
    (head(f, s, z) * (3.0 - 2 * world.rank)).backward()
    assert head.weight.grad is not None
    return head.weight.grad


def test_ranks_may_weigh_their_losses_differently() -> None:
    head = loud(SubHead(D, S, 7, ALONE, seed=3))
    halves = list(zip(*(t.chunk(2) for t in rows(7)), strict=True))
    want = (3 * slow(head, *halves[0])["weight"] + slow(head, *halves[1])["weight"]) / 2
    torch.testing.assert_close(torch.cat(on_ranks(2, lopsided), 1), want)


def in_bfloat16(world: World, subs: int) -> tuple[dict[str, Tensor], str]:
    f, s, z = (t.chunk(world.size)[world.rank] for t in rows(subs))
    head, f = SubHead(D, S, subs, world, seed=3), f.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(f, s, z)
    loss.backward()
    return {"loss": loss.detach(), "features": f.grad, **grads(head)}, str(loss.dtype)


def test_autocast_multiplies_in_its_precision_and_answers_in_float32() -> None:
    found = on_ranks(2, in_bfloat16, 7)
    want = slow(SubHead(D, S, 7, ALONE, seed=3), rows(7)[0].float(), *rows(7)[1:])
    assert {dtype for _, dtype in found} == {"torch.float32"}
    weight = torch.cat([r["weight"] for r, _ in found], 1)
    assert weight.dtype == torch.float32
    assert (weight - want["weight"]).norm() < 0.01 * want["weight"].norm()
    features = torch.cat([r["features"] for r, _ in found]) / 2
    assert (features - want["features"]).norm() < 0.02 * want["features"].norm()


def test_huge_logits_stay_finite() -> None:
    head = SubHead(2, 1, 3, ALONE, seed=0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]]]))
    f = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = head(f, torch.tensor([0, 0]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 5000
    assert f.grad is not None
    assert f.grad.isfinite().all()


@pytest.mark.parametrize(("s", "z"), [(-1, 0), (S, 0), (0, -1), (0, 7)])
def test_a_class_that_is_not_there_is_refused(s: int, z: int) -> None:
    with pytest.raises(AssertionError, match="outside"):
        SubHead(D, S, 7, ALONE, seed=0)(torch.ones(1, D), torch.tensor([s]), torch.tensor([z]))


def test_a_frozen_trunk_gets_no_gradient_and_the_head_its_own() -> None:
    head = loud(SubHead(D, S, 7, ALONE, seed=3))
    head(*rows(7)).backward()
    torch.testing.assert_close(grads(head)["weight"], slow(head, *rows(7))["weight"])
