from __future__ import annotations

from pathlib import Path

import pytest

from deepclust.errors import DataError
from deepclust.run.checkpoint import State
from deepclust.stages.schedule import Timeline
from tests.tiny import tiny_recipe


def rounds(timeline: Timeline) -> list[int]:
    """The round of every segment, and a check that a refresh is due exactly where it changes."""
    state, seen = State(), []
    while not timeline.finished(state):
        due = timeline.refresh_due(state)
        assert due == (timeline.round_of(state) != state.round)
        state = state.in_round(timeline.round_of(state))
        seen.append(state.round)
        for _ in range(timeline.steps(state) or timeline.epoch_steps):
            state = state.after_step(24)
        state = state.after_segment()
    return seen


def timeline(tmp_path: Path, *overrides: str, n: int = 240) -> Timeline:
    return Timeline.of(tiny_recipe(tmp_path, "train.epochs=6", *overrides), n)


def rounds_ahead(timeline: Timeline) -> list[int | None]:
    """The round that is begun before every segment, for the next boundary."""
    state, seen = State(), []
    while not timeline.finished(state):
        seen.append(timeline.round_ahead(state))
        for _ in range(timeline.steps(state) or timeline.epoch_steps):
            state = state.after_step(24)
            assert state.offset == 0 or timeline.round_ahead(state) is None
        state = state.after_segment()
    return seen


def test_every_epoch_has_a_round_of_its_own(tmp_path: Path) -> None:
    assert rounds(timeline(tmp_path)) == [0, 1, 2, 3, 4, 5]


def test_a_round_may_last_several_epochs(tmp_path: Path) -> None:
    assert rounds(timeline(tmp_path, "cluster.every=4 epochs")) == [0, 0, 0, 0, 1, 1]


def test_no_round_begins_from_epoch_until_on(tmp_path: Path) -> None:
    assert rounds(timeline(tmp_path, "cluster.until=2")) == [0, 1, 1, 1, 1, 1]


def test_rounds_of_steps_share_out_all_steps(tmp_path: Path) -> None:
    found = timeline(tmp_path, "cluster.every=25 steps")  # 60 steps in all
    assert rounds(found) == [0, 1, 2]
    steps = [found.steps(State(step=step, segment=s)) for s, step in enumerate((0, 25, 50))]
    assert steps == [25, 25, 10]


def test_a_longer_run_trains_all_its_steps(tmp_path: Path) -> None:
    ended = State(step=60, segment=3, round=2)
    assert timeline(tmp_path, "cluster.every=25 steps").finished(ended)
    longer = timeline(tmp_path, "cluster.every=25 steps", "train.epochs=7")
    assert not longer.finished(ended)
    assert longer.steps(ended) == 10


def test_rounds_of_steps_stop_too(tmp_path: Path) -> None:
    found = timeline(tmp_path, "cluster.every=10 steps", "cluster.until=2")
    assert rounds(found) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "trained_on", "begun"),
    [
        ((), [0, 0, 1, 2, 3, 4], [None, 1, 2, 3, 4, None]),
        (("cluster.every=2 epochs",), [0, 0, 0, 0, 1, 1], [None, None, 1, None, None, None]),
        (("cluster.every=4 epochs",), [0, 0, 0, 0, 0, 0], [None] * 6),
        (("cluster.until=4",), [0, 0, 1, 2, 2, 2], [None, 1, 2, None, None, None]),
        (("cluster.every=15 steps",), [0, 0, 1, 2], [None, 1, 2, None]),  # 60 steps in all
        (("cluster.every=25 steps",), [0, 0, 1], [None, 1, None]),
        (("cluster.every=10 steps", "cluster.until=3"), [0, 0, 1, 1, 1, 1], [None, 1] + [None] * 4),
    ],
)
def test_with_overlap_a_round_is_adopted_one_boundary_after_it_was_begun(
    tmp_path: Path, overrides: tuple[str, ...], trained_on: list[int], begun: list[int | None]
) -> None:
    found = timeline(tmp_path, "cluster.overlap=true", *overrides)
    assert rounds(found) == trained_on
    assert rounds_ahead(found) == begun


def test_without_overlap_no_round_is_begun_ahead(tmp_path: Path) -> None:
    assert rounds_ahead(timeline(tmp_path)) == [None] * 6


def test_a_run_made_longer_begins_rounds_ahead_again(tmp_path: Path) -> None:
    ended = State(step=60, segment=6, round=4)
    longer = timeline(tmp_path, "cluster.overlap=true", "train.epochs=8")
    assert (longer.round_of(ended), longer.round_ahead(ended)) == (5, 6)


def test_inside_a_segment_nothing_is_due(tmp_path: Path) -> None:
    assert not timeline(tmp_path).refresh_due(State(segment=2, offset=1, round=1))


def test_fewer_images_than_a_batch_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"23 images, fewer than one batch of 24.*lower"):
        timeline(tmp_path, n=23)


def test_counted_rounds_are_spread_over_the_run_ever_more_seldom(tmp_path: Path) -> None:
    found = timeline(tmp_path, "cluster.every=6 rounds")  # 60 steps in all
    assert rounds(found) == [0, 1, 2, 3, 4, 5]
    starts = [0, 1, 6, 15, 26, 41]  # 60 i^2 / 36
    steps = [found.steps(State(step=step, segment=s)) for s, step in enumerate(starts)]
    assert steps == [1, 5, 9, 11, 15, 19]
    assert found.steps(State(step=8, segment=2, offset=2)) == 9  # resumed inside a round


def test_many_counted_rounds_begin_one_step_after_another(tmp_path: Path) -> None:
    assert rounds(timeline(tmp_path, "cluster.every=60 rounds")) == [*range(60)]
    with pytest.raises(DataError, match="61 rounds do not fit into 60 steps"):
        timeline(tmp_path, "cluster.every=61 rounds")


def test_counted_rounds_stop_too_and_may_overlap(tmp_path: Path) -> None:
    assert rounds(timeline(tmp_path, "cluster.every=6 rounds", "cluster.until=2")) == [
        0, 1, 2, 3, 3, 3,
    ]  # fmt: skip
    ahead = timeline(tmp_path, "cluster.every=4 rounds", "cluster.overlap=true")
    assert rounds(ahead) == [0, 0, 1, 2]
    assert rounds_ahead(ahead) == [None, 1, 2, None]


def test_a_run_of_counted_rounds_made_longer_trains_on_the_last(tmp_path: Path) -> None:
    ended = State(step=60, segment=6, round=5)
    longer = timeline(tmp_path, "cluster.every=6 rounds", "train.epochs=7")
    assert not longer.finished(ended)
    assert not longer.refresh_due(ended)
    assert longer.steps(ended) == 10
