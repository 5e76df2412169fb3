from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.data import plan as plans
from deepclust.data.plan import EpochPlan
from deepclust.errors import DataError, RecipeError


def zipf_labels(n: int = 4000, k: int = 50, seed: int = 0) -> np.ndarray:
    """Skewed clusters; id 7 is never used and one sample in twenty is excluded."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, k + 1)
    weights[7] = 0
    labels = rng.choice(k, n, p=weights / weights.sum()).astype(np.int32)
    labels[rng.random(n) < 0.05] = -1
    return labels


def build(labels: np.ndarray, **options) -> EpochPlan:
    return EpochPlan.build(labels, **{"seed": 1, "epoch": 2, "global_batch": 32, **options})


def test_every_non_empty_cluster_gets_its_quota_exactly():
    labels = zipf_labels()
    plan = build(labels)
    valid, clusters = (labels >= 0).sum(), len(np.unique(labels[labels >= 0]))
    assert plan.ids.dtype == np.int64
    assert len(plan.ids) == plan.steps * 32 == valid // 32 * 32
    drawn = np.bincount(labels[plan.ids], minlength=50)
    assert drawn[7] == 0
    assert set(drawn[drawn > 0]) == {len(plan.ids) // clusters, len(plan.ids) // clusters + 1}


def test_a_small_cluster_repeats_evenly_and_a_large_one_never():
    labels = np.repeat(np.arange(3, dtype=np.int32), [5, 200, 1000])
    times = np.bincount(build(labels, global_batch=1).ids, minlength=len(labels))
    quota = len(labels) / 3
    assert set(times[:5]) <= {int(quota // 5), int(quota // 5) + 1}
    assert set(times[5:205]) == {2, 3} or set(times[5:205]) == {2}
    assert set(times[205:]) == {0, 1}


def test_an_excluded_sample_is_never_drawn():
    labels = zipf_labels()
    for mode in plans.MODES:
        assert (labels[build(labels, mode=mode, steps=500).ids] >= 0).all()


def test_a_plan_agrees_with_a_slow_reference_in_what_each_cluster_repeats():
    labels = zipf_labels(600, 9)
    times = np.bincount(build(labels).ids, minlength=len(labels))
    for cluster in set(labels) - {-1}:
        own = np.flatnonzero(labels == cluster)
        quota = times[own].sum()
        expected = [quota // len(own)] * (len(own) - quota % len(own))
        expected += [quota // len(own) + 1] * (quota % len(own))
        assert sorted(times[own]) == expected


def test_the_ranks_of_any_world_hold_the_same_global_batches():
    plan = build(zipf_labels())
    whole = plan.ids.reshape(plan.steps, 32)
    for world in (1, 2, 4, 32):
        parts = [plan.for_rank(rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_resuming_is_a_slice():
    plan = build(zipf_labels())
    np.testing.assert_array_equal(plan.for_rank(1, 2, start_step=9), plan.for_rank(1, 2)[9:])
    assert plan.for_rank(0, 1, start_step=plan.steps).shape == (0, 32)


def test_a_plan_is_a_pure_function_of_its_key():
    labels = zipf_labels()
    same, other = build(labels).ids, build(labels, epoch=3).ids
    np.testing.assert_array_equal(build(labels.astype(np.int64)).ids, same)
    np.testing.assert_array_equal(build(np.stack([labels, labels[::-1]])).ids, same)
    for changed in (other, build(labels, seed=5).ids, build(labels, purpose="round").ids):
        assert (changed != same).mean() > 0.9


def test_steps_may_ask_for_more_or_less_than_the_data_holds():
    labels = zipf_labels()
    for steps in (1, 400):
        plan = build(labels, steps=steps)
        assert len(plan.ids) == 32 * steps
        drawn = np.bincount(labels[plan.ids], minlength=50)[np.unique(labels[labels >= 0])]
        assert drawn.max() - drawn.min() <= 1


def test_every_member_of_a_large_cluster_is_equally_likely_and_everywhere():
    labels = np.repeat(np.arange(2, dtype=np.int32), [400, 100])
    times, places = np.zeros(500), np.zeros(500)
    for epoch in range(400):
        ids = build(labels, epoch=epoch, global_batch=50).ids
        np.add.at(times, ids, 1)
        np.add.at(places, ids, np.arange(len(ids)) / len(ids))
    # 250 of 400 members an epoch: binomial with 400 trials, standard deviation 9.7
    assert abs(times[:400] - 250).max() < 5 * 9.7
    assert abs(times[:400].std() - 9.7) < 1.5
    assert abs(places / times - 0.5).max() < 5 * 0.29 / np.sqrt(times.min())


def test_neighbours_in_the_order_are_independent_of_each_other():
    ids = build(np.zeros(20_000, np.int32), global_batch=100).ids
    assert sorted(ids) == list(range(20_000))
    assert abs(np.corrcoef(ids[1:], ids[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(ids, np.arange(20_000))[0, 1]) < 0.03
    assert (ids % 2)[:10_000].mean() == pytest.approx(0.5, abs=0.025)


def test_lanes_draw_the_same_samples_in_another_order():
    labels, blocks = zipf_labels(), np.arange(0, 4001, 40)
    for mode in plans.MODES:
        plain, laned = build(labels, mode=mode), build(labels, mode=mode, lanes=4, blocks=blocks)
        np.testing.assert_array_equal(np.sort(plain.ids), np.sort(laned.ids))
        assert (plain.ids != laned.ids).mean() > 0.9


def test_a_lane_walks_through_a_few_blocks_at_a_time():
    blocks = np.arange(0, 20_001, 100)  # 200 blocks, 25 windows of 8
    plan = build(np.zeros(20_000, np.int32), lanes=4, blocks=blocks)
    lane = plan.ids.reshape(plan.steps, 4, 8)[:, 1].reshape(-1)
    windows = lane[: len(lane) // 800 * 800].reshape(-1, 800)
    assert all(len(np.unique(window // 100)) <= 3 * plans.WINDOW for window in windows)
    assert len(np.unique(lane // 100)) < 200 / 4 + 2 * plans.WINDOW
    assert abs(np.corrcoef(lane[1:801], lane[:800])[0, 1]) < 0.2


def test_lanes_without_blocks_take_even_ones(monkeypatch):
    monkeypatch.setattr(plans, "BLOCK", 40)
    labels = zipf_labels()
    given = build(labels, lanes=2, blocks=np.arange(0, 4001, 40))
    np.testing.assert_array_equal(build(labels, lanes=2).ids, given.ids)


def test_paper_mode_is_deepclusters_draw():
    labels = zipf_labels()
    plan = build(labels, mode="paper")
    sizes = np.bincount(labels[labels >= 0])
    share = (labels >= 0).sum() // np.count_nonzero(sizes) + 1
    times, drawn = np.bincount(plan.ids), np.bincount(labels[plan.ids], minlength=50)
    assert drawn.max() <= share  # the cut takes some away
    assert drawn.sum() == len(plan.ids)
    large = sizes[labels[: len(times)]] > share
    assert times[large].max() == 1  # without replacement
    smallest = np.argmin(np.where(sizes > 0, sizes, 1 << 30))
    assert np.ptp(times[np.flatnonzero(labels == smallest)]) > 1  # with replacement: uneven


def test_one_sample_alone_can_be_planned():
    plan = build(np.array([-1, 3, -1], np.int32), global_batch=1)
    assert plan.ids.tolist() == [1]
    assert build(np.array([-1, 3, -1], np.int32), global_batch=4, steps=2).ids.tolist() == [1] * 8


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        (np.full(9, -1, np.int32), {"steps": 1}, DataError, "every sample is excluded"),
        (np.zeros(31, np.int32), {}, DataError, "train.batch to at most 31"),
        (np.zeros(99), {}, DataError, "must be integers"),
        (np.zeros(99, np.int32), {"mode": "uniform"}, RecipeError, "exact, paper"),
        (np.zeros(99, np.int32), {"lanes": 5}, RecipeError, "5 lanes do not divide"),
        (np.zeros(99, np.int32), {"global_batch": 0}, RecipeError, "at least 1"),
        (np.zeros(99, np.int32), {"global_batch": 8.0}, RecipeError, "global_batch=8.0"),
        (np.zeros(99, np.int32), {"seed": None}, RecipeError, "seed=None"),
        (np.zeros(99, np.int32), {"epoch": 1.5}, RecipeError, "epoch=1.5"),
        (np.full(99, 2**31), {}, DataError, "reach 2147483648"),
        ([[0, 1], [2]], {}, DataError, "not an array"),
        (["cat"] * 99, {}, DataError, "must be integers"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_says_why(labels, options, error, words):
    with pytest.raises(error, match=words):
        build(labels, **options)


def test_a_batch_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(RecipeError, match="over 3 ranks"):
        build(zipf_labels()).for_rank(0, 3)
    with pytest.raises(RecipeError, match="rank 2"):
        build(zipf_labels()).for_rank(2, 2)


@pytest.mark.parametrize("lanes", [None, 4])
def test_a_mixed_plan_has_both_plans_batches_in_every_lane(lanes: int | None) -> None:
    labels = (np.arange(600) % 5).astype(np.int32)
    some = np.where(np.arange(600) < 20, labels, -1).astype(np.int32)
    own = EpochPlan.build(labels, 0, 1, 24, 6, lanes)
    other = EpochPlan.build(some, 0, 1, 8, 6, lanes, purpose="labelled")
    both = own.mixed(other, lanes)
    assert (both.steps, both.global_batch) == (6, 32)
    for step in range(6):
        parts = (p.ids.reshape(6, -1)[step] for p in (own, other))
        found = both.ids.reshape(6, -1)[step]
        np.testing.assert_array_equal(np.sort(found), np.sort(np.concatenate(list(parts))))
    for rank in range(4):  # labelled samples are spread over the ranks
        assert np.isin(both.for_rank(rank, 4), np.arange(20)).sum(1).min() >= 2


def test_lists_and_tensors_are_assignments_too() -> None:
    labels = zipf_labels(400)
    plain = build(labels).ids
    for same in (labels.tolist(), torch.from_numpy(labels), torch.from_numpy(labels)[None].long()):
        np.testing.assert_array_equal(build(same).ids, plain)
    wide = np.where(labels < 0, -(2**40), labels.astype(np.int64))
    np.testing.assert_array_equal(build(wide).ids, plain)


@pytest.mark.parametrize(("lanes", "mode"), [(None, "exact"), (4, "exact"), (None, "paper")])
def test_weighted_sources_have_their_shares_of_every_epoch_exactly(
    lanes: int | None, mode: str
) -> None:
    sources = np.repeat([0, 1, 2], [300, 40, 700]).astype(np.int32)
    sources[::50] = -1
    plan = EpochPlan.build(
        sources, 0, 3, global_batch=20, steps=35, lanes=lanes, mode=mode, weights=[2, 1, 0.5]
    )
    assert np.bincount(sources[plan.ids]).tolist() == [400, 200, 100]
    times = np.bincount(plan.ids, minlength=len(sources))
    assert set(times[sources == 1]) == {5, 6}  # a small source repeats evenly
    assert set(times[sources == 2]) == {0, 1}
    halves = [plan.for_rank(rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves, axis=1).ravel(), plan.ids)


def test_shares_that_do_not_divide_the_epoch_are_less_than_a_draw_away() -> None:
    sources = np.repeat([0, 1, 3], 50).astype(np.int32)  # 2 is empty
    for epoch in range(5):
        plan = EpochPlan.build(sources, 0, epoch, 10, steps=10, weights=[1, 1, 9, 1])
        assert sorted(np.bincount(sources[plan.ids])) == [0, 33, 33, 34]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, float("nan")], [1, -1]])
def test_weights_that_give_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(RecipeError, match="weights"):
        EpochPlan.build([0, 1, 0, 1], 0, 0, 2, weights=weights)
