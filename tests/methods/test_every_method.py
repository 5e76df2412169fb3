"""What holds for every method of the table, and for one that is not in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.methods import METHODS
from deepclust.methods.base import Batch, Method, Now
from deepclust.methods.embed import Embedder
from deepclust.models.backbone import Backbone
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.run.directory import Run
from deepclust.stages.build import parameter_groups, wrap_ddp
from deepclust.world import World
from tests.methods.cases import (
    CASES,
    NAMES,
    NAMES_OF,
    SAMPLES,
    SIZE,
    TOY,
    K,
    batch,
    method,
    recipe,
    share,
)
from tests.ranks import on_ranks
from tests.tiny import assert_predicts_its_assignments, assert_resumes_undisturbed, tiny_recipe


def test_the_table_and_the_cases_name_the_same_methods() -> None:
    assert CASES.keys() == METHODS.keys() | {TOY}


@pytest.mark.parametrize("name", NAMES)
def test_one_step_lowers_the_loss_on_a_fixed_batch(name: str) -> None:
    torch.manual_seed(0)
    of = recipe(name)
    one, fixed = method(of).train(), batch(of)
    optimizers = Optimizers(parameter_groups(one), TrainSection(epochs=1, lr=0.05))
    before = one(fixed)["loss"]
    before.backward()
    optimizers.step()
    assert one(fixed)["loss"] < before


@pytest.mark.parametrize("name", NAMES)
def test_assignments_hold_what_the_evaluated_and_exported_network_answers(name: str) -> None:
    of = recipe(name)
    if of.method.answers == "nothing":
        return
    one, images = method(of), torch.randint(256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():  # a student that its teacher has not followed yet
        one.backbone.load_state_dict({k: v * 1.5 for k, v in one.backbone.state_dict().items()})
    embedder = Embedder(one, of.data, "fp32", torch.device("cpu"))
    answers = embedder.answer(embedder(images).numpy())
    torch.testing.assert_close(embedder.answered(images), answers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_once_and_nothing_else_is(name: str) -> None:
    of = recipe(name)
    one = method(of)
    names = [n for group in parameter_groups(one) for n in group.parameters]
    assert len(names) == len(set(names))
    assert set(names) == {n for n, p in one.named_parameters() if p.requires_grad}
    one(batch(of))["loss"].backward()
    assert all(one.get_parameter(n).grad is not None for n in names)
    assert all(not b.requires_grad for b in one.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_declares_is_there(name: str) -> None:
    of = recipe(name)
    one = method(of)
    assert one.trunk.dim == one.backbone.dim
    assert of.chance_loss > 0
    trained = {n for group in parameter_groups(one) for n in group.parameters}
    assert set(one.frozen(Now())) <= trained
    images = batch(of).crops[0]
    assert one.eval().embed(images).shape == (len(images), one.trunk.dim)


def passes(one: Method, given: Batch) -> Counter[tuple[str, int, bool]]:
    """Images through each backbone in a step: by module, size, and whether gradients are kept."""
    seen: Counter[tuple[str, int, bool]] = Counter()

    def note(name: str, images: torch.Tensor) -> None:
        seen[name, images.shape[-1], torch.is_grad_enabled()] += len(images)

    for name, module in one.named_modules():
        if isinstance(module, Backbone):
            module.register_forward_hook(lambda _, args, __, name=name: note(name, args[0]))
    one(given)
    return seen


@pytest.mark.parametrize("name", [*NAMES, "deepcluster method.head=centroids"])
def test_what_a_method_says_of_its_cost_is_what_it_costs(name: str) -> None:
    name, *overrides = name.split()
    of = recipe(name, *overrides, "terms={}")  # which may ask for more passes
    one, given = method(of), batch(of)
    cost = of.method.cost(of, one.trunk.dim)
    expected: Counter[tuple[str, int, bool]] = Counter()
    for part in cost.passes:
        expected[part.network, part.size, part.trained] += part.count * len(given.sample_ids)
    assert passes(one, given) == expected
    if of.cluster is not None:
        more = recipe(name, *overrides, "terms={}", f"cluster.k={2 * K}")
        grown = state_bytes(method(more)) - state_bytes(method(of))
        assert grown == K * cost.per_cluster


@pytest.mark.parametrize("name", NAMES)
def test_state_beside_the_networks_is_declared(name: str) -> None:
    of = recipe(name)
    one = method(of)
    networks = ("backbone.", "teacher.", "projection.", "predictor.", "head.layers.")
    kept = {n: t for n, t in one.state_dict().items() if not n.startswith(networks)}
    cost = of.method.cost(of, one.trunk.dim)
    clusters = K if of.cluster is not None else 0
    declared = cost.fixed + cost.per_cluster * clusters + cost.per_sample * SAMPLES
    declared += cost.per_class * len(NAMES_OF)
    terms = sum(t.nbytes for n, t in kept.items() if n.startswith("terms."))
    assert sum(t.nbytes for t in kept.values()) - terms == declared


def state_bytes(one: Method) -> int:
    """Bytes of the tensors of a checkpoint."""
    return sum(tensor.nbytes for tensor in one.state_dict().values())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where graphs break
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_method_is_not_compiled_again_for_every_step(name: str) -> None:
    of, graphs = recipe(name), []
    one, given = method(of).train(), batch(of)

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, counts = torch.compile(one, backend=count), []
    for step in range(3):
        now = Now(step, step / 7, step / 70)
        compiled(replace(given, now=now))
        one.after_step(now)
        counts.append(len(graphs))
    assert counts[-1] == counts[1]


def gradients(world: World, name: str) -> dict[str, np.ndarray]:
    """Gradients of this rank's share, batch statistics frozen, as training computes them."""
    torch.manual_seed(0)
    of = recipe(name)
    one = method(of, world).eval()
    model = wrap_ddp(one, world)  # DDP's hooks end with it
    model(share(batch(of), world))["loss"].backward()
    return {n: p.grad.numpy() for n, p in one.named_parameters() if p.grad is not None}


def are_views(world: World) -> bool:
    one = method(recipe("simclr"), world)
    model = wrap_ddp(one, world)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return bool(model.gradient_as_bucket_view)


def test_gradients_are_views_of_what_ranks_send_and_are_not_copied() -> None:
    assert all(on_ranks(2, are_views))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_several_ranks_is_that_of_the_whole_batch(name: str, ranks: int) -> None:
    alone = gradients(World(), name)
    parts = on_ranks(ranks, gradients, name)
    owned = method(recipe(name)).owned()
    for parameter, expected in alone.items():
        pieces = [part[parameter] for part in parts]
        if parameter in owned:
            together = np.concatenate(pieces, axis=owned[parameter].dim)
        else:
            together = pieces[-1]
        np.testing.assert_allclose(together, expected, rtol=1e-6, atol=2e-6)


# what ranks keep together is restored on each of them
SHARED = ("dac", "daino", "deepcluster-v2", "dino", "moco-v2", "suave", "swav")


@pytest.mark.parametrize(("name", "ranks"), [(n, 1 + (n in SHARED)) for n in sorted(METHODS)])
def test_stopped_in_an_epoch_and_resumed_is_undisturbed(
    name: str, ranks: int, shards: Path, tmp_path: Path
) -> None:
    given = tiny_recipe(
        shards, f"method.name={name}", *CASES[name], f"train.ranks={ranks}",
        "train.head_momentum=0.9",
    )  # fmt: skip
    if given.cluster is not None:
        given = given.replace("cluster.final=true")
    assert_resumes_undisturbed(given, tmp_path, 15)
    losses = [Run(tmp_path / run).metrics("train")[-1]["loss"] for run in ("stopped", "straight")]
    assert losses[0] == losses[1]
    if ranks == 1 and given.assigns:
        assert_predicts_its_assignments(tmp_path / "straight", shards, tmp_path)
