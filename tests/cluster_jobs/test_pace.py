"""How long a run will go on counts the rounds to come, and `status` shows it at 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster_jobs.cli.common import terminal_width
from cluster_jobs.display import Display, status_table
from cluster_jobs.pace import Pace, pace_of
from cluster_jobs.status import Status, _phase, status
from cluster_jobs.terminal import duration
from deepclust import pretrain
from deepclust.run.checkpoint import State
from deepclust.run.directory import Run
from deepclust.stages.schedule import Timeline
from tests.tiny import tiny_recipe, tiny_shards


def records(upto: float, *, step_s: float = 2.0, round_s: float = 30.0):
    """What a run of 4 rounds of 10 steps writes until a moment: 5 rounds with the final one."""
    events, metrics, now = [{"event": "started", "time": 0.0}], [], 5.0
    for number in range(4):
        events.append({"event": "checkpoint", "time": now, "step": 10 * number})
        now += round_s
        segment = {"round": number, "segment": number, "step": 10 * number}
        left = {"steps": 40, "rounds_left": 4 - number}
        events.append({"event": "training", "time": now, **segment, **left})
        for step in range(1, 11):
            now += step_s
            metrics.append({"step": 10 * number + step, "loss": 1.0, "time": now})
    known = [[one for one in some if one["time"] <= upto] for some in (events, metrics)]
    return known[0], known[1], now + round_s


@pytest.mark.parametrize("now", [45.0, 60.0, 80.0, 90.0, 130.0, 200.0])
def test_what_is_left_counts_steps_and_rounds_to_come(now):
    events, metrics, end = records(now)
    pace = pace_of(events, metrics)
    assert pace.left(now) == pytest.approx(end - now)
    assert pace.spent(now) == pytest.approx(now)


def test_a_slow_first_round_is_not_taken_for_the_others():
    events, metrics, end = records(90.0)
    late = [{**one, "time": one["time"] + 100.0} for one in events[1:]]
    lines = [{**one, "time": one["time"] + 100.0} for one in metrics]
    late[0]["time"] -= 100.0  # the first round took 130 s, the second 30 s
    pace = pace_of([events[0], *late], lines)
    assert pace.left(190.0) == pytest.approx(end - 90.0)


def test_nothing_is_said_before_there_is_anything_to_go_by():
    events, metrics, _ = records(39.0)
    assert pace_of(events, metrics).left(39.0) is None
    assert Pace().left(0.0) is None


def test_the_time_between_two_attempts_is_no_time_of_the_run():
    events, metrics, _ = records(60.0)
    events += [{"event": "stopped", "time": 60.0}, {"event": "started", "time": 1000.0}]
    events += [{"event": "restored", "time": 1010.0, "step": 10}]
    pace = pace_of(events, metrics)
    assert pace.started == 0.0
    assert pace.spent(1020.0) == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("words", "rounds"),
    [
        (("cluster.every=1 epoch", "train.epochs=4"), 4),
        (("cluster.every=3 epochs", "train.epochs=4"), 2),
        (("cluster.every=1 epoch", "train.epochs=4", "cluster.until=2"), 2),
        (("cluster.every=6 steps", "train.epochs=2"), 4),
        (("cluster.every=4 rounds", "train.epochs=2"), 4),
    ],
)
@pytest.mark.parametrize("final", [True, False])
def test_every_segment_knows_how_many_rounds_are_to_come(words, rounds, final):
    recipe = tiny_recipe(Path("x"), *words, f"cluster.final={str(final).lower()}")
    timeline = Timeline.of(recipe, 240)
    assert timeline.rounds_after(State(round=0)) == rounds - 1 + final


def test_a_real_run_says_its_steps_and_rounds_and_ends_with_none(tmp_path):
    shards = tiny_shards(tmp_path / "shards")
    seen = io.StringIO()
    with Display(Console(file=seen, width=200)) as display:
        pretrain(tiny_recipe(shards, "cluster.final=true"), tmp_path / "run", show=display)
    run = Run(tmp_path / "run")
    training = [event for event in run.events() if event["event"] == "training"]
    assert [(one["steps"], one["rounds_left"]) for one in training] == [(24, 2), (24, 1)]
    assert display.pace.left(0.0) == 0.0
    one = status(run)
    times = [event["time"] for event in run.events()]
    assert one.elapsed == pytest.approx(times[-1] - times[0])
    assert one.eta is None
    assert one.started == times[0]


def test_status_is_whole_at_80_columns():
    one = Status(
        "a-run-with-a-very-long-name-of-a-sweep-cluster.k=1000", "RECOVERING", "train", 200,
        epoch=12.5, loss=1.234, started=1.7e9, elapsed=4800.0, eta=86400.0 * 3,
        reason="a long reason " * 9,
    )  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=80).print(status_table([one], 80))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("RECOVERING", "12.5 of", "1 h 20", "3 d 0 h", "1.234"):
        assert word in text
    assert text.count("reason") == 9
    assert terminal_width() == 200  # there is no terminal


def test_a_duration_is_in_words():
    assert [duration(s) for s in (4.4, 125, 3725, 200000)] == [
        "4.4 s", "2 min 5 s", "1 h 2 min", "2 d 7 h"
    ]  # fmt: skip


def test_a_checkpoint_before_the_first_round_is_not_training():
    events = [{"event": name} for name in ("started", "checkpoint", "unit", "extracted")]
    assert [_phase(events[: n + 1]) for n in range(4)] == ["start", "start", "extract", "whiten"]
