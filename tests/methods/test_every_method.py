"""What holds for every method of the table, and must for one that is added."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepclust.methods import METHODS
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.run.directory import Run
from deepclust.stages.build import groups_of, wrapped
from deepclust.world import World
from tests.methods.cases import CASES, NAMES, batch, method, share
from tests.ranks import on_ranks
from tests.tiny import assert_resumes_undisturbed, tiny_recipe

TREES = {
    "deepcluster": [],
    "deepercluster": ["method.name=deepercluster", "cluster.supers=2"],
    "simclr": ["method={name: simclr, hidden: 32, out: 16}", "cluster=null", "data.grey=0.2",
               "data.jitter=[0.4, 0.4, 0.2, 0.1]"],
}  # fmt: skip


def test_the_table_and_the_cases_name_the_same_methods() -> None:
    assert METHODS.keys() == CASES.keys() == TREES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_one_step_lowers_the_loss_on_a_fixed_batch(name: str) -> None:
    torch.manual_seed(0)
    one = method(name).train()
    optimizers = Optimizers(groups_of(one), TrainSection(epochs=1, lr=0.05))
    before = one(batch(one))["loss"]
    before.backward()
    optimizers.step()
    assert one(batch(one))["loss"] < before


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_once_and_nothing_else_is(name: str) -> None:
    one = method(name)
    groups = [p for group in one.param_groups().values() for p in group]
    assert len(groups) == len({id(p) for p in groups})
    assert {id(p) for p in groups} == {id(p) for p in one.parameters() if p.requires_grad}
    one(batch(one))["loss"].backward()
    assert all(p.grad is not None for p in groups)
    assert all(not b.requires_grad for b in one.buffers())


def gradients(world: World, name: str) -> dict[str, np.ndarray]:
    """Gradients of this rank's share, batch statistics frozen, as training computes them."""
    torch.manual_seed(0)
    one = method(name, world).eval()
    context: Any = SimpleNamespace(
        world=world, recipe=SimpleNamespace(train=SimpleNamespace(compile=False))
    )
    model = wrapped(one, context)  # DDP's hooks end with it
    model(share(batch(one), world))["loss"].backward()
    return {n: p.grad.numpy() for n, p in one.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_several_ranks_is_that_of_the_whole_batch(name: str, ranks: int) -> None:
    alone = gradients(World(), name)
    parts = on_ranks(ranks, gradients, name)
    owned = method(name).owned()
    for parameter, expected in alone.items():
        pieces = [part[parameter] for part in parts]
        if parameter in owned:
            together = np.concatenate(pieces, axis=owned[parameter].dim)
        else:
            together = pieces[-1]
        np.testing.assert_allclose(together, expected, atol=2e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_stopped_in_an_epoch_and_resumed_is_undisturbed(
    name: str, ranks: int, shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(shards, *TREES[name], f"train.ranks={ranks}", "train.head_momentum=0.9")
    assert_resumes_undisturbed(recipe, tmp_path, 15)
    losses = [Run(tmp_path / run).metrics("train")[-1]["loss"] for run in ("stopped", "straight")]
    assert losses[0] == losses[1]
