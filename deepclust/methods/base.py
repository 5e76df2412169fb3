"""The Method contract: what a method declares, what it is given, and what it must answer.

A method is cross-entropy between a target q and a prediction p; methods differ in where q comes
from. What a method `needs` of the data is declared, and configures data and loop. One that trains
on a clustering gets it as data, made by `cluster.py` (perhaps on another machine), by `adopt`.
All state lives in parameters and persistent buffers, so the state dict is the whole truth; what
is too large for one rank is `owned`, a slice on every rank.

How three methods use it, and where the others will sit (later ones need what is in brackets):

    method          targets   views     in forward                       beside it
    deepcluster     flat      1         CE(head, cluster)                adopt renews the head
    deepercluster   2 levels  1 turned  CE(super) + CE(sub | super)      adopt; owned sub-head
    simclr          -         2         NT-Xent over all ranks           -
    DeepCluster-v2  heads     V crops   CE to frozen centroids           adopt copies them
                                                                         [bank filled by after_step]
    SeLa            Sinkhorn  1         mean over heads of CE            [heads > 1 in adopt]
    SwAV / Suave    -         V crops   CE to Sinkhorn of the batch      [before_step: unit rows;
                                                                         labels in Batch]
    DINO / Daino    -         V crops   CE to a centred teacher          [after_step: teacher]
    SuperCM         -         1         CE + soft k-means energy         [before_step: centroids]
    DAC             -         1         BCE over pairs above a bound     [after_epoch: the bound]
    MoCo            -         2         CE over a queue                  [after_step: both]
    BYOL            -         2         cosine to a teacher              [after_step: teacher]
    VAE features    -         0         ELBO of stored features          [rows instead of views]

Entropy and locality penalties, VAT and Pseudo-Label are terms that any of them can carry [a list of
(weight, term) beside the method, added to its "loss"].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from deepclust.clustering.whiten import Whitening
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import ClusterSection, MethodSection
from deepclust.world import Owned, World


@dataclass(frozen=True)
class Setting:
    """What a method is built from: its own section, the clustering it will be given, its place."""

    config: MethodSection
    cluster: ClusterSection | None
    seed: int
    world: World


@dataclass(frozen=True)
class Needs:
    """What a method asks of the data: views of each image, and quarter turns to choose from."""

    views: int = 1
    rotations: int = 1


@dataclass(frozen=True)
class Now:
    """The time of a step: steps and epochs done, and the share of the run."""

    step: int
    epochs: float
    progress: float


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, on its device; without a clustering there are no heads."""

    ids: Int64[Tensor, " b"]
    views: tuple[Float[Tensor, "b 3 h w"], ...]
    quarters: Int64[Tensor, " b"]  # turns by 90 degrees, of all views of an image
    targets: Int64[Tensor, "heads b"]


@dataclass(frozen=True)
class Targets:
    """An immutable round: assignments (memory-mapped), centroids, and what they were made with.

    `kept` marks the clusters whose id continues a cluster of the round before (head policy
    `match`); None means that no id does. `labelled` are the sample ids of the seeds, if any.
    """

    round: int
    file: Path
    assignments: Int32[np.ndarray, "heads n"]
    centroids: Float[np.ndarray, "heads k d"]
    whitening: Whitening | None
    kept: Bool[np.ndarray, "heads k"] | None
    labelled: Int64[np.ndarray, " m"] | None = None


class Method(nn.Module, ABC):
    """A pretraining method. `forward` is the loss, so that DDP's hooks fire."""

    backbone: Backbone
    needs = Needs()

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses; `"loss"` is the one that is minimised, the others are told."""

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """What is clustered: features, before the last ReLU where the backbone ends in one."""
        features: Tensor = self.backbone(images)
        return features

    def adopt(self, targets: Targets, seed: int) -> Bool[Tensor, " k"]:
        """Take a round in; returns the rows of the head that are new."""
        raise NotImplementedError(f"{type(self).__name__} does not train on a clustering")

    @abstractmethod
    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer: `"body"` and `"head"`, whose rate and momentum are its own."""

    def owned(self) -> dict[str, Owned]:
        """Parameters of which this rank holds a slice, by name: kept out of DDP, saved by all."""
        return {}
