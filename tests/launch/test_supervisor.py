"""How an attempt ends, by what is known of its members; and what the budgets allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepclust.errors import DataError, NumericalError, ResourceError
from deepclust.launch.endings import Ending, Member, classify
from deepclust.launch.policy import LOSS_S, Budget, Policy, progress_on_disk
from deepclust.launch.role import CLUSTER_WORKER
from deepclust.run.directory import Run

POLICY = Policy(hang=10.0, stop=20.0, start=30.0, failures=2, preemptions=1)
NOW = 1000.0


def result(text: str, kind: str = "RuntimeError", exit_code: int = 1) -> dict[str, Any]:
    return {"result": {"failed": text, "kind": kind, "exit_code": exit_code}}


WELL: dict[str, Any] = {"result": {}}
STOPPED = result("stopped on request at step 3", "RequeueWanted", 75)
BAD_DATA = result("3 images cannot be read", "DataError", 3)
NAN = result("collapsed", "NumericalError", 6)
BROKEN = result("Connection closed by peer")
FOLLOWER = result("rank 1 failed", "FollowedError", 4)
MEMORY = result("out of memory", "ResourceError", 4)
KILLED = {"death": "was killed by signal 9"}
NODE = {"death": "node 1 is gone", "cause": "node"}
LOST = {"unreachable": True}
WORKS: dict[str, Any] = {"idle_s": 0.1}


def group(*records: dict[str, Any], ago: float = 0.0) -> list[Member]:
    """Two ranks and the cluster worker, each with its last record."""
    names = [(0, "rank 0"), (1, "rank 1"), (CLUSTER_WORKER, "cluster worker")]
    members = [Member(rank, name, began=NOW - 100, answered=NOW) for rank, name in names]
    for member, record in zip(members, records, strict=True):
        member.update(record, NOW - ago)
    return members


@pytest.mark.parametrize(
    ("records", "ending"),
    [
        ((WORKS, WORKS, WORKS), None),
        ((WELL, WORKS, WORKS), None),
        ((WELL, WELL, WORKS), ("finished", "", "death")),
        ((STOPPED, WORKS, WORKS), None),
        ((STOPPED, STOPPED, WORKS), ("stopped", "", "death")),
        ((WORKS, KILLED, WORKS), ("fault", "rank 1", "death")),
        ((BROKEN, KILLED, WORKS), ("fault", "rank 1", "death")),
        ((BROKEN, WORKS, NODE), ("fault", "cluster worker", "node")),
        ((KILLED, BAD_DATA, WORKS), ("failed", "rank 1", "death")),
        ((FOLLOWER, MEMORY, WORKS), ("fault", "rank 1", "error")),
        ((BROKEN, MEMORY, WORKS), ("fault", "rank 1", "error")),
        ((FOLLOWER, BROKEN, WORKS), ("fault", "rank 1", "error")),
        ((FOLLOWER, FOLLOWER, WORKS), ("fault", "rank 0", "error")),
        ((BROKEN, LOST, WORKS), None),
        ((WORKS, WORKS, WELL), None),
        ((WORKS, WORKS, NAN), None),
    ],
)
def test_an_attempt_ends_by_the_member_that_began_it(
    records: tuple[dict[str, Any], ...], ending: tuple[str, str, str] | None
) -> None:
    decided = classify(group(*records), NOW, POLICY)
    assert (decided and (decided.kind, decided.who, decided.cause)) == ending


def test_an_error_is_blamed_on_one_rank_only_after_waiting_for_the_others() -> None:
    assert classify(group(BROKEN, WORKS, WORKS, ago=1.0), NOW, POLICY) is None
    decided = classify(group(BROKEN, WORKS, WORKS, ago=3.0), NOW, POLICY)
    assert (decided and decided.who, decided and decided.cause) == ("rank 0", "error")
    alone = classify(group(WORKS, WORKS, NAN, ago=3.0), NOW, POLICY)
    assert alone is not None
    assert isinstance(alone.error, NumericalError)


def test_a_member_out_of_reach_is_waited_for_longer() -> None:
    assert classify(group(BROKEN, LOST, WORKS, ago=LOSS_S - 1), NOW, POLICY) is None
    decided = classify(group(BROKEN, LOST, WORKS, ago=LOSS_S + 1), NOW, POLICY)
    assert (decided and decided.who, decided and decided.cause) == ("rank 1", "death")


def test_an_error_that_no_restart_mends_keeps_its_kind() -> None:
    decided = classify(group(KILLED, BAD_DATA, WORKS), NOW, POLICY)
    assert decided is not None
    assert isinstance(decided.error, DataError)


def test_a_cluster_worker_that_leaves_first_is_a_fault_unless_all_are_asked_to_stop() -> None:
    members = group(WORKS, WORKS, WELL, ago=3.0)
    decided = classify(members, NOW, POLICY)
    assert (decided and decided.who) == "cluster worker"
    assert classify(members, NOW, POLICY, stop_asked=NOW - 1) is None


def test_ranks_that_do_not_stop_in_time_are_stopped() -> None:
    members = group(WORKS, STOPPED, WORKS)
    assert classify(members, NOW, POLICY, stop_asked=NOW - 19) is None
    decided = classify(members, NOW, POLICY, stop_asked=NOW - 21)
    assert (decided and decided.kind) == "stopped"


@pytest.mark.parametrize(
    ("answered_ago", "idle", "who"),
    [
        ((0, 0, 0), (1.0, 1.0, 1.0), None),
        ((0, 11, 0), (16.0, 6.0, 1.0), "rank 1"),  # stopped: it does not even answer
        ((0, 0, 11), (1.0, 1.0, 1.0), "cluster worker"),
        ((0, 0, 0), (16.0, 17.0, 1.0), "rank 1"),  # both get nowhere: the longest
        ((0, 0, 0), (1.0, 40.0, 1.0), None),  # rank 1 waits for rank 0, which works
        ((0, 0, 0), (1.0, 1.0, 16.0), "cluster worker"),
        ((0, 0, 0), (None, None, None), None),  # they have not begun
    ],
)
def test_a_hang_is_no_answer_or_no_sign_of_life(
    answered_ago: tuple[float, ...], idle: tuple[float | None, ...], who: str | None
) -> None:
    members = group(WORKS, WORKS, WORKS)
    for member, ago, idle_s in zip(members, answered_ago, idle, strict=True):
        member.answered, member.idle_s = NOW - ago, idle_s
    decided = classify(members, NOW, POLICY)
    assert (decided and decided.who) == who
    assert decided is None or (decided.kind, decided.cause) == ("fault", "hang")


def test_silence_of_a_member_out_of_reach_is_no_hang_while_its_node_may_be_dead() -> None:
    members = group(WORKS, LOST, WORKS)  # rank 0 waits for rank 1 without a connection to it
    for ago in (11.0, LOSS_S - 1):
        members[0].answered, members[0].idle_s, members[1].idle_s = NOW, ago, 0.0
        members[1].answered = NOW - ago
        assert classify(members, NOW, POLICY) is None
    members[1].answered = NOW - LOSS_S - 1
    decided = classify(members, NOW, POLICY)
    assert (decided and decided.who, decided and decided.cause) == ("rank 1", "hang")


def test_a_rank_that_waited_for_one_that_has_ended_has_time_to_end_too() -> None:
    members = group(WELL, WORKS, WORKS)
    members[1].idle_s = 40.0
    assert classify(members, NOW + 1, POLICY) is None
    members[1].answered = members[2].answered = NOW + 16
    decided = classify(members, NOW + 16, POLICY)
    assert (decided and decided.who, decided and decided.cause) == ("rank 1", "hang")


def test_a_process_that_still_starts_has_longer() -> None:
    members = group(WORKS, WORKS, WORKS)
    members[1].answered, members[1].idle_s, members[1].began = None, None, NOW - 29
    members[0].answered, members[0].idle_s = NOW - 29, None
    assert classify(members, NOW, POLICY) is None
    members[0].answered = NOW
    text = "no answer for 31 s (train.hang=10)"
    assert classify(members, NOW + 2, POLICY) == Ending("fault", "rank 1", "hang", text)


def test_faults_are_counted_by_kind_and_without_progress_three_are_enough() -> None:
    budget = Budget(POLICY)
    budget.spend("death", "rank 1", progress=True)
    budget.spend("hang", "rank 1", progress=True)
    budget.spend("preemption", "rank 1", progress=True)
    with pytest.raises(ResourceError, match=r"more preemptions than ray.max_preemptions=1"):
        budget.spend("preemption", "rank 1", progress=True)
    with pytest.raises(ResourceError, match=r"more faults than train.restarts=2"):
        budget.spend("error", "rank 1", progress=True)
    budget = Budget(Policy(failures=10))
    for progress in (False, False, True, False, False):
        budget.spend("death", "rank 1", progress)
    with pytest.raises(ResourceError, match="3 attempts in a row made no progress"):
        budget.spend("death", "rank 1", progress=False)


def test_every_commit_is_progress(tmp_path: Path) -> None:
    run, seen = Run(tmp_path), [progress_on_disk(Run(tmp_path))]
    for done in ("checkpoints/00000010/DONE", "rounds/0000/raw/unit-00000", "rounds/0000/raw/DONE"):
        (tmp_path / done).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / done).touch()
        seen.append(progress_on_disk(run))
    assert len(set(seen)) == len(seen)
