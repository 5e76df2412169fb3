"""The Method contract: what a method declares, what it is given, and what it must answer.

A method is cross-entropy between a target q and a prediction p; methods differ in where q comes
from. One that needs a clustering says so in `needs`; the clustering itself is data, made by
`cluster.py` (perhaps on another machine), and the method only takes the result in by `adopt`.
All state lives in parameters and persistent buffers, so the state dict is the whole truth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from deepclust.clustering.whiten import Whitening
from deepclust.models.backbone import Backbone


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, on its device; labels are -1 where nobody gave one."""

    ids: Int64[Tensor, " b"]
    images: Float[Tensor, "b 3 h w"]
    targets: Int64[Tensor, "heads b"]


@dataclass(frozen=True)
class Targets:
    """An immutable round: assignments (memory-mapped), centroids, and what they were made with.

    `kept` marks the clusters whose id continues a cluster of the round before (head policy
    `match`); None means that no id does.
    """

    round: int
    ids: Int32[np.ndarray, "heads n"]
    centroids: Float[np.ndarray, "heads k d"]
    whitening: Whitening | None
    kept: Bool[np.ndarray, " k"] | None


class Method(nn.Module, ABC):
    """A pretraining method. `forward` is the loss, so that DDP's hooks fire."""

    backbone: Backbone

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses; `"loss"` is the one that is minimised."""

    @abstractmethod
    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """The features that are clustered."""

    @abstractmethod
    def adopt(self, targets: Targets, seed: int) -> Bool[Tensor, " k"]:
        """Take a round in; returns the rows of the head that are new."""

    @abstractmethod
    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimizer: `"body"` and `"head"` (empty when the head does not learn)."""
