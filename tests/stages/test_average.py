"""The average of the last weights (SWA): what it is of, what it replaces, and that it resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster_jobs.results.evaluate import load_trunk
from deepclust import load_backbone, pretrain
from deepclust.errors import DataError, RecipeError
from deepclust.export.backbone import weights_hash
from deepclust.launch.start import resume
from deepclust.methods.base import Method
from deepclust.models import build_backbone
from deepclust.run.checkpoint import average_dir
from deepclust.run.directory import Run
from deepclust.stages import average
from deepclust.stages.average import Average, measure_statistics
from deepclust.stages.schedule import Timeline
from deepclust.stages.warm_start import load_weights
from deepclust.trained.again import export_again
from deepclust.world import ALONE, World
from tests.methods.cases import CASES, batch, method, recipe, share
from tests.ranks import on_ranks
from tests.tiny import assert_resumes_undisturbed, tiny_recipe

STEPS = 12  # of an epoch of the tiny recipe


def set_all(one: Method, value: float) -> None:
    for parameter in one.parameters():
        nn.init.constant_(parameter, value)


def test_the_average_of_one_to_five_is_three() -> None:
    one = method(recipe("simclr"))
    mean = Average(one)
    for count in range(1, 6):
        set_all(one, count)
        mean.follow(one, count)
    set_all(one, 9)
    mean.put_into(one)
    assert all(torch.equal(p, torch.full_like(p, 3)) for p in one.parameters())


def test_what_rounds_renew_and_ranks_own_is_left_out_and_a_teacher_is_not() -> None:
    deeper, dino = method(recipe("deepercluster")), method(recipe("dino"))
    names = Average(deeper).names
    assert not {name for name in names if name.startswith(("sub_head", "super_head"))}
    assert set(deeper.owned()).isdisjoint(names)
    assert any(name.startswith("teacher.backbone.") for name in Average(dino).names)


def test_the_time_decides_of_how_many_weights_it_is() -> None:
    of = recipe("simclr", "train.epochs=3", "train.average_from=0.7", "train.batch=2")
    timeline = Timeline.of(of, 20)  # ten steps an epoch
    counts = [timeline.averaged(steps) for steps in (0, 7, 8, 9, 30)]
    assert counts == [0, 0, 1, 2, 23]
    assert Timeline.of(recipe("simclr"), 24).averaged(30) == 0


@pytest.mark.parametrize("start", ["-1", "1", "7"])
def test_an_average_that_would_never_begin_is_refused(start: str) -> None:
    with pytest.raises(RecipeError, match=r"average_from"):
        recipe("simclr", f"train.average_from={start}")


def measured(world: World, count: int) -> dict[str, torch.Tensor]:
    """The statistics after some batches, of which every rank has its share."""
    of = recipe("simclr")
    one = method(of, world)
    set_all(one.backbone, 0.1)
    trainer: Any = SimpleNamespace(method=one, world=world, recipe=of)
    batches = [share(batch(of, b), world) for b in range(12, 12 + 6 * count, 6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average, "_batches", lambda *_: iter(batches))
        measure_statistics(trainer, None, None)  # type: ignore[arg-type]
    assert all(n.momentum == 0.1 for n in one.modules() if isinstance(n, nn.BatchNorm2d))
    return {n: b.clone() for n, b in one.named_buffers() if "running" in n}


def test_statistics_are_the_mean_over_batches_alike() -> None:
    of = recipe("simclr")
    one = method(of)
    conv = one.backbone.net.blocks[0][0]
    nn.init.constant_(conv.weight, 0.1)
    maps = [conv(torch.cat(batch(of, b).crops)).transpose(0, 1).flatten(1) for b in (12, 18)]
    expected = torch.stack([m.mean(1) for m in maps]).mean(0)
    name = "backbone.net.blocks.0.1.running_mean"
    torch.testing.assert_close(measured(ALONE, 2)[name], expected.detach())


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_have_the_same_statistics(ranks: int) -> None:
    parts, alone = on_ranks(ranks, measured, 2), measured(ALONE, 2)
    for name, value in alone.items():
        assert all(torch.equal(part[name], parts[0][name]) for part in parts)
        if name.startswith("backbone.net.blocks.0.") and "mean" in name:  # of the images alone
            torch.testing.assert_close(parts[0][name], value)


@pytest.fixture(scope="module")
def averaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose weights are averaged over its last half epoch, with all its checkpoints."""
    given = tiny_recipe(
        shards, "method.name=byol", *CASES["byol"], "train.epochs=1", "train.average_from=0.5",
        "train.checkpoint=1 steps", "keep.checkpoints=99",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("averaged") / "run"
    pretrain(given, folder)
    return Run(folder)


def test_the_end_of_a_run_is_the_mean_of_its_last_weights(averaged: Run) -> None:
    trained = [load_file(folder / "model.safetensors") for folder in averaged.checkpoints()]
    assert len(trained) == STEPS
    weights = load_file(average_dir(averaged, STEPS) / "model.safetensors")
    for name in (n for n, _ in method(averaged.recipe).named_parameters()):
        expected = torch.stack([part[name] for part in trained[STEPS // 2 :]]).mean(0)
        torch.testing.assert_close(weights[name], expected)
    mean = "backbone.net.blocks.0.1.running_mean"
    assert not torch.equal(weights[mean], trained[-1][mean])


def test_the_average_is_exported_evaluated_and_begun_from(averaged: Run, tmp_path: Path) -> None:
    net = load_backbone(averaged.path / "export" / "backbone.safetensors")
    weights = load_file(average_dir(averaged, STEPS) / "model.safetensors")
    for name, value in net.net.state_dict().items():
        assert torch.equal(value, weights[f"backbone.net.{name}"])
    begun = [build_backbone("conv4", image_size=16, seed=1) for _ in range(2)]
    load_weights(begun[0], str(averaged.path))
    load_weights(begun[1], str(averaged.checkpoints()[-1]))
    again = load_backbone(export_again(averaged, tmp_path / "again.safetensors").path)
    hashes = {weights_hash(b.export_state()) for b in (net, load_trunk(averaged), again, *begun)}
    assert len(hashes) == 1
    earlier = build_backbone("conv4", image_size=16, seed=1)
    load_weights(earlier, str(averaged.checkpoints()[-2]))
    assert weights_hash(earlier.export_state()) not in hashes


def test_a_damaged_average_is_named(averaged: Run) -> None:
    file = average_dir(averaged, STEPS) / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match="averages"):
            load_trunk(Run(averaged.path))
    finally:
        file.write_bytes(whole)


def test_a_run_made_longer_goes_on_from_the_trained_weights(shards: Path, tmp_path: Path) -> None:
    simclr = ("method.name=simclr", *CASES["simclr"], "train.average_from=0.5")
    pretrain(tiny_recipe(shards, *simclr, "train.epochs=1"), tmp_path / "longer")
    resume(tmp_path / "longer", "train.epochs=2")
    pretrain(tiny_recipe(shards, *simclr, "train.epochs=2"), tmp_path / "straight")
    assert_same_averages(Run(tmp_path / "longer"), Run(tmp_path / "straight"))
    assert average_dir(Run(tmp_path / "longer"), STEPS).exists()


def test_a_run_stopped_within_the_average_ends_as_an_undisturbed_one(
    shards: Path, tmp_path: Path
) -> None:
    given = tiny_recipe(shards, "train.average_from=0.6", "train.epochs=2")
    assert_resumes_undisturbed(given, tmp_path, 15)
    assert_same_averages(Run(tmp_path / "stopped"), Run(tmp_path / "straight"))


def assert_same_averages(one: Run, other: Run) -> None:
    ends = [load_file(average_dir(run, 2 * STEPS) / "model.safetensors") for run in (one, other)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
