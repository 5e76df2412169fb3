"""Who began it: the member that a fault is laid to, by what is known of all of them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster_jobs.ray.faults import ALONE, Seated, all_stopped, first_line, hang, why, worker_left
from deepclust.errors import DataError, NumericalError
from deepclust.launch.role import CLUSTER_WORKER


def told(text: str, kind: str = "RuntimeError", exit_code: int = 1) -> dict[str, Any]:
    return {"failed": text, "kind": kind, "exit_code": exit_code}


STOPPED = told("stopped at step 3, as asked", "RequeueWanted", 75)


def gang(*results: dict[str, Any] | None, worker: dict[str, Any] | None = None) -> list[Seated]:
    ranks = [Seated(f"rank {i}", i, None, result=result) for i, result in enumerate(results)]
    return [*ranks, Seated("cluster worker", CLUSTER_WORKER, None, result=worker)]


def test_bad_data_are_told_as_they_are_even_beside_a_death() -> None:
    members = gang(None, told("3 images cannot be read", "DataError", 3))
    members[0].death = ALONE
    found = why(members)
    assert (found.kind, found.who) == ("failed", "rank 1")
    assert isinstance(found.error, DataError)


def test_a_death_comes_before_what_its_followers_tell() -> None:
    members = gang(told("Connection closed by peer"), None)
    members[1].death = f"The actor is dead because its {ALONE}."
    found = why(members)
    assert (found.kind, found.who, found.cause) == ("fault", "rank 1", "death")


def test_a_follower_is_named_only_when_nobody_else_is_left() -> None:
    follower = told("rank 1 failed", "FollowedError", 4)
    found = why(gang(follower, told("CUDA out of memory", "ResourceError", 4)))
    assert (found.who, found.cause) == ("rank 1", "error")
    assert why(gang(follower, None)).who == "rank 0"


def test_a_cluster_worker_that_leaves_first_is_a_fault() -> None:
    members = gang(None, None, worker={})
    assert worker_left(members)
    assert why(members).who == "cluster worker"


def test_all_have_stopped_only_when_all_say_so() -> None:
    assert all_stopped(gang(STOPPED, STOPPED)[:2])
    assert not all_stopped(gang(STOPPED, None)[:2])
    assert not all_stopped(gang(STOPPED, {})[:2])


def test_nan_in_the_cluster_worker_ends_the_run() -> None:
    found = why(gang(None, None, worker=told("collapsed", "NumericalError", 6)))
    assert isinstance(found.error, NumericalError)


@pytest.mark.parametrize(
    ("silent", "idle", "who"), [(20.0, 20.0, "rank 1"), (0.0, 20.0, "rank 0"), (0.0, 1.0, None)]
)
def test_who_does_not_answer_hangs_and_else_who_gets_nowhere(
    silent: float, idle: float, who: str | None
) -> None:
    members = gang(None, None)
    members[1].answered = time.monotonic() - silent
    for member in members[:2]:
        member.idle_s = idle
    found = hang(members, 10.0)
    assert (found and found.who) == who


def test_a_rank_that_has_not_begun_and_a_worker_that_computes_do_not_hang() -> None:
    members = gang(None, None)
    members[2].idle_s = 1e6  # k-means may take its time
    assert hang(members, 10.0) is None


def test_of_a_long_message_the_line_that_says_what_happened_is_kept() -> None:
    error = RuntimeError("The actor died.\n\tpid: 7\nThe actor is dead because its node died.\n")
    assert first_line(error) == "The actor is dead because its node died."
    assert first_line(ValueError("")) == "ValueError"
