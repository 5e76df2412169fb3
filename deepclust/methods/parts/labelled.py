"""The one rule of semi-supervised clustering: a labelled row takes its class as its target.

So labelled and unlabelled rows are in one cross-entropy, and the weight of the labels is their
share of the rows (`seeds.share`). This is Suave and Daino: Fini et al., "Semi-supervised Learning
Made Simple with Self-supervised Clustering", CVPR 2023, section 3. Prototype k is class k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Setting
from deepclust.methods.parts.class_prototypes import ClassPrototypes


def labelled(
    targets: Float[Tensor, "*crops b k"],
    batch: Batch,
    *,
    classes: int,
    smoothing: float,
) -> Float[Tensor, "*crops b k"]:
    """Return targets in which every row with a label has its class, whatever it was.

    A row that is mixed of two images has the two classes, with the images' shares.
    The share `smoothing` is spread evenly over the first `classes` columns. Free columns get none:
    what has a label is of no other class.
    """
    k = targets.shape[-1]
    if batch.soft is None:
        rows = F.one_hot(batch.labels.clamp(min=0), k)
    else:
        rows = F.pad(batch.soft, (0, k - classes))
    given = (1 - smoothing) * rows.to(targets)
    given[:, :classes] += smoothing / classes
    return torch.where(batch.labelled[:, None], given, targets)


def class_prototypes(setting: Setting) -> int:
    """Return the number of prototypes: those of the classes, and the free ones.

    Raises RecipeError where there are fewer than two, since one alone is the answer for all images.
    """
    config, classes = setting.config, len(setting.classes)
    assert isinstance(config, ClassPrototypes)
    if classes == 0:
        raise RecipeError(
            f"seeds.labels: {config.name} has a prototype for each class, and no class is known: "
            "set seeds.labels to a table with labels, or to shards that have them"
        )
    if classes + config.free < 2:
        raise RecipeError(
            f"method.free: the only class of the seeds is {setting.classes[0]}, and with one "
            "prototype all images have one answer: set method.free=1, or label other classes"
        )
    return classes + config.free
