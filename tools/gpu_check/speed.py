"""Checks of the training step: against a bare loop of the same network, and fed by readers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from jobs import seconds_of
from outcome import Outcome, Setting, judged
from torch.nn import functional

from deepclust import pretrain
from deepclust.data.to_device import locked
from deepclust.launch.role import cores
from deepclust.methods.base import Batch
from deepclust.methods.embed import autocast
from deepclust.models import build_backbone
from deepclust.optim.optimizers import Optimizers
from deepclust.stages.build import parameter_groups
from deepclust.stages.train import forward_backward
from deepclust.world import World
from tests.images import make_shards
from tests.methods import cases
from tests.tiny import tiny_recipe

NETWORKS = (("resnet50", 64), ("alexnet_bn", 256))  # and images a step
SHARE = 0.9
ROUNDS = 3
LONGEST_WAIT = 0.05


def step_speed(
    setting: Setting,
    networks: tuple[tuple[str, int], ...] = NETWORKS,
    size: int = 224,
    steps: int = 20,
) -> Outcome:
    """Time steps on images that are there already, by turns with a bare loop of the network."""
    shares = {}
    for name, batch in networks:
        ours, bare = our_loop(setting, name, batch, size), bare_loop(setting, name, batch, size)
        pairs = [
            (seconds_of(repeated(bare, steps), setting.device),
             seconds_of(repeated(ours, steps), setting.device))
            for _ in range(ROUNDS)
        ]  # fmt: skip
        shares[name] = statistics.median(plain / own for plain, own in pairs)
    text = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return judged(min(shares.values()) >= SHARE, f"of a bare loop: {text} ({SHARE})", **shares)


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """The step, so many times."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def our_loop(setting: Setting, name: str, batch: int, size: int) -> Callable[[], None]:
    """DeepCluster's step as training has it: forward, backward, optimizers."""
    recipe = cases.recipe(
        "deepcluster", f"backbone.name={name}", f"data.size={size}", f"data.resize={size}"
    )
    world = World(device=setting.device)
    method = cases.method(recipe, world).to(setting.device).train()
    method = method.to(memory_format=torch.channels_last)
    images = moved(cases.batch(recipe, batch), setting.device)
    optimizers = Optimizers(parameter_groups(method), recipe.train, method.owned(), world)
    trainer: Any = SimpleNamespace(recipe=recipe, world=world, model=method)

    def step() -> None:
        method.before_step(images)
        forward_backward(trainer, images, last=True)
        optimizers.step()

    return step


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, but for its ids, which are page-locked, as training has it."""
    names = ("turns", "pseudo_labels", "labels", "soft")
    given = {name: value for name in names if (value := getattr(batch, name)) is not None}
    return replace(
        batch,
        sample_ids=locked(batch.sample_ids, device),
        crops=tuple(crop.to(device) for crop in batch.crops),
        **{name: value.to(device) for name, value in given.items()},
    )


def bare_loop(setting: Setting, name: str, batch: int, size: int) -> Callable[[], None]:
    """The same network with a linear layer and SGD, in plain torch."""
    backbone = build_backbone(name, image_size=size)
    net = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.dim, cases.K))
    net = net.to(setting.device, memory_format=torch.channels_last).train()
    fused = True if setting.device.type == "cuda" else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=fused)
    images = torch.randn(batch, 3, size, size, device=setting.device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(cases.K, (batch,), device=setting.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast("auto", setting.device):
            loss = functional.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()

    return step


def feeding(
    setting: Setting,
    count: int = 4_000,
    network: str = "resnet50",
    size: int = 224,
    batch: int = 256,
) -> Outcome:
    """Train on JPEGs of twice the size, and read from the metrics how long readers are awaited."""
    shards = make_shards(setting.folder / "jpegs", n=count, size=2 * size, format="jpg")
    workers = max(1, cores() - 2)
    recipe = tiny_recipe(
        shards, "method.name=simclr", "cluster=null", f"backbone.name={network}",
        f"data.size={size}", f"data.resize={size + size // 7}", f"data.workers={workers}",
        f"train.batch={batch}", f"train.device={setting.device.type}", "train.log=2",
    )  # fmt: skip
    lines = pretrain(recipe, setting.folder / "run").metrics("train")[1:]
    waiting = statistics.median(line["waiting"] for line in lines)
    rate = statistics.median(line["images_per_s"] for line in lines)
    text = f"{workers} readers are awaited {waiting:.1%} of a step (5 %), {rate:,.0f} images/s"
    return judged(waiting < LONGEST_WAIT, text, waiting=waiting, images_per_s=rate)
