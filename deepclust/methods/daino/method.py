"""Daino: DINO whose prototypes are classes, because labelled images predict their label.

Fini et al., "Semi-supervised Learning Made Simple with Self-supervised Clustering", CVPR 2023,
section 3. Written from the formulas.

    loss = mean over all rows of CE(q, softmax(s / T_s))

q of an unlabelled row is the teacher's answer of another crop, as in DINO. A labelled row has its
class as q in every pair of crops. The centre is that of the unlabelled rows: labels are balanced by
the seeds, and need no centre.

Where this differs. Labelled images have as many crops as all others, and go through the teacher
too, which changes its batch norms' statistics. The reference gives the student alone one lighter
crop (`seeds.crop_scale` and `seeds.colour` make them lighter), and mixes labelled images (mixup, as
`seeds.mix` does). Its smoothing is over all prototypes, here over the classes.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from deepclust.methods.base import Batch, Setting
from deepclust.methods.daino.config import Config
from deepclust.methods.dino.method import Method as Dino
from deepclust.methods.parts.labelled import class_prototypes, labelled
from deepclust.models.backbone import Backbone


class Method(Dino):
    """DINO's parts, with class prototypes first."""

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        config = setting.config
        assert isinstance(config, Config)
        self.classes, self.smoothing = len(setting.classes), config.smoothing

    def width(self, setting: Setting) -> int:
        """Return the number of prototypes: the classes, and the free ones."""
        return class_prototypes(setting)

    def targets(self, taught: Float[Tensor, "crops b k"], batch: Batch) -> Tensor:
        """Return the classes of labelled rows, and the teacher's answers for the others."""
        self.centre.note(taught, ~batch.labelled)
        answers = self.sharpen(taught, batch.now)
        return labelled(answers, batch, classes=self.classes, smoothing=self.smoothing)
