"""DeeperCluster's second classifiers: one for each super-class, with rows sharded over ranks.

Caron et al., "Unsupervised Pre-Training of Image Features on Non-Curated Data", ICCV 2019, eq. 5.
An image has a super-class s (rotation and super-cluster) and a sub-cluster z. Its loss is
-log p(s|x) - log p(z|s,x). Here is the second term: a softmax over the sub-clusters of the true s
alone. At paper scale that is 16 x 80,000 rows of 4096 numbers, 21 GB, and three times that with
gradient and momentum. So every rank owns the same share of z of *every* super-class. The work is
balanced for any batch and any number of ranks. DDP must ignore the parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepclust.world import Owned, World, derive

BLOCK = 1024  # rows that are drawn by one generator
DEVIATION = 0.01  # of a fresh weight, as of every head


class SubHead(nn.Module):
    """weight [S, own, D] and bias [S, own] of S super-classes with k_s sub-clusters each.

    Let W be the ranks, G = W b the rows of a step, and own = ceil(k_s / W) at most. Let e be the
    bytes of a number in the product, 4, or 2 under autocast.

    A rank's weights, gradients and momentum take 12 S own (D + 1) bytes in float32. It is 16 while
    an accumulated gradient is added, or SGD adds weight decay to a copy of it. From forward to
    backward it holds e G (D + own). While it works it takes at most 12 G own + 4 G D + 2 e own D.

    In a step a rank sends (W - 1) / W times the following. Features e G D and ids 16 G are
    gathered. 2 x 4 G and 2 x 8 G are all-reduced for the softmax. Gradients of features, 4 G D, are
    scattered. The weights, their gradients and the logits stay where they are.

    All ranks must give the same number of rows, and call forward and backward together.
    """

    def __init__(self, dim: int, supers: int, subs: int, world: World, *, seed: int) -> None:
        super().__init__()
        self.world = world
        self.range = Owned.of(subs, world, dim=1)
        self.weight = nn.Parameter(torch.empty(supers, self.range.count, dim))
        self.bias = nn.Parameter(torch.empty(supers, self.range.count))
        self.reset(seed)

    def owned(self) -> dict[str, Owned]:
        """Return what this rank holds of each parameter."""
        return {"weight": self.range, "bias": self.range}

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw weights N(0, 0.01) and set the bias to 0.

        A row's draw depends on (seed, s, z) alone, not on the world. The parameters stay the same
        objects. The optimizer's state of them is not touched.
        """
        own = self.range
        self.bias.zero_()
        for s, rows in enumerate(self.weight):
            for block in range(own.start // BLOCK, -(-own.stop // BLOCK) if own.count else 0):
                random = torch.Generator().manual_seed(derive(seed, "sub", s, block))
                fresh = torch.randn(BLOCK, rows.shape[1], generator=random).mul_(DEVIATION)
                first = block * BLOCK
                start, stop = max(own.start, first), min(own.stop, first + BLOCK)
                rows[start - own.start : stop - own.start] = fresh[start - first : stop - first]

    # group sizes are read on the host and ranks meet inside: nothing to compile
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, features: Float[Tensor, "b D"], s: Int64[Tensor, " b"], z: Int64[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Return the mean of -log p(z|s,x) over this rank's rows, in float32.

        Its gradients are those of the mean over all ranks' rows. Those of the weights are complete.
        Those of the features are such that DDP's mean over the ranks gives the trunk's.
        """
        loss: Tensor = _SubLoss.apply(
            features.to(self._dtype()),
            torch.stack([s, z], 1),
            self.weight,
            self.bias,
            self.range,
            self.world,
        )
        return loss

    @torch.no_grad()
    def logits(
        self, features: Float[Tensor, "b D"], s: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b own"]:
        """Return this rank's columns of the logits of its rows, without gradient."""
        order, groups = _groups(s, len(self.weight))
        rows = features.to(self._dtype())[order]
        return _unsorted(_logits(rows, groups, self.weight, self.bias), order)

    def _dtype(self) -> torch.dtype:
        device = self.weight.device.type
        on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else self.weight.dtype


@dataclass(frozen=True)
class _Group:
    """The rows [start, stop) of a batch that is sorted by super-class."""

    s: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def _groups(s: Int64[Tensor, " g"], supers: int) -> tuple[Int64[Tensor, " g"], list[_Group]]:
    """Return the order that sorts by super-class, and the super-classes in the batch."""
    ordered, order = torch.sort(s, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(supers + 1, device=s.device)).tolist()
    assert (ends[0], ends[-1]) == (0, len(s)), f"a class outside [0, {supers}), or its sub-cluster"
    spans = [_Group(i, start, stop) for i, (start, stop) in enumerate(itertools.pairwise(ends))]
    return order, [span for span in spans if span.stop > span.start]


def _logits(
    rows: Float[Tensor, "g D"], groups: list[_Group], weight: Tensor, bias: Tensor
) -> Float[Tensor, "g own"]:
    """Sorted rows' logits: a product for each super-class, in the rows' precision."""
    logits = rows.new_empty(len(rows), weight.shape[1])
    with torch.autocast(rows.device.type, enabled=False):  # it would keep a copy of all weights
        for group in groups:
            w, b = weight[group.s].to(rows.dtype), bias[group.s].to(rows.dtype)
            torch.addmm(b, rows[group.rows], w.T, out=logits[group.rows])
    return logits


class _SubLoss(torch.autograd.Function):
    """Vocabulary-parallel cross-entropy, one softmax for each super-class.

    Kept for the backward, in the product's precision: all ranks' features [G, D] in the order of
    their super-classes, and softmax minus one-hot [G, own].
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor,
        own: Owned,
        world: World,
    ) -> Tensor:
        s, z = world.all_gather_rows(targets).unbind(1)
        known = (z >= 0) & (z < own.total)  # else no rank would have the target
        order, groups = _groups(torch.where(known, s, -1), len(weight))
        rows = world.all_gather_rows(features)[order]
        logits = _logits(rows, groups, weight, bias)
        losses, slip = _softmax(logits, z[order] - own.start, world)
        ctx.save_for_backward(rows, slip.to(rows.dtype), order, weight)
        ctx.groups, ctx.world = groups, world
        return _unsorted(losses, order).view(world.size, -1)[world.rank].mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, slip, order, weight = ctx.saved_tensors
        world, share = ctx.world, len(rows) // ctx.world.size
        # each rank's loss may have been scaled differently
        slopes = (world.all_gather(slope) / share).repeat_interleave(share)[order]
        slip = (slip * slopes[:, None]).to(rows.dtype)
        grads = _weight_gradients(rows, slip, ctx.groups, weight, world.size)
        features = None
        if ctx.needs_input_grad[0]:
            partial = _feature_gradients(slip, ctx.groups, weight)
            features = world.reduce_scatter_rows(_unsorted(partial, order)).to(rows.dtype)
        return features, None, *grads, None, None


def _softmax(
    logits: Float[Tensor, "g own"], column: Int64[Tensor, " g"], world: World
) -> tuple[Float[Tensor, " g"], Float[Tensor, "g own"]]:
    """Return losses over all ranks' columns, and softmax minus one-hot of this rank's, in float32.

    `column` is the target's among this rank's. Outside [0, own) it is another rank's.
    """
    logits, width = logits.to(torch.promote_types(logits.dtype, torch.float32)), logits.shape[1]
    top = logits.amax(1) if width else logits.new_full((len(logits),), -torch.inf)
    logits -= world.all_reduce_max(top)[:, None]
    mine, place = (column >= 0) & (column < width), column.clamp(0, max(width - 1, 0))[:, None]
    target = torch.zeros_like(top)
    if width:
        target = torch.where(mine, logits.gather(1, place)[:, 0], target)
    slip = logits.exp_()
    total, target = world.all_reduce(torch.stack([slip.sum(1), target]))
    slip /= total[:, None]
    if width:
        slip.scatter_add_(1, place, -mine[:, None].to(slip.dtype))
    return total.log() - target, slip


def _weight_gradients(
    rows: Float[Tensor, "g D"], slip: Float[Tensor, "g own"], groups: list[_Group],
    weight: Float[Tensor, "S own D"], size: int,
) -> tuple[Float[Tensor, "S own D"], Float[Tensor, "S own"]]:  # fmt: skip
    """Return the mean over ranks in one tensor.

    Autograd's `select` would make S of them.
    """
    whole, bias = torch.zeros_like(weight), weight.new_zeros(weight.shape[:2])
    for group in groups:
        part = slip[group.rows]
        whole[group.s].copy_(part.T @ rows[group.rows]).div_(size)
        bias[group.s] = part.sum(0, dtype=bias.dtype) / size
    return whole, bias


def _feature_gradients(
    slip: Float[Tensor, "g own"], groups: list[_Group], weight: Float[Tensor, "S own D"]
) -> Float[Tensor, "g D"]:
    """Return this rank's part, for all ranks' rows in sorted order, in the weights' precision."""
    partial = weight.new_empty(len(slip), weight.shape[2])
    for group in groups:
        partial[group.rows] = slip[group.rows] @ weight[group.s].to(slip.dtype)
    return partial


def _unsorted(values: Tensor, order: Int64[Tensor, " g"]) -> Tensor:
    """Return sorted rows in the order of the batch."""
    return torch.empty_like(values).index_copy_(0, order, values)
