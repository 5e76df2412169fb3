"""DINO: a student predicts, from every crop, what a teacher says of another crop of the image.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, eq. 1 to 4
and algorithm 1. The reference implementation is facebookresearch/dino.

    loss = mean over the teacher's crops i and other crops v of
           CE(softmax((t_i - c) / T_t), softmax(s_v / T_s))

The teacher is a moving average of the student and sees the full-size crops. It does not collapse
since the centre c keeps one answer from winning, and T_t < T_s keeps answers from being uniform.
The teacher's temperature rises with the time in epochs, in the reference once an epoch. The
reference cuts the initial weights at +-2, here they are cut at two deviations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from deepclust.methods import base
from deepclust.methods.base import Batch, Now, Output, Setting
from deepclust.methods.dino.config import Config, TaughtSection
from deepclust.methods.dino.head import Head
from deepclust.methods.parts.centre import Centre
from deepclust.methods.parts.monitors import prototypes_used, spread, target_entropies
from deepclust.methods.parts.multi_crop import by_crop, each_size, swapped
from deepclust.methods.parts.teacher import Teacher, cosine_momentum
from deepclust.models.backbone import Backbone

TAUGHT = 2  # crops of an image that the teacher sees: the full-size ones


class Method(base.Method):
    """Backbone and head, the teacher's copies of both, and the centre of its outputs."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, TaughtSection)
        self.config = config
        width = self.width(setting)
        self.head = Head(
            backbone.dim, config.hidden, config.bottleneck, width,
            unit_last=config.unit_last, seed=setting.seed,
        )  # fmt: skip
        self.teacher = Teacher(backbone=backbone, head=self.head)
        self.centre = Centre(width, config.centre_momentum, setting.world)

    def width(self, setting: Setting) -> int:
        """Return the number of prototypes."""
        assert isinstance(setting.config, Config)
        return setting.config.prototypes

    def loss(self, batch: Batch) -> Output:
        """Return the mean cross-entropy of every crop to the teacher's view of the others."""
        features = each_size(batch.crops, self.backbone)
        projected = self.head.project(self.backbone.activation(features))
        scores = by_crop(self.head.last(projected), len(batch.crops))
        logits = scores / self.config.student_temperature
        taught = self.teach(batch.crops[:TAUGHT])
        targets = self.targets(taught, batch)
        b = len(batch.sample_ids)
        signs = {
            **spread(projected[:b]),
            **target_entropies(targets[0], self.world),
            **prototypes_used(taught[0]),
        }
        return Output(swapped(targets, logits), signs, features[:b], logits[0])

    @torch.no_grad()
    def teach(self, crops: tuple[Tensor, ...]) -> Float[Tensor, "crops b k"]:
        """Return the teacher's scores of some crops of one size."""
        backbone, head = self.trunk, self.teacher.get_submodule("head")
        return by_crop(head(backbone.activation(backbone(torch.cat(crops)))), len(crops))

    def targets(self, taught: Float[Tensor, "crops b k"], batch: Batch) -> Tensor:
        """Return what other crops shall predict [crops, b, k]; note the outputs for the centre."""
        self.centre.note(taught)  # which moves after the step
        return self.sharpen(taught, batch.now)

    def sharpen(self, taught: Float[Tensor, "crops b k"], now: Now) -> Float[Tensor, "crops b k"]:
        """Return the teacher's answers, centred and sharpened."""
        return ((taught - self.centre.value) / self.teacher_temperature(now)).softmax(2)

    def teacher_temperature(self, now: Now) -> float:
        """Return the temperature of the teacher's answers, which may have a warm-up."""
        config = self.config
        share = min(1.0, now.epochs / config.teacher_warmup) if config.teacher_warmup else 1.0
        start = config.teacher_temperature_start
        return start + share * (config.teacher_temperature - start)

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return the student's logits."""
        logits: Tensor = self.head(self.backbone.activation(features))
        return logits / self.config.student_temperature

    def answer(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b k"]:
        """Return the teacher's logits, from features of its backbone, which is what is exported.

        They are without the centre, and at the student's temperature.
        """
        logits: Tensor = self.teacher.get_submodule("head")(self.trunk.activation(features))
        return logits / self.config.student_temperature

    def frozen(self, now: Now) -> Iterable[str]:
        """Return the last layer, at first."""
        if now.epochs >= self.config.freeze:
            return ()
        return (f"head.last.{name}" for name, _ in self.head.last.named_parameters())

    def after_step(self, now: Now) -> None:
        """Let the teacher follow the student, and the centre the teacher's outputs."""
        momentum = cosine_momentum(self.config.momentum, now.progress)
        self.teacher.follow(momentum, backbone=self.backbone, head=self.head)
        self.centre.follow()
