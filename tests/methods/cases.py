"""What the tests of every method share: a small one of each kind, and a batch for it."""

from __future__ import annotations

import torch

from deepclust.methods import METHODS
from deepclust.methods.base import Batch, Method, Setting
from deepclust.models import build_backbone
from deepclust.recipe.sections import (
    ClusterSection,
    DeepClusterSection,
    DeeperClusterSection,
    MethodSection,
    SimCLRSection,
)
from deepclust.world import ALONE, World

K, SIZE = 6, 16
CASES: dict[str, tuple[MethodSection, ClusterSection | None]] = {
    "deepcluster": (DeepClusterSection(), ClusterSection(k=K, dim=8)),
    "deepercluster": (
        DeeperClusterSection(name="deepercluster"), ClusterSection(k=K, supers=2, dim=8),
    ),
    "simclr": (SimCLRSection(name="simclr", hidden=32, out=16), None),
}  # fmt: skip
NAMES = sorted(CASES)


def setting(name: str, world: World = ALONE) -> Setting:
    """The setting of a small case."""
    return Setting(*CASES[name], seed=0, world=world)


def method(name: str, world: World = ALONE) -> Method:
    """A small method with random weights."""
    return METHODS[name](build_backbone("conv4", image_size=SIZE), setting(name, world))


def batch(of: Method, b: int = 24) -> Batch:
    """Fixed random images and targets, in the shapes that the method needs."""
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(b, 3, SIZE, SIZE, generator=random) for _ in range(of.needs.views)]
    quarters = torch.randint(of.needs.rotations, (b,), generator=random)
    targets = torch.randint(K, (1, b), generator=random)
    return Batch(torch.arange(b), tuple(views), quarters, targets)


def share(whole: Batch, world: World) -> Batch:
    """A rank's part of a batch."""
    own = slice(*(len(whole.ids) * (world.rank + i) // world.size for i in (0, 1)))
    views = tuple(view[own] for view in whole.views)
    return Batch(whole.ids[own], views, whole.quarters[own], whole.targets[:, own])
