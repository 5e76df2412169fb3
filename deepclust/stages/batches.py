"""From the round to what a method gets: the plan of a segment, its reads, and its batches.

Crops, turns and colours are drawn from (seed, segment, position in the plan) and depend on nothing
else. So ranks, reader processes, restarts, and where colours are computed make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import Crop, RandomResizedCrop, to_float
from deepclust.data.images.device_crops import on_device
from deepclust.data.images.rotate import quarters, rotate
from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Loaded, Request
from deepclust.data.read.substitutes import Labels
from deepclust.data.shards.index import Index
from deepclust.data.to_device import locked, send
from deepclust.methods.base import Batch, Now, Targets
from deepclust.recipe import Recipe
from deepclust.recipe.sections import Data, SeedsSection
from deepclust.run.checkpoint import State
from deepclust.seeds.table import SeedTable
from deepclust.stages import mixing
from deepclust.stages.schedule import Timeline
from deepclust.world import World, derive


@dataclass(frozen=True)
class Feed:
    """A rank's side of the data: what is planned for all, read by this rank, and made a batch."""

    recipe: Recipe
    index: Index
    read: str  # by offset, or by block of shards, for which the plan walks through them in lanes
    world: World
    table: SeedTable | None = None  # labels by sample id

    def plan(
        self, timeline: Timeline, state: State, targets: Targets | None, steps: int | None = None
    ) -> EpochPlan:
        """Plan a segment, or `steps` of one, uniform over the round's clusters, or over samples.

        It is over samples without a clustering, and where the method's mode is `all`. Then sources
        with weights (`data.shards: {a: 2, b: 1}`) have these shares of it. With `seeds.share` every
        batch has that share of labelled samples, uniform over their clusters. They are uniform over
        classes where nothing is clustered, and where a method or a term uses labels. For these the
        rest of a batch is unlabelled, so that the share is exact. Head 0 samples.
        """
        drawn_from, weights = self._drawn_from(targets)
        part, mode = self._labelled_count(targets), self.recipe.method.mode
        lanes = math.gcd(timeline.lanes, part) if self.read == "block" else None
        build = partial(
            EpochPlan.build,
            seed=self.recipe.seed,
            epoch=state.segment,
            mode="exact" if mode == "all" else mode,
            lanes=lanes,
            blocks=self.index.bases,
        )
        batch, steps = self.recipe.train.batch, steps or timeline.steps(state)
        if part == 0:
            return build(drawn_from, global_batch=batch, steps=steps, weights=weights)
        steps = steps or int((drawn_from >= 0).sum()) // batch
        groups = self._labelled_groups(len(drawn_from), targets)
        few = partial(build, groups, global_batch=part, steps=steps, purpose="labelled")
        labelled = few(mode="exact")  # few labels repeat evenly, however clusters are drawn
        if part == batch:
            return labelled
        rest = build(
            self._rest(drawn_from), global_batch=batch - part, steps=steps, weights=weights
        )
        return rest.mixed(labelled, lanes)

    def requests(self, plan: EpochPlan, targets: Targets | None, state: State) -> Iterator[Request]:
        """Yield this rank's reads, from the step where the run is: a slice of the plan."""
        world, parts = self.world, self.recipe.train.accumulate
        crops = self._crops
        if self._colours_on_device:
            crops = tuple(replace(crop, colour=None) for crop in crops)
        shared = partial(
            Request,
            key=self._key(state.segment),
            crops=crops,
            assignments=None if targets is None else targets.file,
            replace=True,
            packed=self.recipe.data.crops_on_device,
        )
        batch = self.recipe.train.batch
        part = plan.for_rank(world.rank, world.size).shape[1] // parts
        own = np.arange(part * parts).reshape(parts, part) + world.rank * part * parts
        for step in range(state.offset, plan.steps):
            first = step * batch
            whole = plan.ids[first : first + batch]
            known, others = self._labelled_rows(whole, first, state.segment)
            for slots in own:
                slots, mates = (slots, None) if others is None else _with_partners(slots, others)
                yield shared(
                    sample_ids=whole[slots],
                    positions=first + slots,
                    known=None if known is None else known[slots],
                    partners=mates,
                )

    def _labelled_rows(
        self, sample_ids: Int64[np.ndarray, " b"], first: int, segment: int
    ) -> tuple[Bool[np.ndarray, " b"] | None, Int64[np.ndarray, " b"] | None]:
        """Return which rows of a global batch are labelled, and the row that each is mixed with.

        None each where the recipe treats all samples alike, or mixes none.
        """
        seeds = self.recipe.seeds
        if seeds is None or self.table is None or not (seeds.lighter or seeds.mix):
            return None, None
        known = labels_of(self.table, sample_ids) >= 0
        if seeds.mix is None:
            return known, None
        positions = np.arange(first, first + len(sample_ids))
        drawn = mixing.draw(seeds.mix, derive(self._key(segment), "mix"), positions)
        return known, np.where(drawn.mixed, mixing.partners(known), -1)

    def to_batch(self, loaded: Loaded, targets: Targets | None, segment: int, now: Now) -> Batch:
        """Colour (if that is done here), turn and normalise; look pseudo-labels and labels up.

        Both belong to the sample that was loaded, which may replace one that cannot be read. Rows
        that were read for the images of others end here.
        """
        device, key = self.world.device, self._key(segment)
        drawn = quarters(derive(key, "turn"), loaded.positions, max(self._turns))
        turns = torch.from_numpy(drawn)  # on the CPU, or `rotate` would wait for a GPU
        crops = tuple(
            self._finish(on_device(images, device), number, loaded, turns, key)
            for number, images in enumerate(loaded.images)
        )
        labels = labels_of(self.table, np.asarray(loaded.sample_ids))
        soft, own = None, len(labels)
        if loaded.partners is not None:
            crops, soft = self._mixed(crops, labels, loaded, key)
            own = len(soft)
            labels = mixing.certain(soft)
        sample_ids = np.asarray(loaded.sample_ids)[:own]
        none = np.zeros((0, len(sample_ids)), np.int32)
        assigned = none if targets is None else targets.assignments[:, sample_ids]
        mixtures = [] if soft is None else [soft.numpy()]
        sent = send([drawn[:own], assigned.astype(np.int64), labels, *mixtures], device)
        return Batch(
            sample_ids=locked(torch.from_numpy(sample_ids), device),
            crops=crops,
            turns=sent[0],
            pseudo_labels=sent[1],
            labels=sent[2],
            now=now,
            soft=sent[3] if mixtures else None,
        )

    def _mixed(
        self,
        crops: tuple[Float[Tensor, "b 3 s s"], ...],
        labels: Int64[np.ndarray, " b"],
        loaded: Loaded,
        key: int,
    ) -> tuple[tuple[Float[Tensor, "own 3 s s"], ...], Float[Tensor, "own classes"]]:
        """Return the own rows of the crops, mixed with their partners, and their classes.

        A row whose own label or partner's label went with a bad sample stays as it is.
        """
        assert loaded.partners is not None
        assert self.table is not None
        assert self.recipe.seeds is not None
        assert self.recipe.seeds.mix is not None
        mates, own = loaded.partners, len(loaded.partners)
        mates = np.where((labels[:own] >= 0) & (labels[mates] >= 0), mates, -1)
        drawn = mixing.draw(self.recipe.seeds.mix, derive(key, "mix"), loaded.positions[:own])
        shares = drawn.shares(self.recipe.data.size)
        soft = mixing.mix_labels(labels, mates, shares, len(self.table.names))
        return tuple(mixing.mix_images(crop, mates, drawn) for crop in crops), soft

    def _finish(
        self,
        images: UInt8[Tensor, "b 3 s s"],
        number: int,
        loaded: Loaded,
        turns: Int64[Tensor, " b"],
        key: int,
    ) -> Float[Tensor, "b 3 s s"]:
        if self._colours_on_device:
            at = derive(key, "colour", number), loaded.positions
            images = self._crops[number].coloured(images, *at, loaded.known)
        if self._turns[number] > 1:
            images = rotate(images, turns)
        data = self.recipe.data
        floats = to_float(images, data.mean, data.std)
        return floats.contiguous(memory_format=torch.channels_last)

    def _labelled_count(self, targets: Targets | None) -> int:
        """Return how many samples of a batch are labelled, 0 without `seeds.share`.

        With a share of 1 all are, with a smaller one at least one is, and one is not.
        """
        seeds, batch = self.recipe.seeds, self.recipe.train.batch
        if seeds is None or self.table is None or seeds.share == 0:
            return 0
        if targets is not None and targets.round < seeds.pin_from and not self.recipe.uses_labels:
            return 0
        if seeds.share == 1:
            return batch
        return min(max(round(seeds.share * batch), 1), batch - 1)

    def _drawn_from(
        self, targets: Targets | None
    ) -> tuple[Int32[np.ndarray, " n"], list[float] | None]:
        """Return the group of every sample that a plan is uniform over, and the groups' weights."""
        cluster_ids = None if targets is None else targets.assignments[0]
        if cluster_ids is not None and self.recipe.method.mode != "all":
            return cluster_ids, None
        sources, weights = _sources(self.index, self.recipe.data.weights)
        if cluster_ids is not None:
            sources[cluster_ids < 0] = -1
        return sources, weights

    def _labelled_groups(self, n: int, targets: Targets | None) -> Int32[np.ndarray, " n"]:
        """Return the groups that labelled samples are drawn from, or -1 for all other samples."""
        assert self.table is not None
        groups, ids = np.full(n, -1, np.int32), self.table.sample_ids
        clusters = None if targets is None else targets.assignments[0][ids]
        if clusters is None or self.recipe.uses_labels:
            groups[ids] = self.table.classes
            if clusters is not None:
                groups[ids[clusters < 0]] = -1  # they cannot be read
        else:
            groups[ids] = clusters
        return groups

    def _rest(self, drawn_from: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the groups without the labelled samples, where these count by their labels.

        Where all samples are labelled there are no others to draw from.
        """
        if self.table is None or not self.recipe.uses_labels:
            return drawn_from
        rest = np.array(drawn_from)
        rest[self.table.sample_ids] = -1
        return rest if (rest >= 0).any() else drawn_from

    def _key(self, segment: int) -> int:
        return derive(self.recipe.seed, "view", segment)

    @cached_property
    def _crops(self) -> tuple[Crop, ...]:
        return crops_of(self.recipe)

    @cached_property
    def _turns(self) -> list[int]:
        """The number of turns that each crop is drawn from."""
        kinds = self.recipe.method.crops(self.recipe.data)
        return [kind.turns for kind in kinds for _ in range(kind.count)]

    @cached_property
    def _colours_on_device(self) -> bool:
        data = self.recipe.data
        if data.colour_on == "device" or data.crops_on_device:
            return True
        return data.colour_on == "auto" and self.world.device.type == "cuda"


def crops_of(recipe: Recipe) -> tuple[Crop, ...]:
    """Return every crop of an image, with its colours: the method's kinds, one after the other."""
    data = recipe.data
    crops: list[Crop] = []
    full_size = 0  # crops so far, by which the lists of `data.blur` and `data.solarise` go
    for kind in recipe.method.crops(data):
        view = RandomResizedCrop(kind.size, kind.scale, data.crop_ratio, data.flip)
        is_full = kind.size == data.size
        for _ in range(kind.count):
            colour = _colour(data, full_size, is_full) if kind.colour else None
            crop = Crop(view, None if colour is None or colour.does_nothing else colour)
            crops.append(replace(crop, labelled=_lighter(crop, view, is_full, recipe.seeds)))
            full_size += is_full
    return tuple(crops)


def _lighter(
    crop: Crop, view: RandomResizedCrop, full_size: bool, seeds: SeedsSection | None
) -> Crop | None:
    """Return the crop of labelled images, None where it is that of all others."""
    if seeds is None or not seeds.lighter:
        return None
    scale, colour = seeds.crop_scale if full_size else None, crop.colour
    if colour is not None:
        chances = ("jitter_p", "grey", "blur", "solarise")
        less = {name: seeds.colour * getattr(colour, name) for name in chances}
        colour = replace(colour, **less)
    return Crop(view if scale is None else replace(view, scale=scale), colour)


def labels_of(
    table: SeedTable | None, sample_ids: Int64[np.ndarray, " b"]
) -> Int64[np.ndarray, " b"]:
    """Return the class of every sample, -1 where it is not in the table."""
    if table is None:
        return np.full(len(sample_ids), -1, np.int64)
    return Labels(table.sample_ids, table.classes).of(sample_ids)


def _with_partners(
    slots: Int64[np.ndarray, " own"], others: Int64[np.ndarray, " b"]
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " own"]]:
    """Return the slots that a part reads, its own first, and the row of each own one's partner.

    `slots` are consecutive, and `others` are the partners' slots in the batch, -1 for none.
    """
    first, own, mates = slots[0], len(slots), others[slots]
    inside = (mates >= first) & (mates < first + own)
    more = np.unique(mates[~inside & (mates >= 0)])
    rows = np.where(inside, mates - first, own + np.searchsorted(more, mates))
    return np.concatenate([slots, more]), np.where(mates < 0, -1, rows)


def _colour(data: Data, number: int, full_size: bool) -> Colour:
    """Return the colours of a crop, `number` of the full-size ones.

    A small one has those of the last full-size one by default.
    """
    chances = {}
    for name in ("blur", "solarise"):
        chance = getattr(data, name)
        if isinstance(chance, tuple):
            chance = chance[number] if full_size else chance[-1]
        own = None if full_size or data.local is None else getattr(data.local, name)
        chances[name] = chance if own is None else own
    return Colour(data.jitter, data.jitter_p, data.grey, blur_sigma=data.blur_sigma, **chances)


def _sources(
    index: Index, weights: Sequence[float] | None
) -> tuple[Int32[np.ndarray, " n"], list[float] | None]:
    """Return the group of every sample, -1 for those that the index excludes, and their weights.

    Without weights all are one group. Sources are numbered by their first samples, so that the
    order in which a recipe names them makes no difference.
    """
    groups = np.zeros(len(index), np.int32)
    if weights is not None:
        given, first, number = np.unique(index.source_ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        groups = np.argsort(order).astype(np.int32)[number]
        weights = [weights[i] for i in given[order]]
    groups[list(index.excluded)] = -1
    return groups, weights
