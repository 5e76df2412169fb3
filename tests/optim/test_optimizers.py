"""Optimizers by role: against torch's own, their schedules, renewed heads, and saved state."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepclust.errors import DataError
from deepclust.optim.optimizers import Group, Optimizers
from deepclust.recipe.sections import TrainSection
from tests.pretended_device import pretended

KINDS = ["sgd", "lars", "adamw"]
START = SimpleNamespace(epochs=0.0)
NEW = torch.ones(5, dtype=torch.bool)


def train(**changes: object) -> TrainSection:
    defaults = {"epochs": 10, "lr": 0.1, "head_momentum": 0.9, "weight_decay": 0.05}
    return TrainSection.model_validate({**defaults, **changes})


def groups(seed: int = 0) -> list[Group]:
    """A body of a convolution and a norm, and a head of 5 classes."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    head = nn.Linear(4, 5)
    return [
        Group("body", dict(body.named_parameters())),
        Group("head", dict(head.named_parameters())),
    ]


def parameters(of: list[Group]) -> dict[str, nn.Parameter]:
    return {name: p for group in of for name, p in group.parameters.items()}


def give_gradients(of: list[Group], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for parameter in parameters(of).values():
        gradient = torch.randn(parameter.shape, generator=random)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in its layout, as autograd's


def trained(config: TrainSection, steps: int = 3) -> tuple[Optimizers, list[Group]]:
    of = groups()
    optimizers = Optimizers(of, config)
    for step in range(steps):
        optimizers.set_schedule(START)
        give_gradients(of, step)
        optimizers.step()
    return optimizers, of


def saved(optimizers: Optimizers) -> dict[str, dict[str, torch.Tensor]]:
    """The state as a checkpoint has it."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for role, name, _, key, value in optimizers.state():
        parts.setdefault(role, {})[f"{name}/{key}"] = value.clone()
    return parts


def test_adamw_is_torchs_with_decay_on_matrices_alone() -> None:
    config = train(optimizer="adamw", lr=0.01, betas=(0.8, 0.95), head_lr=0.02)
    _, ours = trained(config)
    theirs = groups()
    at = parameters(theirs)
    decayed = {"params": [at["0.weight"]], "weight_decay": 0.05}
    plain = {"params": [at["0.bias"], at["1.weight"], at["1.bias"]], "weight_decay": 0.0}
    body = torch.optim.AdamW([decayed, plain], lr=0.01, betas=(0.8, 0.95))
    head = torch.optim.AdamW(
        [
            {"params": [at["weight"]], "weight_decay": 0.05},
            {"params": [at["bias"]], "weight_decay": 0.0},
        ],
        lr=0.02, betas=(0.8, 0.95),
    )  # fmt: skip
    for step in range(3):
        give_gradients(theirs, step)
        body.step()
        head.step()
    for name, parameter in parameters(ours).items():
        assert torch.equal(parameter, at[name]), name


@pytest.mark.parametrize(
    ("kind", "decay", "decayed"),
    [
        ("sgd", "auto", {"0.weight", "0.bias", "1.weight", "1.bias", "weight", "bias"}),
        ("sgd", "matrices", {"0.weight", "weight"}),
        ("lars", "auto", {"0.weight", "weight", "bias"}),  # its head takes SGD
        ("adamw", "auto", {"0.weight", "weight"}),
        ("adamw", "all", {"0.weight", "0.bias", "1.weight", "1.bias", "weight", "bias"}),
    ],
)
def test_weight_decay_applies_to_what_the_recipe_says(
    kind: str, decay: str, decayed: set[str]
) -> None:
    of = groups()
    optimizers = Optimizers(of, train(optimizer=kind, decay=decay))
    names = {id(parameter): name for name, parameter in parameters(of).items()}
    chosen = {
        names[id(parameter)]
        for optimizer in optimizers.by_role.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("decay") or group["weight_decay"]
    }
    assert chosen == decayed


def test_schedules_move_rate_and_decay_of_the_body_and_decay_of_the_head() -> None:
    config = train(optimizer="lars", head_lr=0.5, schedule="cosine", weight_decay_end=0.25)
    optimizers = Optimizers(groups(), config)
    assert optimizers.set_schedule(SimpleNamespace(epochs=5.0)) == pytest.approx(0.05)
    body, head = (optimizers.by_role[role].param_groups for role in ("body", "head"))
    assert [group["lr"] for group in body] == pytest.approx([0.05, 0.05])
    assert [group["decay"] for group in body] == pytest.approx([0.15, 0.0])
    assert [(group["lr"], group["weight_decay"]) for group in head] == [(0.5, pytest.approx(0.15))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_renewed_head_starts_as_with_a_new_optimizer_and_the_body_goes_on(kind: str) -> None:
    optimizers, of = trained(train(optimizer=kind))
    body = saved(optimizers)["body"]
    optimizers.renew({"weight": NEW, "bias": NEW})
    assert saved(optimizers).keys() == {"body"}
    assert all(
        torch.equal(value, body[entry]) for entry, value in saved(optimizers)["body"].items()
    )
    again = Optimizers(of, train(optimizer=kind))
    give_gradients(of, 7)
    before = {name: p.detach().clone() for name, p in of[1].parameters.items()}
    optimizers.step()
    renewed = {name: p.detach().clone() for name, p in of[1].parameters.items()}
    with torch.no_grad():
        for name, parameter in of[1].parameters.items():
            parameter.copy_(before[name])
    give_gradients(of, 7)
    again.step()
    assert all(torch.equal(renewed[name], p) for name, p in of[1].parameters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rows_keep_their_state_and_new_rows_have_none(kind: str) -> None:
    optimizers, _ = trained(train(optimizer=kind))
    before = saved(optimizers)["head"]
    fresh = torch.tensor([True, False, True, False, False])
    optimizers.renew({"weight": fresh, "bias": fresh})
    after = saved(optimizers)["head"]
    assert after.keys() == before.keys()
    for entry in (entry for entry in after if not entry.endswith("/step")):
        assert torch.equal(after[entry][~fresh], before[entry][~fresh])
        assert not after[entry][fresh].any()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_saved_state_bit_for_bit(kind: str) -> None:
    config = train(optimizer=kind)
    optimizers, of = trained(config)
    copies = groups(1)
    restored = Optimizers(copies, config)
    restored.load_state(saved(optimizers))
    with torch.no_grad():
        for name, parameter in parameters(copies).items():
            parameter.copy_(parameters(of)[name])
    for step in range(3, 6):
        for some, their in ((optimizers, of), (restored, copies)):
            give_gradients(their, step)
            some.step()
    for name, parameter in parameters(of).items():
        assert torch.equal(parameter, parameters(copies)[name]), name
    for (*_, one), (*_, other) in zip(optimizers.state(), restored.state(), strict=True):
        assert one.stride() == other.stride()


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_an_old_checkpoint_numbers_the_parameters_of_each_group(kind: str) -> None:
    optimizers, of = trained(train(optimizer=kind))
    new = saved(optimizers)
    old = {
        group.role: {
            str(number): new[group.role][f"{name}/momentum_buffer"]
            for number, name in enumerate(group.parameters)
        }
        for group in of
    }
    restored = Optimizers(groups(), train(optimizer=kind))
    restored.load_state(old)
    for role, entries in saved(restored).items():
        assert entries.keys() == new[role].keys()
        assert all(torch.equal(value, new[role][entry]) for entry, value in entries.items())


@pytest.mark.parametrize("entry", ["gone/exp_avg", "0.weight/exp_avg", "17"])
def test_state_that_does_not_fit_is_named(entry: str) -> None:
    optimizers = Optimizers(groups(), train())
    with pytest.raises(DataError, match=f"has {entry} of the body's optimizer"):
        optimizers.load_state({"body": {entry: torch.zeros(4, 3, 3, 3)}})


def clipped(**changes: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients before clipping, and the updates of plain SGD after it."""
    config = train(lr=1.0, momentum=0, head_momentum=0, weight_decay=0, **changes)
    of = groups()
    give_gradients(of, 0)
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in parameters(of).items()}
    norm = Optimizers(of, config).step()
    whole = torch.cat([gradient.flatten() for _, gradient in before.values()])
    torch.testing.assert_close(norm, whole.norm())
    for name, parameter in parameters(of).items():
        start, gradient = before[name]
        yield gradient, start - parameter.detach()


def test_clipping_by_norm_scales_the_whole_gradient() -> None:
    pairs = list(clipped(clip=0.5))
    whole = torch.cat([update.flatten() for _, update in pairs])
    torch.testing.assert_close(whole.norm(), torch.tensor(0.5), atol=1e-5, rtol=1e-5)
    given = torch.cat([gradient.flatten() for gradient, _ in pairs])
    torch.testing.assert_close(whole, given * 0.5 / given.norm(), atol=1e-5, rtol=1e-4)


def test_clipping_by_tensor_scales_each_gradient_that_is_too_long() -> None:
    for gradient, update in clipped(clip=2.5, clip_by="tensor"):
        expected = gradient * min(1.0, 2.5 / float(gradient.norm()))
        torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)


def test_a_large_bound_and_no_bound_change_nothing() -> None:
    for changes in ({}, {"clip": 1e6}, {"clip": 1e6, "clip_by": "tensor"}):
        for gradient, update in clipped(**changes):
            torch.testing.assert_close(update, gradient, atol=1e-6, rtol=1e-5)


def test_parameters_without_gradients_stay_and_count_as_zero() -> None:
    of = groups()
    optimizers = Optimizers(of, train(clip=1.0))
    assert optimizers.step() == 0
    assert all(torch.equal(p, parameters(groups())[name]) for name, p in parameters(of).items())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_on_a_gpu_is_fused_and_goes_on_from_its_state(kind: str) -> None:
    config, on_cpu = train(optimizer=kind), groups()
    plain = Optimizers(on_cpu, config)
    give_gradients(on_cpu, 0)
    plain.step()
    with pretended() as log:
        of = groups()
        for parameter in parameters(of).values():
            parameter.data = parameter.data.to("cuda")
        optimizers = Optimizers(of, config)
        give_gradients(of, 0)
        waits = log.count("other")
        optimizers.step()
        assert log.count("other") == waits
        assert f"_fused_{kind}_" in {name for name, _ in log.types}
        again = Optimizers(of, config)
        again.load_state(saved(optimizers))
        give_gradients(of, 1)
        again.step()  # a count of steps on the CPU would be refused
        assert all(t.is_cuda for *_, t in again.state())
