"""The Method contract: what a method is given, what it must compute, and when it is called.

Almost every method is cross-entropy between a target q and a prediction p. Methods differ in where
q comes from. `config.py` declares, as data, what a method asks of the data and of a round
(`MethodSection`). The class here computes.

The training loop calls, in this order and in plain sight: `before_step`, `forward` (that is `loss`
and the terms), `frozen`, the optimizers, `after_step`. What depends on time is a function of
`batch.now`, never a counter. All state is in parameters and persistent buffers, so the state dict
is all that a checkpoint needs. No loss may read running statistics of a batch norm: on several
ranks they differ, and a checkpoint has those of rank 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from deepclust.clustering.whiten import Whitening
from deepclust.methods.terms.term import Term, build_terms
from deepclust.models.backbone import Backbone
from deepclust.recipe.sections import ClusterSection, MethodSection, TermSection
from deepclust.world import Owned, World


@dataclass(frozen=True)
class Setting:
    """What a method is built from: its section, the clustering that it will get, its rank.

    `samples` are those of the index, for what has a row for each, and 0 where none is trained on.
    `classes` are the names of the seeds' classes, by their numbers.
    """

    config: MethodSection
    cluster: ClusterSection | None
    seed: int
    world: World
    terms: Mapping[str, TermSection] = field(default_factory=dict)
    samples: int = 0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Now:
    """The time at the beginning of a step: steps done, epochs done, and their share of the run."""

    step: int = 0
    epochs: float = 0.0
    progress: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, on its device.

    Without a clustering there are 0 heads.
    """

    sample_ids: Int64[Tensor, " b"]  # on the CPU, page-locked for a GPU
    crops: tuple[Float[Tensor, "b 3 s s"], ...]
    turns: Int64[Tensor, " b"]  # by 90 degrees, of all turned crops of an image
    pseudo_labels: Int64[Tensor, "heads b"]
    labels: Int64[Tensor, " b"]  # class of the seeds, -1 for unknown, and mixtures of two
    now: Now = Now()
    soft: Float[Tensor, "b classes"] | None = None  # with `seeds.mix`: shares of the classes

    @property
    def labelled(self) -> Bool[Tensor, " b"]:
        """Which rows have a label, or a mixture of two: those of `soft` are 0 elsewhere."""
        return self.labels >= 0 if self.soft is None else self.soft.sum(1) > 0


@dataclass(frozen=True)
class Output:
    """What a method computes of a batch: the loss, and other scalars for the metrics.

    `features` (before the last activation) and `logits` are those of the first crop. They are None
    where a method has none, and are what terms work on.
    """

    loss: Float[Tensor, ""]
    told: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    features: Float[Tensor, "b D"] | None = None
    logits: Float[Tensor, "b k"] | None = None


@dataclass(frozen=True)
class Targets:
    """An immutable round: assignments, centroids, and what they were made with.

    `kept` marks the clusters whose id continues a cluster of the round before; None means that no
    id does.
    """

    round: int
    file: Path
    assignments: Int32[np.ndarray, "heads n"]  # memory-mapped
    centroids: Float[np.ndarray, "heads k d"]
    whitening: Whitening | None
    kept: Bool[np.ndarray, "heads k"] | None


@runtime_checkable
class Sharded(Protocol):
    """A module whose parameters or buffers are slices, one on each rank."""

    def owned(self) -> dict[str, Owned]:
        """Return this rank's slice of each tensor, by its name in the module."""


class Method(nn.Module, ABC):
    """A pretraining method: a backbone, and what it takes to train it."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        self.backbone = backbone
        self.world = setting.world
        self.trunk_name = setting.config.trunk
        self.terms = build_terms(backbone.dim, setting)

    @abstractmethod
    def loss(self, batch: Batch) -> Output:
        """Return the loss of a batch: the mean over this rank's samples."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalars: `"loss"`, terms included, is minimised, the others are reported.

        This is what is called, so that the hooks of DistributedDataParallel fire.
        """
        for term in self.terms.values():
            assert isinstance(term, Term)
            term.before_loss()
        output = self.loss(batch)
        total, named = output.loss, dict(output.told)
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            value = term(self, batch, output)
            total = total + term.weight_at(batch.now) * value
            named[f"term_{name}"] = value.detach()
        return {"loss": total, **named}

    @property
    def trunk(self) -> Backbone:
        """The backbone that is clustered, exported and evaluated, as the section declares."""
        trunk = self.get_submodule(self.trunk_name)
        assert isinstance(trunk, Backbone)
        return trunk

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Return what is evaluated: features, before the last ReLU if the backbone ends in one."""
        features: Tensor = self.trunk(images)
        return features

    def clustered(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the rows that a round is made of: by default the features."""
        return self.embed(images)

    def scorer(self) -> dict[str, Tensor]:
        """Return "weight" [heads, k, d] and "bias" [heads, k], which score the rows of a round.

        Only of a method whose rounds are of kind `sinkhorn`. Logits are row . weight + bias.
        """
        raise NotImplementedError(f"{type(self).__name__} scores no rows")

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the method's own classes, from features of its backbone."""
        raise NotImplementedError(f"{type(self).__name__} has no classes")

    def answer(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return what the run is evaluated and exported by: logits, from features of the trunk.

        By default those of `classify`. A method with a teacher may ask the teacher's head.
        """
        return self.classify(features)

    def adopt(self, targets: Targets, seed: int) -> dict[str, Bool[Tensor, " rows"]]:
        """Take a round in.

        Return, by parameter name, which rows were renewed.

        The optimizer forgets the state of those rows. Draws depend on (seed, round) only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not train on a clustering")

    def renewed(self) -> tuple[str, ...]:
        """Return the modules that rounds renew: they have a rate and momentum apart."""
        return ()

    def before_step(self, batch: Batch) -> None:
        """Prepare a step, before its forward pass; once for each part of a batch."""

    def frozen(self, now: Now) -> Iterable[str]:
        """Return the names of parameters that keep still in this step."""
        return ()

    def after_step(self, now: Now) -> None:
        """Follow the optimizers' step, for example with a teacher's moving average."""

    def owned(self) -> dict[str, Owned]:
        """Return the tensors of which each rank has a slice, by name: those of all submodules.

        DistributedDataParallel ignores them, and every rank saves its slice.
        """
        return {
            f"{path}.{name}": part
            for path, module in self.named_modules()
            if path and isinstance(module, Sharded)
            for name, part in module.owned().items()
        }
