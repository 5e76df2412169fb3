"""Checkpoints of a method and its optimizers, in the new format and in that before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepclust.methods.base import Method
from deepclust.optim.optimizers import MOMENTUM, Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.run import checkpoint, checkpoint_writer
from deepclust.run.checkpoint import OwnedTensors, State, Tensors
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from deepclust.stages.build import parameter_groups
from deepclust.stages.train_state import put_back, split
from deepclust.world import ALONE, World
from tests.methods.cases import method, recipe
from tests.ranks import on_ranks
from tests.tiny import assert_resumes_undisturbed, tiny_recipe, tiny_shards

KINDS = ["sgd", "lars", "adamw"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with hold(tmp_path) as token:
        yield Run(tmp_path, token)


def build(kind: str, world: World = ALONE, clip: float | None = None) -> tuple[Method, Optimizers]:
    """DeeperCluster, whose sub-head is owned by slices; weights and gradients are reproducible."""
    torch.manual_seed(0)
    one = method(recipe("deepercluster"), world)
    config = TrainSection.model_validate(
        {"epochs": 1, "optimizer": kind, "head_momentum": 0.9, "clip": clip}
    )
    return one, Optimizers(parameter_groups(one), config, one.owned(), world)


def train(one: Method, optimizers: Optimizers, first: int, steps: int = 2) -> float:
    """Step on gradients that are the same for any number of ranks; return the last norm."""
    held, norm = one.owned(), torch.zeros(())
    for step in range(first, first + steps):
        for number, (name, parameter) in enumerate(one.named_parameters()):
            shape, own = list(parameter.shape), held.get(name)
            if own is not None:
                shape[own.dim] = own.total
            random = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(shape, generator=random)
            if own is not None:
                gradient = gradient.narrow(own.dim, own.start, own.count)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        norm = optimizers.step()
    return float(norm)


def whole(one: Method, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Weights and state by name."""
    tensors = {f"model/{name}": parameter for name, parameter in one.named_parameters()}
    state = {f"{role}/{name}/{key}": value for role, name, _, key, value in optimizers.state()}
    return {name: tensor.detach().clone() for name, tensor in {**tensors, **state}.items()}


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def old_format(
    parts: dict[str, Tensors], slices: OwnedTensors, optimizers: Optimizers
) -> tuple[dict[str, Tensors], OwnedTensors]:
    """The same checkpoint as it was written before state was saved by parameter name."""
    old = {"model": parts["model"]}
    for role, parameters in optimizers.groups.items():
        old[role] = {
            str(number): parts[role][f"{name}/{MOMENTUM}"]
            for number, name in enumerate(parameters)
            if f"{name}/{MOMENTUM}" in parts[role]
        }
    return old, {name.removesuffix(f"/{MOMENTUM}"): entry for name, entry in slices.items()}


@pytest.mark.parametrize(
    ("kind", "old"), [("sgd", False), ("lars", False), ("adamw", False), ("sgd", True)]
)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(run: Run, kind: str, old: bool) -> None:
    one, optimizers = build(kind)
    train(one, optimizers, first=0)
    parts, slices = split(one, optimizers)
    if old:
        parts, slices = old_format(parts, slices, optimizers)
        assert "head/sub_head.weight" in slices
    checkpoint_writer.save(run, State(step=2), parts, 3, slices)
    latest = checkpoint.load_latest(run, pytest.fail)
    assert latest is not None
    other, restored = build(kind)
    put_back(latest.folder, latest.parts, other, restored)
    for pair in ((one, optimizers), (other, restored)):
        train(*pair, first=2)
    assert_same(whole(one, optimizers), whole(other, restored))


def save_trained(world: World, run: Run, kind: str) -> None:
    one, optimizers = build(kind, world)
    train(one, optimizers, first=0)
    parts, slices = split(one, optimizers)
    checkpoint_writer.save(run, State(step=2), parts if world.is_first else {}, 3, slices, world)
    world.barrier()


def restore_and_train(world: World, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Go on from a checkpoint; the state of every parameter, put together from all ranks."""
    one, optimizers = build(kind, world)
    _, parts = checkpoint.load(folder)
    put_back(folder, parts, one, optimizers)
    train(one, optimizers, first=2)
    held, here = one.owned(), whole(one, optimizers)
    everywhere: list[dict[str, torch.Tensor]] = [{}] * world.size
    if world.size == 1:
        everywhere = [here]
    else:
        torch.distributed.all_gather_object(everywhere, here)
    for entry, value in here.items():
        own = held.get(entry.split("/")[1])
        if own is not None and value.ndim:
            here[entry] = torch.cat([there[entry] for there in everywhere], own.dim)
    return here


@pytest.mark.parametrize("kind", KINDS)
def test_owned_state_of_any_optimizer_is_read_by_another_number_of_ranks(
    run: Run, kind: str
) -> None:
    on_ranks(2, save_trained, run, kind)
    (folder,) = run.checkpoints()
    expected = restore_and_train(ALONE, folder, kind)
    one, optimizers = build(kind)
    train(one, optimizers, first=0, steps=4)
    assert_same(expected, whole(one, optimizers))
    for shared in on_ranks(3, restore_and_train, folder, kind):
        assert_same(shared, expected)


def step_once(world: World, clip: float | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The norm of a step's whole gradient, and the weights after it."""
    one, optimizers = build("sgd", world, clip)
    norm = train(one, optimizers, first=0, steps=1)
    return norm, {n: p.detach() for n, p in one.named_parameters() if n not in one.owned()}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_norm_and_the_clipped_step_are_those_of_one_rank(clip: float | None) -> None:
    norm, weights = step_once(ALONE, clip)
    for shared_norm, shared in on_ranks(3, step_once, clip):
        assert shared_norm == pytest.approx(norm, rel=1e-5)
        for name, weight in shared.items():
            torch.testing.assert_close(weight, weights[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [["method.head=match"], ["method.name=deepercluster", "cluster.supers=2"]]
)
def test_a_run_with_adamw_resumes_as_if_undisturbed(tmp_path: Path, method: list[str]) -> None:
    optimizer = ["train.optimizer=adamw", "train.lr=0.001", "train.schedule=cosine"]
    optimizer += ["train.weight_decay=0.04", "train.weight_decay_end=0.4", "train.clip=3"]
    shards = tiny_shards(tmp_path / "shards", n=96)
    recipe = tiny_recipe(shards, "train.epochs=3", "train.log=1", *optimizer, *method)
    assert_resumes_undisturbed(recipe, tmp_path, step=6)
