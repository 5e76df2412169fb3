"""What training reads: global batches, crops and labels, the same for any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepclust import Recipe, open_index
from deepclust.data.plan import EpochPlan
from deepclust.data.read.loader import Loaded, Loader, Request
from deepclust.data.shards.index import Index
from deepclust.errors import DataError
from deepclust.methods.base import Now, Targets
from deepclust.recipe.declare import Crops
from deepclust.run.checkpoint import State
from deepclust.seeds.table import SeedTable
from deepclust.stages.batches import Feed, crops_of, labels_of
from deepclust.stages.build import check_labels
from deepclust.stages.data_index import idle_weights
from deepclust.stages.schedule import Timeline
from deepclust.world import World
from tests.images import make_shards
from tests.methods.cases import TOY, recipe

BATCH, STEPS, OFFSET = 24, 10, 3
PLAN = EpochPlan.build((np.arange(300) % 7).astype(np.int32), 0, 2, BATCH, STEPS)
STATE = State(step=103, segment=2, offset=OFFSET, round=2)
NO_INDEX: Any = None


def requests(rank: int, ranks: int, accumulate: int) -> list[Request]:
    """What one rank reads from step 3 of segment 2 on."""
    of = recipe("deepcluster", f"train.ranks={ranks}", f"train.accumulate={accumulate}")
    feed = Feed(of, NO_INDEX, "offset", World(rank, ranks))
    return list(feed.requests(PLAN, None, STATE))


def global_batches(ranks: int, accumulate: int, what: str) -> np.ndarray:
    """Ids or positions by step, the ranks' shares one after the other: int [steps, batch]."""
    shares = [
        np.concatenate([getattr(part, what) for part in requests(rank, ranks, accumulate)])
        for rank in range(ranks)
    ]
    return np.concatenate([share.reshape(STEPS - OFFSET, -1) for share in shares], axis=1)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1), (4, 1), (2, 4)])
def test_every_step_reads_the_plans_batch_for_any_number_of_ranks(
    ranks: int, accumulate: int
) -> None:
    ids = PLAN.ids.reshape(STEPS, BATCH)[OFFSET:]
    positions = np.arange(OFFSET * BATCH, STEPS * BATCH).reshape(-1, BATCH)
    np.testing.assert_array_equal(global_batches(ranks, accumulate, "sample_ids"), ids)
    np.testing.assert_array_equal(global_batches(ranks, accumulate, "positions"), positions)


def test_crops_do_not_depend_on_the_number_of_ranks() -> None:
    """A crop is a function of key, position and its own settings alone."""
    drawn = [
        {(part.key, part.crops) for rank in range(ranks) for part in requests(rank, ranks, 1)}
        for ranks in (1, 2, 4)
    ]
    assert len(drawn[0]) == 1
    assert drawn[0] == drawn[1] == drawn[2]


def test_small_crops_have_their_own_size_and_scale() -> None:
    crops = crops_of(recipe(TOY, "data.jitter=[0.4, 0.4, 0, 0]"))
    assert [crop.view.size for crop in crops] == [16, 16, 8, 8]
    assert [crop.colour is None for crop in crops] == [False, False, True, True]


def test_each_full_size_crop_has_its_own_chance_of_blur_and_solarisation() -> None:
    chances = "data.blur=[1.0, 0.1]", "data.solarise=[0.0, 0.2]"
    colours = [crop.colour for crop in crops_of(recipe("simclr", *chances))]
    assert [(c.blur, c.solarise) for c in colours if c] == [(1.0, 0.0), (0.1, 0.2)]


TABLE = SeedTable(np.array([2, 5, 11, 12]), np.array([0, 1, 1, 2], np.int32), ["a", "b", "c"])


def test_labels_are_looked_up_by_sample_id() -> None:
    assert labels_of(TABLE, np.array([12, 0, 5, 5, 299])).tolist() == [2, -1, 1, 1, -1]
    assert labels_of(None, np.array([2])).tolist() == [-1]


def test_a_replaced_sample_has_its_own_label_and_not_that_of_the_bad_one() -> None:
    feed = Feed(recipe("deepcluster"), NO_INDEX, "offset", World(), TABLE)
    loaded = Loaded(
        (torch.zeros(3, 3, 16, 16, dtype=torch.uint8),), np.array([5, 7, 12]), np.arange(3)
    )
    assert feed.to_batch(loaded, None, 0, Now()).labels.tolist() == [1, -1, 2]


@pytest.fixture
def labelled(shards: Path) -> tuple[Index, SeedTable]:
    """An index of 300 samples of which every fifteenth is labelled."""
    index = open_index(shards)
    ids = np.arange(0, 300, 15)
    return index, SeedTable(ids, (ids // 15 % 4).astype(np.int32), ["0", "1", "2", "3"])


def plan_of(
    labelled: tuple[Index, SeedTable], share: float, ranks: int = 1, read: str = "offset"
) -> EpochPlan:
    """The plan of a method that uses labels and clusters nothing."""
    of = online(share, ranks)
    return Feed(of, labelled[0], read, World(0, ranks), labelled[1]).plan(
        Timeline.of(of, 300), State(), None
    )


def online(share: float, ranks: int) -> Recipe:
    term, seeds = "terms={tests.toys.term: {weight: 1}}", f"seeds={{labels: s, share: {share}}}"
    return recipe("simclr", term, seeds, f"train.ranks={ranks}")


@pytest.mark.parametrize(("share", "count"), [(0.25, 6), (1 / 3, 8), (0.1, 2), (0.001, 1), (1, 24)])
@pytest.mark.parametrize("read", ["offset", "block"])
def test_every_batch_has_exactly_its_share_of_labels_however_it_is_read(
    labelled: tuple[Index, SeedTable], read: str, share: float, count: int
) -> None:
    plan = plan_of(labelled, share, read=read)
    known = np.isin(plan.ids, labelled[1].sample_ids).reshape(plan.steps, -1)
    assert plan.steps == 12
    assert known.sum(1).tolist() == [count] * 12


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_labelled_rows_of_a_batch_are_the_same_for_any_number_of_ranks(
    labelled: tuple[Index, SeedTable], share: float
) -> None:
    whole = plan_of(labelled, share)
    for ranks in (2, 3):
        plan = plan_of(labelled, share, ranks)
        parts = [plan.for_rank(rank, ranks) for rank in range(ranks)]
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole.ids.reshape(12, 24))
        counts = [np.isin(part, labelled[1].sample_ids).sum(1) for part in parts]
        assert np.ptp(counts, axis=0).max() <= 1


def test_few_labels_repeat_evenly_by_class_and_within_a_class(
    labelled: tuple[Index, SeedTable],
) -> None:
    index, table = labelled
    uneven = SeedTable(table.sample_ids[:7], np.array([0, 0, 0, 0, 1, 1, 2], np.int32), [*"abc"])
    plan = plan_of((index, uneven), 0.25)
    counts = np.bincount(plan.ids, minlength=300)[uneven.sample_ids]
    assert counts.sum() == 72
    classes = np.bincount(uneven.classes, weights=counts)
    assert np.ptp(classes) <= 1
    assert all(np.ptp(counts[uneven.classes == c]) <= 1 for c in range(3))


def test_a_segment_that_is_resumed_reads_the_rest_of_the_same_labelled_batches(
    labelled: tuple[Index, SeedTable],
) -> None:
    of = online(0.25, 2)
    feed = Feed(of, labelled[0], "offset", World(1, 2), labelled[1])
    begun, resumed = State(segment=1), State(step=17, segment=1, offset=5)
    ids = [
        np.stack([r.sample_ids for r in feed.requests(feed.plan(timeline, at, None), None, at)])
        for at in (begun, resumed)
        for timeline in [Timeline.of(of, 300)]
    ]
    np.testing.assert_array_equal(ids[0][5:], ids[1])


def test_classes_are_even_where_labels_are_used_though_clusters_are_not(
    labelled: tuple[Index, SeedTable],
) -> None:
    """A toy that clusters and uses labels: its labelled samples may all be in one cluster."""
    index, table = labelled
    assignments = np.zeros((1, 300), np.int32)
    assignments[0, 100:] = 1
    assignments[0, table.sample_ids[0]] = -1  # it cannot be read
    targets = Targets(0, Path(), assignments, np.zeros((1, 2, 2)), None, None)
    of = recipe(TOY, "seeds={labels: shards, share: 0.5}")
    plan = Feed(of, index, "offset", World(), table).plan(Timeline.of(of, 300), State(), targets)
    labels = labels_of(table, plan.ids)
    assert np.bincount(labels + 1).tolist() == [144, 36, 36, 36, 36]
    assert table.sample_ids[0] not in plan.ids


def test_where_all_samples_are_labelled_batches_are_too(
    labelled: tuple[Index, SeedTable],
) -> None:
    every = SeedTable(np.arange(300), (np.arange(300) % 2).astype(np.int32), ["a", "b"])
    plan = plan_of((labelled[0], every), 0.25)
    assert (labels_of(every, plan.ids) >= 0).all()
    assert "Set seeds.share=1" in check_labels(online(0.25, 1), every, 300)[0]


def test_labels_of_one_class_are_refused_and_batches_without_labels_are_noted(
    labelled: tuple[Index, SeedTable],
) -> None:
    with pytest.raises(DataError, match=r"one class only, 'a'.*Label samples of a second class"):
        check_labels(online(0.25, 1), SeedTable(TABLE.sample_ids, np.zeros(4, np.int32), ["a"]), 9)
    assert "holds 0.32 labelled samples" in check_labels(online(0, 1), TABLE, 300)[0]
    assert check_labels(online(0.25, 1), labelled[1], 300) == []


def test_a_share_of_one_reads_labelled_samples_alone_uniform_over_classes(
    labelled: tuple[Index, SeedTable],
) -> None:
    plan, (_, table) = plan_of(labelled, 1.0), labelled
    classes = labels_of(table, plan.ids)
    assert (classes >= 0).all()
    assert np.bincount(classes).tolist() == [len(plan.ids) // 4] * 4


def test_lists_of_chances_go_by_full_size_crops_wherever_a_method_has_the_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_first = recipe("simclr", "data.blur=[1.0, 0.1]")
    full = Crops(2, small_first.data.size, (0.3, 1.0), colour=True)
    small = Crops(3, 8, (0.1, 0.3), colour=True)
    monkeypatch.setattr(type(small_first.method), "crops", lambda self, data: (small, full))
    blurs = [crop.colour.blur for crop in crops_of(small_first) if crop.colour]
    assert blurs == [0.1, 0.1, 0.1, 1.0, 0.1]


def test_crops_of_two_sizes_reach_the_batch(shards: Path) -> None:
    of = recipe(TOY)
    index = open_index(shards)
    feed = Feed(of, index, "offset", World())
    loader = Loader(index, 0)
    loaded = next(iter(loader.stream(feed.requests(PLAN, None, replace(STATE, offset=9)))))
    batch = feed.to_batch(loaded, None, 2, Now(5))
    assert [tuple(crop.shape) for crop in batch.crops] == [(24, 3, 16, 16)] * 2 + [
        (24, 3, 8, 8)
    ] * 2
    assert batch.turns.max() > 0
    assert batch.pseudo_labels.shape == (0, 24)
    assert batch.now.step == 5
    loader.close()


def test_without_a_clustering_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    a, b = (str(make_shards(tmp_path / name, n=48, shards=2)) for name in "ab")
    plans = []
    for shards in ({a: 2.0, b: 1.0}, {b: 1.0, a: 2.0}):
        of = recipe("simclr", "train.batch=12")
        of = of.model_copy(update={"data": of.data.model_copy(update={"shards": shards})})
        index = open_index(shards)
        feed = Feed(of, index, "offset", World())
        plans.append(feed.plan(Timeline.of(of, len(index)), State(), None))
        names = np.repeat(index.names, np.diff(index.bases))[plans[-1].ids]
        assert sum(name.startswith("a/") for name in names) == 64
    assert np.array_equal(plans[0].ids, plans[1].ids)  # their order in the recipe is nothing
    assert idle_weights(of) == []
    clusters = recipe("deepcluster").model_copy(update={"data": of.data})
    assert "no effect" in idle_weights(clusters)[0]


@pytest.mark.parametrize(("sampling", "all_once"), [("all", True), ("exact", False)])
def test_an_epoch_is_all_samples_once_or_uniform_over_clusters(
    labelled: tuple[Index, SeedTable], sampling: str, all_once: bool
) -> None:
    of, index = recipe("deepcluster-v2", f"method.sampling={sampling}"), labelled[0]
    skewed = np.minimum(np.arange(len(index)) // 10, 5)  # the last cluster has most
    skewed[:3] = -1
    targets = Targets(0, Path(), skewed[None].astype(np.int32), np.zeros((1, 6, 2)), None, None)
    feed = Feed(of, index, "offset", World())
    plan = feed.plan(Timeline.of(of, len(index)), State(), targets)
    ids, counts = np.unique(plan.ids, return_counts=True)
    assert ids.min() >= 3
    assert (counts.max() == 1) == all_once
    drawn = np.bincount(skewed[plan.ids])
    assert (drawn.max() - drawn.min() <= 1) != all_once
