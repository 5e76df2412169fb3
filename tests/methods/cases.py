"""What the tests of every method share: a small recipe of each kind, and a batch for it.

A new method of the table needs one line in CASES.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust import Recipe
from deepclust.methods import METHODS
from deepclust.methods.base import Batch, Method, Now, Setting
from deepclust.methods.terms.term import attach_terms
from deepclust.models import build_backbone
from deepclust.recipe.named import part_of
from deepclust.world import ALONE, World

K, SIZE, CLASSES, SAMPLES = 6, 16, 4, 24
NAMES_OF = ("ant", "bee", "cat", "dog")  # the seeds' classes
TOY = "tests.toys.method"
CASES: dict[str, list[str]] = {
    "deepcluster": [],
    "deepcluster-v2": ["method.heads=3", "method.hidden=32", "method.out=16", "cluster.dim=256",
                       "data.local={count: 1, size: 8}"],
    "deepercluster": ["cluster.supers=2"],
    "dino": ["method.prototypes=12", "method.hidden=32", "method.bottleneck=16", "method.freeze=0",
             "method.momentum=0.9", "cluster=null", "data.local={count: 2, size: 8}"],
    "sela": ["method.heads=2", "method.sharpness=10", "cluster.dim=256", "cluster.iterations=20",
             "cluster.every=4 rounds", "data.grey=0.2"],
    "simclr": ["method.hidden=32", "method.out=16", "cluster=null", "data.grey=0.2",
               "data.jitter=[0.4, 0.4, 0.2, 0.1]"],
    "swav": ["method.prototypes=12", "method.hidden=32", "method.out=16", "method.freeze=0",
             "method.queue=48", "method.queue_from=0.5", "cluster=null",
             "data.local={count: 2, size: 8}"],
    "moco-v2": ["method.hidden=32", "method.out=16", "method.queue=40", "cluster=null"],
    "moco-v3": ["method.hidden=32", "method.out=16", "cluster=null"],
    "byol": ["method.hidden=32", "method.out=16", "cluster=null", "data.blur=[1.0, 0.1]",
             "data.solarise=[0.0, 0.2]"],
    "supervised": ["cluster=null", "seeds={labels: shards, per_class: 20, share: 0.25}",
                   "terms={cm: {weight: 0.2}, pseudo_label: {weight: 0.5, threshold: 0.2}, "
                   "vat: {weight: 0.1, eps: 1}}"],
    "dac": ["method.clusters=12", "cluster=null"],
    "suave": ["method.free=2", "method.hidden=32", "method.out=16", "method.freeze=0",
              "method.queue=48", "method.queue_from=0.5", "method.prior=learned", "cluster=null",
              "data.local={count: 2, size: 8}",
              "seeds={labels: shards, per_class: 20, share: 0.25}"],
    "daino": ["method.free=2", "method.hidden=32", "method.bottleneck=16", "method.freeze=0",
              "method.momentum=0.9", "cluster=null", "data.local={count: 2, size: 8}",
              "seeds={labels: shards, per_class: 20, share: 0.25, crop_scale: [0.5, 1], "
              "mix: {mixup: 1, cutmix: 1, chance: 0.5}}"],
    TOY: ["backbone.name=tests.toys.backbone", "train.optimizer=adamw", "train.lr=0.01",
          "data.local={count: 2, size: 8}", "seeds={labels: shards, per_class: 20, share: 0.25}",
          "terms.mean_entropy={weight: 0.1, ramp: 1}"],
}  # fmt: skip
NAMES = sorted(CASES)


def recipe(name: str, *overrides: str) -> Recipe:
    """The recipe of a small case; nothing is read."""
    tree = {
        "data": {"shards": "unread", "size": SIZE, "resize": SIZE},
        "backbone": {"name": "conv4"},
        "cluster": {"k": K, "dim": 8},
        "train": {"epochs": 1, "batch": 24},
    }
    return Recipe.parse(tree).replace(f"method.name={name}", *CASES[name], *overrides)


def method(of: Recipe, world: World = ALONE) -> Method:
    """The recipe's method with random weights."""
    setting = Setting(of.method, of.cluster, 0, world, of.terms, SAMPLES, NAMES_OF)
    backbone = build_backbone(of.backbone.name, image_size=of.data.size)
    built: Method = part_of(of.method.name, METHODS, "method")(backbone, setting)
    attach_terms(built)
    return built


def batch(of: Recipe, b: int = 24) -> Batch:
    """Fixed random images and targets, in the shapes that the method declares."""
    random = torch.Generator().manual_seed(0)
    kinds = of.method.crops(of.data)
    crops = tuple(
        torch.randn(b, 3, kind.size, kind.size, generator=random)
        for kind in kinds
        for _ in range(kind.count)
    )
    turns = torch.randint(max(kind.turns for kind in kinds), (b,), generator=random)
    heads = of.method.round.heads if of.method.round else 0
    pseudo_labels = torch.randint(K, (heads, b), generator=random)
    labels = torch.randint(-1, CLASSES, (b,), generator=random)
    if of.seeds is None or of.seeds.mix is None:
        return Batch(torch.arange(b), crops, turns, pseudo_labels, labels)
    return Batch(torch.arange(b), crops, turns, pseudo_labels, *mixed(labels, random))


def mixed(labels: Tensor, random: torch.Generator) -> tuple[Tensor, Now, Tensor]:
    """Labels of which every other one is mixed with class 0, the time, and shares of classes."""
    soft = F.one_hot(labels + 1, CLASSES + 1)[:, 1:].float()
    rows = torch.arange(0, len(labels), 2)[labels[::2] >= 0]
    share = torch.rand(len(rows), 1, generator=random)
    soft[rows] = share * soft[rows] + (1 - share) * torch.eye(CLASSES)[0]
    return labels.where(soft.max(1).values.eq(1), -1), Now(), soft


def share(whole: Batch, world: World) -> Batch:
    """A rank's part of a batch."""
    own = slice(*(len(whole.sample_ids) * (world.rank + i) // world.size for i in (0, 1)))
    return replace(
        whole,
        sample_ids=whole.sample_ids[own],
        crops=tuple(crop[own] for crop in whole.crops),
        turns=whole.turns[own],
        pseudo_labels=whole.pseudo_labels[:, own],
        labels=whole.labels[own],
        soft=None if whole.soft is None else whole.soft[own],
    )
