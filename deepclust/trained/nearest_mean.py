"""The nearest class mean: the classifier of a backbone that has learnt no classes itself.

The mean of a class is that of its labelled rows, each of length one (`class_prototypes`). The mean
of these means is taken off means and rows alike, since what all classes share tells none of them
apart. An image takes the class of the largest cosine. Rows of length one about a centre are those
of SimpleShot (Wang et al. 2019, arXiv:1911.04623). Its centre is of all training rows, and this one
needs no image but the labelled ones.

Probabilities are the softmax of the cosines over a temperature. It is the one at which the labelled
rows are most probable, each by a mean of its class without itself (Guo et al. 2017,
arXiv:1706.04599, section 4.2, with rows left out in place of a validation set). Where no class has
two rows it is TEMPERATURE.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int32
from torch import Tensor, nn

from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.class_prototypes import SMALLEST, class_prototypes
from deepclust.errors import DataError
from deepclust.methods.base import Batch, Method, Output, Setting
from deepclust.models import Backbone
from deepclust.recipe import Recipe
from deepclust.recipe.sections import MethodSection
from deepclust.world import ALONE

TEMPERATURE = 0.1  # that of cosines in SwAV and SUAVE
TEMPERATURES = TEMPERATURE * 2.0 ** np.arange(-3, 5, 0.25)  # that are tried: 0.0125 to 1.3
MOST = 10_000  # rows that are left out in turn


class ClassMeans(nn.Module):
    """Features [b, D] to logits [b, c]: their products with c class means [c, D] about a centre.

    Features are made rows of length one. A mean has the length 1 / temperature, or 0.
    """

    centre: Tensor
    means: Tensor

    def __init__(self, centre: Float32[Tensor, " D"], means: Float32[Tensor, "c D"]) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("means", means)

    def forward(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b c"]:
        """Return the logits; a row of zeros is equally far from all classes of one length."""
        rows = F.normalize(F.normalize(features.float()) - self.centre)
        return rows @ self.means.T


def class_means(
    rows: Float32[np.ndarray, "m D"], classes: Int32[np.ndarray, " m"], names: list[str]
) -> ClassMeans:
    """Return the classifier of labelled rows and their classes, which are positions in `names`.

    The mean of a single class is not centred, and it is every answer. One that is where the centre
    is has no direction: its cosines are 0. Raises `DataError` naming a class without a row, and
    `NumericalError` naming one whose rows cancel.
    """
    bare = [name for number, name in enumerate(names) if not (classes == number).any()]
    if bare:
        raise DataError(
            f"{len(bare)} classes have no labelled row, the first of them {bare[0]!r}: label an "
            "image of each, or leave the classes out"
        )
    prototypes = class_prototypes(ArrayPoints(rows), classes, names).rows.astype(np.float64)
    centre = prototypes.mean(0) if len(names) > 1 else np.zeros(prototypes.shape[1])
    means = _directions(prototypes - centre)
    scaled = means / fitted_temperature(rows, classes, centre, means)
    return ClassMeans(*(torch.from_numpy(part.astype(np.float32)) for part in (centre, scaled)))


def fitted_temperature(
    rows: Float32[np.ndarray, "m D"],
    classes: Int32[np.ndarray, " m"],
    centre: Float64[np.ndarray, " D"],
    means: Float64[np.ndarray, "c D"],
) -> float:
    """Return the temperature at which rows are most probable by means without them.

    At most MOST rows are looked at, at equal distances, and their means are of these alone.
    """
    step = max(1, -(-len(rows) // MOST))
    units, classes = _directions(rows[::step].astype(np.float64)), classes[::step]
    sums = np.zeros_like(means)
    np.add.at(sums, classes, units)
    several = np.bincount(classes, minlength=len(means))[classes] > 1
    if not several.any():
        return TEMPERATURE
    left, own = units[several], classes[several]
    about, rest = _directions(left - centre), _directions(_directions(sums[own] - left) - centre)
    cosines = about @ means.T
    cosines[np.arange(len(own)), own] = (about * rest).sum(1)
    losses = [_cross_entropy(cosines / each, own) for each in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def _cross_entropy(logits: Float64[np.ndarray, "m c"], classes: Int32[np.ndarray, " m"]) -> float:
    highest = logits.max(1)
    total = np.log(np.exp(logits - highest[:, None]).sum(1)) + highest
    return float((total - logits[np.arange(len(classes)), classes]).mean())


def _directions(rows: Float64[np.ndarray, "m D"]) -> Float64[np.ndarray, "m D"]:
    """Return rows of length one; what has no direction is zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > SMALLEST, rows / np.maximum(norms, SMALLEST), 0.0)


class NearestMeanSection(MethodSection):
    """What a backbone with class means declares: it is asked, and never trained."""

    answers: ClassVar[Literal["nothing", "clusters", "classes"]] = "classes"

    name: Literal["nearest-mean"] = "nearest-mean"

    def chance_loss(self, recipe: Recipe) -> float:
        """Raise: there is no loss."""
        raise NotImplementedError("class means are not trained")


SECTION = NearestMeanSection()


class NearestMean(Method):
    """A trained backbone that answers with the nearest of its class means.

    `names` are the classes of the logits' columns, and `labels` counts the rows behind each mean,
    None where nothing says it.
    """

    def __init__(
        self,
        backbone: Backbone,
        means: ClassMeans,
        names: tuple[str, ...],
        labels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(backbone, Setting(SECTION, None, 0, ALONE, classes=names))
        self.means, self.names, self.labels = means, names, labels

    @classmethod
    def empty(cls, backbone: Backbone, names: tuple[str, ...]) -> NearestMean:
        """Return one whose means are zeros, to load those of a file into."""
        width = backbone.dim
        means = ClassMeans(torch.zeros(width), torch.zeros(len(names), width))
        return cls(backbone, means, names)

    def loss(self, batch: Batch) -> Output:
        """Raise: there is no loss."""
        raise NotImplementedError("class means are not trained")

    def classify(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b c"]:
        """Return the logits over the classes."""
        logits: Tensor = self.means(features)
        return logits
