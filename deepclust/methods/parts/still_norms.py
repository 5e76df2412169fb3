"""Forward passes that leave the running statistics of batch norms alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def still_norms(module: nn.Module) -> Iterator[None]:
    """Let the norms that are in training norm by their batch, without taking note of it.

    A norm that keeps no statistics does just that, so the switch of torch is turned off for a
    while. Norms in eval mode read their statistics as before.
    """
    norms = [
        one
        for one in module.modules()
        if isinstance(one, _NormBase) and one.training and one.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
