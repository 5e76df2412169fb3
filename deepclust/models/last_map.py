"""The last map of a convolutional network: the one whose mean over places is its features.

Class activation maps need it. It is looked for by running the network, not by its name, so any
network that pools its last map will do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deepclust.models.backbone import Backbone

PROBES = 4  # images by which the map is recognised
CLOSE = 1e-3  # relative difference that rounding explains


class LastMap:
    """Keeps the last map of one pass of a backbone, when asked to.

    Raises ValueError for a backbone whose features are not the mean of a map.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.module: Any
        self.module, self.is_plain = find_last_map(backbone)
        # on the module and not here, so that a copy of the backbone keeps its own
        self.module.last_map = ()
        self.module.register_forward_hook(_keep)

    def keep_next(self) -> None:
        """Keep the map of the next pass, and of that pass alone."""
        self.module.last_map = None

    def take(self, features: Float[Tensor, "b D"]) -> Float[Tensor, "b D h w"]:
        """Return the maps of the first b images of the kept pass, in float32, and drop the rest.

        Their means over places are the features. Where a norm follows the pooling (conv4), it is
        applied at every place: its slope is that of the features over the pooled maps.
        """
        kept = self.module.last_map
        self.module.last_map = ()
        assert isinstance(kept, Tensor), "no pass was kept"
        maps = kept[: len(features)].float()
        if self.is_plain:
            return maps
        pooled = maps.mean((2, 3))
        slopes = slopes_of(features.detach(), pooled.detach())[:, None, None]
        return features[:, :, None, None] + slopes * (maps - pooled[:, :, None, None])


def _keep(module: Any, _: object, output: Tensor) -> None:
    if module.last_map is None:  # not one of a later pass: other crops, or those of a term
        module.last_map = output


def slopes_of(features: Float[Tensor, "b D"], pooled: Float[Tensor, "b D"]) -> Float[Tensor, " D"]:
    """Return by how much each feature rises with its pooled map, over a batch: 0 for a dead one."""
    x, y = pooled - pooled.mean(0), features - features.mean(0)
    return (x * y).sum(0) / x.square().sum(0).clamp_min(1e-20)


@torch.no_grad()
def find_last_map(backbone: Backbone) -> tuple[nn.Module, bool]:
    """Return the module that gives the last map, and whether its mean is the features as it is.

    Else a norm of single channels follows. Raises ValueError where there is no such module.
    """
    passed: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and max(output.shape[2:]) > 1:
            passed.append((module, output))

    handles = [module.register_forward_hook(note) for module in backbone.net.modules()]
    # as in training, where a norm after the pooling has batch statistics; none is changed
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    try:
        features = torch.func.functional_call(backbone, buffers, (_probes(backbone),)).float()
    finally:
        for handle in handles:
            handle.remove()
    wide = [(m, output) for m, output in passed if output.shape[1] == backbone.dim]
    if not wide:
        raise ValueError(
            f"{backbone.name} has no map of its features at {backbone.image_size} pixels"
        )
    module, output = wide[-1]
    pooled = output.float().mean((2, 3))
    close = partial(torch.allclose, rtol=CLOSE, atol=CLOSE * float(features.std()))
    if close(features, pooled):
        return module, True
    spread = pooled - pooled.mean(0)
    if close(features - features.mean(0), slopes_of(features, pooled) * spread):
        return module, False
    raise ValueError(f"the features of {backbone.name} are not the mean of its last map")


def _probes(backbone: Backbone) -> Float[Tensor, "b 3 s s"]:
    """Return images of different colours, on the device of the network."""
    random = torch.Generator().manual_seed(0)
    size, first = backbone.image_size, next(backbone.parameters())
    colours = torch.randn(PROBES, 3, 1, 1, generator=random)
    return (colours + torch.randn(PROBES, 3, size, size, generator=random)).to(first)
