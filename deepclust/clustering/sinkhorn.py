"""Sinkhorn-Knopp in the log domain: soft assignments whose rows sum to 1 and columns to a prior.

    Q = diag(e^u) e^S diag(e^v)

S [n, k] are scores over a temperature: SwAV's z.c / eps, SeLa's lambda log p. One iteration scales
the columns to the prior and then the rows to 1 (Cuturi, "Sinkhorn Distances", 2013, algorithm 1;
the order of SwAV, Caron et al. 2020, appendix A). So rows are exact, columns as the iterations go.

Only the column scalings v are kept: a row of Q is softmax(S_i + v). So `sinkhorn` (a batch) and
`balance` (a whole set, tile by tile) are one computation, and n x k numbers are never needed.

Column sums are added in fixed point: integers are exact in any order. So tiles and ranks do not
change a bit, as long as they do not change the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from deepclust.clustering.tiles import do_nothing
from deepclust.errors import NumericalError
from deepclust.world import ALONE, World

Tiles = Callable[[], Iterable[Tensor]]  # yields the scores [m, k] of this rank, anew at each call
CACHED = 2**16  # numbers that are worked on at a time on a CPU
MOST = 2**17  # rows that are added in float64
UNIT = 2.0**35  # of the fixed point: 2^28 rows fit, and a sum of 1 / k is right to 1e-7 or better


@dataclass(frozen=True)
class Balance:
    """The column scalings of a whole set, and how well the prior is met with them.

    `error` is the largest relative difference of a column's sum from its prior, before the last
    change of the scalings. `iterations` counts the changes.
    """

    scalings: Float64[Tensor, " k"]
    iterations: int
    error: float

    def soft(self, scores: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """Return rows of Q, each of sum 1."""
        return _rows(scores, self.scalings)

    def hard(self, scores: Float[Tensor, "m k"]) -> Int64[Tensor, " m"]:
        """Return the largest column of each row of Q: only nearly balanced (SeLa's labels)."""
        return (_wide(scores) + self.scalings.to(_wide(scores))).argmax(1)


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]  # it talks to all ranks
@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "b k"],
    *,
    iterations: int = 3,
    prior: Float[Tensor, " k"] | None = None,
    world: World = ALONE,
) -> Float[Tensor, "b k"]:
    """Return soft assignments of a batch whose rows are spread over the ranks; nothing waits.

    `prior` is what the columns' shares shall be (uniform if None). Ranks may have unequal numbers
    of rows, also none.
    """
    log_prior = _log(prior, scores.shape[1], scores.device)

    def tiles() -> Iterable[Tensor]:
        return (scores,)

    scalings = _first(tiles, log_prior, world)
    for _ in range(iterations - 1):
        scalings = _next(scalings, _shares(tiles, scalings, world), log_prior)
    return _rows(scores, scalings)


@torch.no_grad()
def balance(
    tiles: Tiles,
    k: int,
    *,
    iterations: int = 1000,
    tolerance: float = 0.0,
    prior: Float[Tensor, " k"] | None = None,
    world: World = ALONE,
    alive: Callable[[], None] = do_nothing,
) -> Balance:
    """Return the column scalings of a whole set, whose rows are spread over the ranks.

    `tiles()` yields this rank's scores, tile by tile. It is called `iterations` + 2 times at most,
    and `alive` after each. It ends when every column's sum is within `tolerance` (relative) of its
    prior. (SeLa's code stops when the sum of |c / c' - 1| over all rows is below 0.1.)

    Raises `NumericalError` for scores that are not finite.
    """
    log_prior = _log(prior, k, world.device)
    scalings = _first(tiles, log_prior, world, checked=True)
    alive()
    for done in range(1, iterations + 1):
        shares = _shares(tiles, scalings, world)
        alive()
        wanted = log_prior.exp()
        error = float(((shares - wanted).abs() / wanted)[wanted > 0].max())
        if error <= tolerance or done == iterations:
            break
        scalings = _next(scalings, shares, log_prior)
    return Balance(scalings, done, error)


def _log(prior: Tensor | None, k: int, device: torch.device) -> Float64[Tensor, " k"]:
    """Return the logarithm of the prior, scaled to sum 1."""
    if prior is None:
        return torch.full((k,), 1 / k, dtype=torch.float64, device=device).log()
    wide = prior.to(device, torch.float64)
    return (wide / wide.sum()).log()


def _first(
    tiles: Tiles, log_prior: Float64[Tensor, " k"], world: World, *, checked: bool = False
) -> Float64[Tensor, " k"]:
    """Return the scalings of the first iteration, from rows as they are.

    The sums are those of e^(S - largest of the column), since e^S can leave every range.
    """
    lowest = torch.finfo(torch.float32).min
    largest = torch.full_like(log_prior, lowest)
    for tile in tiles():
        if len(tile):
            largest = torch.maximum(largest, _wide(tile).amax(0).double())
    largest = world.all_reduce_max(largest.nan_to_num_(torch.inf, torch.inf, lowest))
    if checked and not bool(torch.isfinite(largest).all()):
        raise NumericalError(
            f"the scores of cluster {int((~torch.isfinite(largest)).nonzero()[0])} are not finite: "
            "the network has diverged. Resume with a smaller train.lr, or more train.warmup"
        )
    sums = torch.zeros_like(log_prior, dtype=torch.int64)
    for tile in tiles():
        for part in _parts(tile):
            sums += _fixed((_wide(part) - largest.to(_wide(part))).exp_())
    return log_prior - largest - _shares_of(sums, world).log()


def _shares(tiles: Tiles, scalings: Float64[Tensor, " k"], world: World) -> Float64[Tensor, " k"]:
    """Return each column's share of the sum of all rows, as they are after the row step.

    A share is never below prior / n, since a row had at most the whole of a column.
    """
    sums = torch.zeros_like(scalings, dtype=torch.int64)
    for tile in tiles():
        for part in _parts(tile):
            sums += _fixed(_rows(part, scalings))
    return _shares_of(sums, world)


def _next(
    scalings: Float64[Tensor, " k"],
    shares: Float64[Tensor, " k"],
    log_prior: Float64[Tensor, " k"],
) -> Float64[Tensor, " k"]:
    """Return scalings with which the columns would meet the prior, were the rows to stay."""
    return scalings + log_prior - shares.log()


def _shares_of(sums: Int64[Tensor, " k"], world: World) -> Float64[Tensor, " k"]:
    """Return sums over all ranks as shares; a column without any has one unit, to stay finite."""
    total = world.all_reduce(sums).clamp(min=1).double()
    return total / total.sum()


def _fixed(tile: Float[Tensor, "m k"]) -> Int64[Tensor, " k"]:
    """Return the column sums of at most MOST numbers in [0, 1] each, in units of 1 / UNIT.

    These are integers below 2^53, so float64 adds them exactly too.
    """
    return tile.double().mul_(UNIT).round_().sum(0).long()


def _parts(tile: Float[Tensor, "m k"]) -> Iterable[Tensor]:
    """Return a tile in parts, on a CPU so small that what is computed of them stays in its cache.

    New memory for whole tiles would cost most of the time.
    """
    size = max(1, CACHED // tile.shape[1]) if tile.device.type == "cpu" else MOST
    return tile.split(min(size, MOST))


def _rows(scores: Tensor, scalings: Float64[Tensor, " k"]) -> Tensor:
    """Return rows of Q: the row step of an iteration is a softmax."""
    wide = _wide(scores)
    return (wide + scalings.to(wide)).softmax(1)


def _wide(scores: Tensor) -> Tensor:
    """Return float32 or float64: scores in half precision have no digits left for sums."""
    return scores if scores.dtype == torch.float64 else scores.float()
