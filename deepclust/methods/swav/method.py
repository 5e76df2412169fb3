"""SwAV: predict the assignment of one crop to prototypes from another crop of the image.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
2020, eq. 1 to 5 and appendix A. The reference implementation is facebookresearch/swav.

    loss = mean over assigning crops i and other crops v of CE(q_i, softmax(z_v . c / T))

The two full-size crops assign, and all crops predict. q is Sinkhorn-Knopp of z . c / epsilon over
all ranks' rows, and the rows of a queue if there is one. Nothing is clustered between steps.

The reference fills its queue from the epoch on in which it is used, and uses it once it is full.
Here it is filled from the first step on, so it is full when that epoch begins.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.clustering.sinkhorn import sinkhorn
from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.parts.monitors import prototypes_used, spread, target_entropies
from deepclust.methods.parts.multi_crop import by_crop, each_size, swapped
from deepclust.methods.parts.projection import projection
from deepclust.methods.parts.prototypes import Prototypes
from deepclust.methods.parts.queue import Queue
from deepclust.methods.swav.config import Config, SwappedSection
from deepclust.models.backbone import Backbone

ASSIGNING = 2  # crops of an image that give assignments: the full-size ones


class Method(base.Method):
    """Backbone, projection head, prototypes, and a queue [queue, 2 * out] if wanted."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, SwappedSection)
        self.config = config
        self.projection = projection([backbone.dim, config.hidden, config.out], setting.seed)
        self.prototypes = Prototypes(config.out, self.width(setting), seed=setting.seed)
        self.queue: Queue | None = None
        if config.queue:
            self.queue = Queue(config.queue, ASSIGNING * config.out, setting.world)
        self.projected: Tensor | None = None  # of this step, for the queue

    def width(self, setting: Setting) -> int:
        """Return the number of prototypes."""
        assert isinstance(setting.config, Config)
        return setting.config.prototypes

    def prior(self) -> Float[Tensor, " k"] | None:
        """Return the share of images that each prototype shall have, None for equal ones."""
        return None

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of every crop to the assignments of the others."""
        features = each_size(batch.crops, self.backbone)
        projected = F.normalize(self.projection(self.backbone.activation(features)).float())
        scores = by_crop(self.prototypes(projected), len(batch.crops))
        assigning = by_crop(projected, len(batch.crops))[:ASSIGNING].detach()
        targets = self.targets(scores[:ASSIGNING].detach(), assigning, batch)
        signs = {
            **spread(assigning[0]),
            **target_entropies(targets[0], self.world),
            **prototypes_used(scores[0]),
        }
        b, loss = len(batch.sample_ids), swapped(targets, scores / self.config.temperature)
        return Output(loss, signs, features[:b], scores[0] / self.config.temperature)

    def targets(
        self, scores: Float[Tensor, "crops b k"], rows: Float[Tensor, "crops b d"], batch: Batch
    ) -> Float[Tensor, "crops b k"]:
        """Return what other crops shall predict, from the rows' scores; keep rows for the queue."""
        self.projected = rows
        return self.assign(scores, self.past(batch.now, rows.shape[1]))

    def past(self, now: Now, b: int) -> Float[Tensor, "crops r d"]:
        """Return this rank's share of the queue, empty where it is not used."""
        if self.queue is None or now.epochs < self.config.queue_from:
            return torch.empty(ASSIGNING, 0, self.config.out, device=self.prototypes.weight.device)
        world = self.world
        filled = self.queue.filled(now.step, b * world.size)
        mine = self.queue.rows[:filled][world.rank :: world.size]
        return mine.view(len(mine), ASSIGNING, self.config.out).transpose(0, 1)

    @torch.no_grad()
    def assign(
        self, scores: Float[Tensor, "crops b k"], past: Float[Tensor, "crops r d"]
    ) -> Float[Tensor, "crops b k"]:
        """Return the assignments of some crops, each balanced over all ranks' rows and the past."""
        config, b, prior = self.config, scores.shape[1], self.prior()
        together = (
            torch.cat([rows, self.prototypes(old)]) for rows, old in zip(scores, past, strict=True)
        )
        return torch.stack(
            [
                sinkhorn(
                    rows / config.epsilon,
                    iterations=config.iterations,
                    prior=prior,
                    world=self.world,
                )[:b]
                for rows in together
            ]
        )

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return logits over the prototypes."""
        projected = self.projection(self.backbone.activation(features))
        scores: Tensor = self.prototypes(F.normalize(projected.float()))
        return scores / self.config.temperature

    def before_step(self, batch: Batch) -> None:
        """Set the prototypes to length one."""
        self.prototypes.normalise()

    def frozen(self, now: Now) -> Iterable[str]:
        """Return the prototypes, at first: they would follow random features."""
        return ("prototypes.weight",) if now.epochs < self.config.freeze else ()

    def after_step(self, now: Now) -> None:
        """Put this step's projections into the queue."""
        if self.queue is not None and self.projected is not None:
            self.queue.push(self.projected.transpose(0, 1).flatten(1), now.step)
        self.projected = None
