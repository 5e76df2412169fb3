"""Multinomial logistic regression on a device: scikit-learn's problem, solved by torch's L-BFGS.

The objective is the mean cross-entropy plus |W|^2 / (2 n C), without a penalty on the intercept, as
in scikit-learn's `LogisticRegression`. Products are true float32, sums of tiles are float64. The
logits exist for a tile of rows only, so 1.28M rows of 1,000 classes need no n x c matrix. There are
two passes over the rows an iteration, 10^13 operations each for 2,048 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from deepclust.clustering.precision import full_precision

LOGITS = 2**26  # held at a time
HISTORY = 10


@dataclass
class Fit:
    """Weights [d + 1, c], of which the last row is the intercept, and whether they converged."""

    weights: Float32[Tensor, "e c"]
    converged: bool = False

    def top1(self, x: Float32[Tensor, "n d"], y: Int64[Tensor, " n"]) -> float:
        """Return the share of rows whose likeliest class is theirs."""
        return float(self.right(x, y).sum()) / len(x)

    def right(self, x: Float32[Tensor, "n d"], y: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which rows' likeliest class is theirs."""
        with full_precision():
            tiles = [_logits(self.weights, x[t]).argmax(1) == y[t] for t in self._tiles(x)]
        return torch.cat(tiles)

    def _tiles(self, x: Tensor) -> list[slice]:
        size = max(1, LOGITS // self.weights.shape[1])
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def objective(self, x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Return mean cross-entropy plus penalty, and its gradient."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        gradient = torch.zeros_like(self.weights, dtype=torch.float64)
        for tile in self._tiles(x):
            rows, logs = x[tile], torch.log_softmax(_logits(self.weights, x[tile]), 1)
            total -= logs.gather(1, y[tile, None]).double().sum()
            apart = logs.exp_()
            apart.scatter_add_(1, y[tile, None], apart.new_full((len(rows), 1), -1.0))
            gradient[:-1] += rows.T @ apart
            gradient[-1] += apart.sum(0)
        return self._penalised(total, gradient, len(x), strength)

    def _penalised(
        self, total: Tensor, gradient: Tensor, n: int, strength: float
    ) -> tuple[Tensor, Tensor]:
        """Return the mean over n rows of a loss and of its gradient, with the penalty."""
        slopes = self.weights[:-1].double()
        penalty = 1 / (strength * n)
        gradient /= n
        gradient[:-1] += penalty * slopes
        return total / n + 0.5 * penalty * slopes.square().sum(), gradient

    def run(self, x: Tensor, y: Tensor, strength: float, tolerance: float, most: int) -> Fit:
        """Go on from the present weights until no gradient exceeds `tolerance`; return itself."""
        weights = self.weights.requires_grad_()
        solver = torch.optim.LBFGS(
            [weights], max_iter=most, max_eval=2 * most, tolerance_grad=tolerance,
            tolerance_change=0.0, history_size=HISTORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        @torch.no_grad()
        def closure() -> Tensor:
            loss, gradient = self.objective(x, y, strength)
            weights.grad = gradient.to(weights.dtype)
            return loss

        with full_precision():
            solver.step(closure)  # type: ignore[no-untyped-call]
            weights.requires_grad_(False)
            _, gradient = self.objective(x, y, strength)
        self.converged = bool(gradient.abs().max() <= tolerance)
        return self


def _logits(weights: Tensor, x: Tensor) -> Float32[Tensor, "m c"]:
    return torch.addmm(weights[-1], x, weights[:-1])
