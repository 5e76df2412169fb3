"""The plan: which sample is trained on at which position of an epoch, uniform over the clusters.

A plan is a pure function of (assignments, seed, epoch, global batch). Every non-empty cluster gets
the same number of draws q. Within a cluster of n every sample is drawn floor(q / n) times, and a
random subset once more. So a small cluster repeats evenly, and a large one is sampled without
replacement. Ranks slice the plan, so the global batch does not depend on their number. The only
state to resume from is the number of steps that were done.

Source: the sampling of DeepCluster (Caron et al., ECCV 2018, section 3.1, "trivial
parametrization"). Its released sampler draws with replacement from small clusters. It yields
indices that its data set reads in another order, so its draws are not uniform. Mode "paper" is
that draw as it was meant, mode "exact" has the quotas exact. `tools/bench/sampling.py` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Integer, UInt32

from deepclust.data.shuffle import LIMIT, random_order
from deepclust.errors import DataError, RecipeError
from deepclust.world import derive, generator

MODES = ("exact", "paper")
WINDOW = 8  # blocks (shards) that a lane mixes at a time
BLOCK = 4096  # samples of a block, if the caller does not say where shards begin
_ONE_GROUP = np.zeros(1, np.uint32)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's sample ids in training order, int64 [steps * global_batch]."""

    ids: Int64[np.ndarray, " positions"]
    steps: int
    global_batch: int

    def __repr__(self) -> str:
        return f"EpochPlan({self.steps:,} steps of {self.global_batch:,} images)"

    @classmethod
    def build(
        cls,
        assignments: Integer[np.ndarray, "*heads n"],
        seed: int,
        epoch: int,
        global_batch: int,
        steps: int | None = None,
        lanes: int | None = None,
        mode: str = "exact",
        blocks: Int[np.ndarray, " blocks_plus_1"] | None = None,
        purpose: str = "epoch",
        weights: Sequence[float] | None = None,
    ) -> EpochPlan:
        """Plan one epoch, or one round: `steps` batches, by default all that the data fills.

        `assignments` are int [n] or [heads, n] (head 0 decides), negative where excluded. `lanes`
        cuts the draws into that number of contiguous pieces of a tape that walks through the shards
        (`blocks`: `index.bases`). Each step takes equal parts of all lanes, so lanes must divide
        the batch. A rank reads only its own lanes if the ranks divide them. `epoch` is the key
        of the draw within its `purpose`: a round that is cut by steps passes its own number.
        `weights` (positive, by cluster id) give the clusters other shares of the draws than equal
        ones. They sum up exactly, and each is less than one draw away from its proportion.

        Raises `RecipeError` for a batch, lanes or mode that cannot be. Raises `DataError` if there
        are no assigned samples, or fewer than a batch and `steps` is not given.
        """
        cluster_ids = _cluster_ids(assignments)
        _check_types(seed=seed, epoch=epoch, global_batch=global_batch, steps=steps, lanes=lanes)
        _check(global_batch, steps, lanes, mode)
        if steps is None:
            steps = _whole_batches(int(np.count_nonzero(cluster_ids >= 0)), global_batch)
        key = (seed, "plan", purpose, epoch)
        shares = None if weights is None else _shares(cluster_ids, weights)
        draws = _draw(cluster_ids, steps * global_batch, mode, key, shares)
        if lanes is None:
            shuffled = draws[_order(_ONE_GROUP, len(draws), key)]
            return cls(shuffled.astype(np.int64), steps, global_batch)
        blocks = _even_blocks(len(cluster_ids)) if blocks is None else np.asarray(blocks)
        tape = _tape(draws, blocks, key).reshape(lanes, steps, global_batch // lanes)
        return cls(tape.swapaxes(0, 1).reshape(-1).astype(np.int64), steps, global_batch)

    def mixed(self, other: EpochPlan, lanes: int | None = None) -> EpochPlan:
        """Return a plan whose batches join those of this plan and of another of equal steps.

        The other's samples are spread evenly over the slots of every lane, and so over the ranks.
        """
        assert self.steps == other.steps, "plans of different lengths cannot be mixed"
        own, theirs = (p.ids.reshape(p.steps, lanes or 1, -1) for p in (self, other))
        both = np.concatenate([own, theirs], axis=2)
        width, part = both.shape[2], theirs.shape[2]
        slots = np.full(width, -1)
        slots[np.arange(part) * width // part] = np.arange(width - part, width)
        slots[slots < 0] = np.arange(width - part)
        return EpochPlan(
            both[:, :, slots].reshape(-1), self.steps, self.global_batch + other.global_batch
        )

    @property
    def positions(self) -> Int64[np.ndarray, " positions"]:
        """Each draw's place in the epoch, step * global_batch + slot, which keys its crops."""
        return np.arange(len(self.ids))

    def for_rank(
        self, rank: int, world: int, start_step: int = 0
    ) -> Int64[np.ndarray, "steps local_batch"]:
        """Return one rank's sample ids, int64 [steps - start_step, global_batch // world].

        Raises `RecipeError` if the batch cannot be split over `world` ranks.
        """
        if world < 1 or self.global_batch % world:
            raise RecipeError(
                f"a batch of {self.global_batch} cannot be split over {world} ranks; set "
                "train.batch to a multiple of train.ranks"
            )
        if not 0 <= rank < world:
            raise RecipeError(f"rank {rank} is not one of {world} ranks")
        split = self.ids.reshape(self.steps, world, self.global_batch // world)
        return split[start_step:, rank]


def _cluster_ids(assignments: Integer[np.ndarray, "*heads n"]) -> Integer[np.ndarray, " n"]:
    """Return head 0 of an array, a tensor or lists."""
    try:
        array = np.asarray(assignments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"assignments are not an array: {error}") from error
    cluster_ids = array[0] if array.ndim == 2 and len(array) else array
    if cluster_ids.ndim != 1 or cluster_ids.dtype.kind not in "iu":
        raise DataError(
            f"assignments must be integers [n] or [heads, n]; got {array.dtype} {list(array.shape)}"
        )
    limits = np.iinfo(np.int32)
    if cluster_ids.itemsize > 2 and len(cluster_ids) and cluster_ids.max() > limits.max:
        raise DataError(f"assignments reach {cluster_ids.max()}; cluster ids are below 2^31")
    if cluster_ids.dtype.kind == "i" and cluster_ids.itemsize > 4:
        cluster_ids = np.maximum(cluster_ids, -1)  # below -2^31 it would wrap to a cluster
    if len(cluster_ids) >= LIMIT:
        raise DataError(f"{len(cluster_ids):,} samples: a plan takes at most {LIMIT - 1:,}")
    return cluster_ids.astype(np.int32, copy=False)


def _check_types(**numbers: int | None) -> None:
    """Raise `RecipeError` for a number that is not an integer (None: not given)."""
    for name, value in numbers.items():
        optional = value is None and name in ("steps", "lanes")
        if not optional and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise RecipeError(f"{name}={value!r} must be an integer")


def _check(global_batch: int, steps: int | None, lanes: int | None, mode: str) -> None:
    if mode not in MODES:
        raise RecipeError(f"sampling mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if global_batch < 1 or (steps is not None and steps < 1):
        raise RecipeError(
            f"train.batch and steps must be at least 1; got {global_batch} and {steps}"
        )
    if lanes is not None and (lanes < 1 or global_batch % lanes):
        raise RecipeError(f"{lanes} lanes do not divide a batch of {global_batch}")


def _whole_batches(valid: int, global_batch: int) -> int:
    if valid < global_batch:
        raise DataError(
            f"{valid:,} assigned samples do not fill one batch of {global_batch:,}; set "
            f"train.batch to at most {valid:,}, or give more data"
        )
    return valid // global_batch


@dataclass(frozen=True)
class _Members:
    """Non-empty clusters, each with its samples in random order.

    Those of the j-th are `sample_ids[starts[j] : starts[j + 1]]`.
    """

    sample_ids: UInt32[np.ndarray, " valid"]
    starts: Int64[np.ndarray, " clusters_plus_1"]

    @property
    def sizes(self) -> Int64[np.ndarray, " clusters"]:
        """The number of samples of each cluster."""
        return np.diff(self.starts)


def _shares(
    cluster_ids: Integer[np.ndarray, " n"], weights: Sequence[float]
) -> Float64[np.ndarray, " clusters"]:
    """Return the weights of the non-empty clusters, or raise `RecipeError` for wrong ones."""
    present = np.unique(cluster_ids[cluster_ids >= 0])
    given: Float64[np.ndarray, " clusters"] = np.asarray(weights, np.float64)
    if given.ndim != 1 or not (np.isfinite(given) & (given > 0)).all():
        raise RecipeError("weights must be a list of positive numbers")
    if len(present) and present[-1] >= len(given):
        raise RecipeError(f"{len(given)} weights, but cluster ids reach {present[-1]}")
    shares: Float64[np.ndarray, " clusters"] = given[present]
    return shares


def _draw(
    cluster_ids: Integer[np.ndarray, " n"],
    total: int,
    mode: str,
    key: tuple,
    shares: Float64[np.ndarray, " clusters"] | None = None,
) -> UInt32[np.ndarray, " total"]:
    if total >= LIMIT:
        raise RecipeError(f"{total:,} draws in one plan: it takes at most {LIMIT - 1:,}")
    members = _members(cluster_ids, derive(*key, "members"))
    if mode == "paper" and shares is None:
        return _paper_draw(members, total, key)
    rng = generator(*key, "quota")
    if shares is None:
        return _exact_draw(members, _quota(len(members.sizes), total, rng))
    return _exact_draw(members, _quota_by_shares(shares, total, rng))


def _members(cluster_ids: Integer[np.ndarray, " n"], key: int) -> _Members:
    # seen as unsigned, the negative cluster ids (excluded) are the largest and sort to the end
    clusters, order = random_order(cluster_ids.view(np.uint32), len(cluster_ids), key)
    valid = int(np.searchsorted(clusters, np.uint32(1 << 31)))
    if valid == 0:
        raise DataError("every sample is excluded (assignment -1): there is nothing to train on")
    changes = np.flatnonzero(clusters[1:valid] != clusters[: valid - 1]) + 1
    return _Members(order[:valid], np.concatenate([[0], changes, [valid]]))


def _exact_draw(
    members: _Members, quota: Int64[np.ndarray, " clusters"]
) -> UInt32[np.ndarray, " total"]:
    copies, extra = np.divmod(quota, members.sizes)
    counts = np.repeat(copies.astype(np.uint32), members.sizes)
    counts += _are_among_first(extra, members)
    return np.repeat(members.sample_ids, counts)


def _quota(clusters: int, total: int, rng: np.random.Generator) -> Int64[np.ndarray, " clusters"]:
    """Return equal shares of `total`, of which random clusters take the remainder."""
    quota = np.full(clusters, total // clusters, np.int64)
    quota[rng.permutation(clusters)[: total % clusters]] += 1
    return quota


def _quota_by_shares(
    shares: Float64[np.ndarray, " clusters"], total: int, rng: np.random.Generator
) -> Int64[np.ndarray, " clusters"]:
    """Return parts of `total` in proportion to the shares, rounded by the largest remainder.

    Of equal remainders a random one is the larger.
    """
    exact = total * (shares / shares.sum())
    quota: Int64[np.ndarray, " clusters"] = np.floor(exact).astype(np.int64)
    random = rng.permutation(len(shares))
    largest = random[np.argsort((quota - exact)[random], kind="stable")]
    quota[largest[: total - quota.sum()]] += 1
    return quota


def _are_among_first(
    extra: Int64[np.ndarray, " clusters"], members: _Members
) -> Bool[np.ndarray, " valid"]:
    """Return whether a member is among the first `extra[j]` of its cluster, a random subset."""
    ends = (members.starts[:-1] + extra).astype(np.uint32)
    return np.arange(len(members.sample_ids), dtype=np.uint32) < np.repeat(ends, members.sizes)


def _paper_draw(members: _Members, total: int, key: tuple) -> UInt32[np.ndarray, " total"]:
    """Draw as DeepCluster's `UnifLabelSampler`: N // K + 1 per cluster, shuffled, then cut."""
    sizes, starts = members.sizes, members.starts[:-1]
    share = max(len(members.sample_ids), total) // len(sizes) + 1
    small = sizes <= share
    rng = generator(*key, "paper")
    repeated = rng.integers(0, sizes[small, None], size=(int(small.sum()), share))
    once = np.broadcast_to(np.arange(share), (int((~small).sum()), share))
    places = np.concatenate([repeated + starts[small, None], once + starts[~small, None]])
    chosen: UInt32[np.ndarray, " drawn"] = members.sample_ids[places.reshape(-1)]
    chosen = chosen[_order(_ONE_GROUP, len(chosen), (*key, "cut"))[:total]]
    return chosen


def _even_blocks(n: int) -> Int64[np.ndarray, " blocks_plus_1"]:
    return np.append(np.arange(0, n, BLOCK), n)


def _tape(
    draws: UInt32[np.ndarray, " total"],
    blocks: Int[np.ndarray, " blocks_plus_1"],
    key: tuple,
) -> UInt32[np.ndarray, " total"]:
    """Return the draws, one window of blocks after another, each in random order."""
    place = generator(*key, "blocks").permutation(len(blocks) - 1) // WINDOW
    block = np.searchsorted(blocks[1:], draws, side="right")
    window = place.astype(np.uint32)[block]
    tape: UInt32[np.ndarray, " total"] = draws[_order(window, len(draws), key)]
    return tape


def _order(group: UInt32[np.ndarray, " n_or_1"], n: int, key: tuple) -> UInt32[np.ndarray, " n"]:
    return random_order(group, n, derive(*key, "order"))[1]
