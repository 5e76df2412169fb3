"""Locality: what a network sees of the class that it answers lies in one place of the image.

After a note on clustering and locality penalties by Bansal and Zepeda. A [h, w] are a sample's last
maps, and w[top] the classifier's weights of the class `top` that it is given. The class activation
map is C = sum over channels c of w[top, c] A_c. Its cost is a sum of group norms over four families
of nested half-planes: the first 1, 2, ... columns from the left, those from the right, and rows
from the top and from the bottom. Of maps of equal energy the compact one is the cheapest, wherever
it is.

The note leaves open what follows. The choice of `top` has no gradient. C keeps its sign and is
scaled to length 1, or the network could pay less by smaller maps. One point of length 1 costs
h + w + 2. The term is the cost as a share of that, minus 1. It is 0 for a point, and less than
sqrt(2) - 1 for any map. So the weight does not depend on sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.errors import RecipeError
from deepclust.methods.terms.term import Term as Contract
from deepclust.models.last_map import LastMap
from deepclust.recipe.sections import TermSection

if TYPE_CHECKING:
    from deepclust.methods.base import Batch, Method, Output, Setting

EPS = 1e-12  # of energies: the square root has no slope at 0


class Term(Contract):
    """The mean cost of this rank's class activation maps."""

    def __init__(self, config: TermSection, width: int, setting: Setting) -> None:
        super().__init__(config, width, setting)
        self.last_map: LastMap | None = None
        self.classifier = ""  # its name in the method

    def attach(self, method: Method) -> None:
        """Find the classifier and the last map, or raise RecipeError."""
        self.classifier = find_classifier(method)
        try:
            self.last_map = LastMap(method.backbone)
        except ValueError as error:
            raise RecipeError(
                f"terms.locality: {error}. Leave the term out (null), or choose a backbone that "
                "pools its last map, such as a resnet, a densenet or conv4"
            ) from None

    def before_loss(self) -> None:
        """Keep the last map of the next pass, which is that of the first crop."""
        assert self.last_map is not None, "attach comes first"
        self.last_map.keep_next()

    def forward(self, method: Method, batch: Batch, output: Output) -> Float[Tensor, ""]:
        """Return the cost of the maps of the first crop, as a share, minus 1."""
        assert output.features is not None
        assert self.last_map is not None
        linear = method.get_submodule(self.classifier)
        assert isinstance(linear, nn.Linear)
        features = output.features.float()
        with torch.autocast(features.device.type, enabled=False):
            maps = self.last_map.take(features)
            weight, bias = linear.weight.float(), linear.bias
            top = F.linear(features, weight, bias).argmax(1)
            activation = (maps * weight[top, :, None, None]).sum(1)
            unit = F.normalize(activation.flatten(1)).view_as(activation)
            return half_plane_norms(unit).mean() / (sum(unit.shape[1:]) + 2) - 1


def half_plane_norms(maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Return the sum of the norms of all 2 (h + w) half-planes of each map, in O(h w)."""
    energy = maps.square()
    columns, rows = energy.sum(1), energy.sum(2)
    families = (columns, columns.flip(1), rows, rows.flip(1))
    return torch.stack([(one.cumsum(1) + EPS).sqrt().sum(1) for one in families]).sum(0)


@torch.no_grad()
def find_classifier(method: Method) -> str:
    """Return the name of the linear layer that `Method.classify` is, on features of the backbone.

    Raises RecipeError where it is none: a linear layer is one that gives the same answers.
    """
    dim, device = method.backbone.dim, next(method.parameters()).device
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, dim, generator=random).to(device)
    training = method.training
    answers = method.eval().classify(rows)
    method.train(training)
    for name, layer in method.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.shape == (answers.shape[1], dim):
            given = F.linear(rows, layer.weight, layer.bias)
            if torch.allclose(given.float(), answers.float(), rtol=1e-3, atol=1e-6):
                return str(name)
    raise RecipeError(
        "terms.locality: the method's answers are not those of a linear layer on the backbone's "
        "pooled features, of which class activation maps are made: leave the term out (null), or "
        "choose a method that has one, such as deepcluster with method.head=reset"
    )
