"""Suave: SwAV whose prototypes are classes, because labelled images predict their label.

Fini et al., "Semi-supervised Learning Made Simple with Self-supervised Clustering", CVPR 2023,
section 3. Written from the formulas.

    loss = mean over all rows of CE(q, softmax(z . c / T))

q of an unlabelled row is SwAV's. A labelled row has its class as q in every pair of crops, so all
its crops predict the label. Only unlabelled rows are in Sinkhorn-Knopp. The queue keeps a
labelled row as zeros and leaves it out, so it holds fewer rows than its size.

Sinkhorn-Knopp fills every prototype up to its prior. With a uniform prior (the paper) it fills the
prototype of a class that hardly occurs, or a free one, with other images by force. `method.prior`
may be other shares. "learned" is a moving average of the mean prediction of the unlabelled rows of
all ranks, uniform at first. Predictions and not assignments: these already have the prior, so their
mean would never leave it. It follows what labels teach, and balances against the average over many
steps, so it still keeps a step from giving all images one prototype. It does not keep a run from
drifting there slowly. `entropy_of_mean` in the metrics shows that.

Where this differs. Labelled images have as many crops as all others, where the reference gives them
one. `seeds.crop_scale` and `seeds.colour` make them lighter, as there. The reference adds mixed
copies of labelled images (mixup, cutmix). `seeds.mix` mixes the images themselves, with a chance of
one half for equal numbers of both. The reference also mixes unlabelled ones, and repeats labelled
images among them. Its smoothing is over all prototypes, here over the classes (the same without
free prototypes).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Now, Setting
from deepclust.methods.parts.centre import Centre
from deepclust.methods.parts.labelled import class_prototypes, labelled
from deepclust.methods.suave.config import Config
from deepclust.methods.swav.method import Method as Swav
from deepclust.models.backbone import Backbone


class Method(Swav):
    """SwAV's parts, with class prototypes first, and the prior [k]: learned, given, or none."""

    given: Tensor | None

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.classes, self.smoothing = len(setting.classes), config.smoothing
        k = self.classes + config.free
        self.learned: Centre | None = None
        if config.prior == "learned":
            self.learned = Centre(k, config.prior_momentum, setting.world)
            self.learned.value.fill_(1 / k)
        self.register_buffer("given", given_prior(config, self.classes), persistent=False)

    def width(self, setting: Setting) -> int:
        """Return the number of prototypes: the classes, and the free ones."""
        return class_prototypes(setting)

    def prior(self) -> Float[Tensor, " k"] | None:
        """Return the shares that Sinkhorn-Knopp gives the prototypes, None for equal ones."""
        return self.given if self.learned is None else self.learned.value

    # how many rows have a label is not known to a compiler, and Sinkhorn talks to all ranks
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def targets(
        self, scores: Float[Tensor, "crops b k"], rows: Float[Tensor, "crops b d"], batch: Batch
    ) -> Float[Tensor, "crops b k"]:
        """Return the classes of labelled rows, and assignments of the others among themselves."""
        unknown = ~batch.labelled
        past = self.past(batch.now, rows.shape[1])
        targets = torch.zeros_like(scores)
        at = unknown.nonzero()[:, 0]  # a GPU is waited for once, as by each mask
        targets.index_copy_(1, at, self.assign(scores.index_select(1, at), past))
        self.projected = rows * unknown[:, None]
        if self.learned is not None:
            self.learned.note((scores / self.config.temperature).softmax(2), unknown)
        return labelled(targets, batch, classes=self.classes, smoothing=self.smoothing)

    def past(self, now: Now, b: int) -> Float[Tensor, "crops r d"]:
        """Return this rank's share of the queue without its labelled rows, which are zeros."""
        rows = super().past(now, b)
        return rows[:, rows.any(2).all(0)]

    def after_step(self, now: Now) -> None:
        """Fill the queue, and let the learned prior follow this step's predictions."""
        super().after_step(now)
        if self.learned is not None:
            self.learned.follow()


def given_prior(config: Config, classes: int) -> Float[Tensor, " k"] | None:
    """Return the recipe's shares of the prototypes, scaled to sum 1, or None where it has none.

    Raises RecipeError unless there is one for every prototype.
    """
    if isinstance(config.prior, str):
        return None
    k = classes + config.free
    if len(config.prior) != k:
        raise RecipeError(
            f"method.prior: {len(config.prior)} shares for {k} prototypes ({classes} classes of "
            f"the seeds, {config.free} free): give {k}, the free ones last"
        )
    shares = torch.tensor(config.prior)
    return shares / shares.sum()
