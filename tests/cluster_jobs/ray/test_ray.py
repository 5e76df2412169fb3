"""Runs on a real Ray of several nodes: the same bits as a local run, whatever is lost meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs import job_file, status
from deepclust import Recipe, pretrain
from deepclust.launch.start import prepare_run
from deepclust.run.directory import Run
from deepclust.run.lock import owner_pid
from tests.cluster_jobs.ray.nodes import (
    Nodes,
    begin,
    controller,
    end,
    events,
    placed_at,
    send,
    until,
)
from tests.killing import (
    clustering,
    family,
    redone_steps,
    stages_done_twice,
    start,
    training,
)
from tests.tiny import assert_same_run, assignments, deepclust, tiny_recipe, tiny_shards

pytestmark = pytest.mark.slow

Moment = Callable[[Path], bool]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(3)
    yield found
    found.close()


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """The addresses at which a process listens on TCP."""
    held = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    found: list[IPv4Address | IPv6Address] = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            (
                _,
                address,
                _,
                state,
                *_,
            ) = line.split()
            if state == "0A" and f"socket:[{line.split()[9]}]" in held:
                found.append(_address(address.partition(":")[0]))
    return found


def _address(text: str) -> IPv4Address | IPv6Address:
    """Of the kernel's table: words of four bytes, each with its last byte first."""
    words = bytes.fromhex(text)
    raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    address = ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def recipe(shards: Path, *overrides: str) -> Recipe:
    return tiny_recipe(shards, "train.ranks=2", "train.epochs=3", "ray.hang=6", *overrides)


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, of two local ranks."""
    path = tmp_path_factory.mktemp("runs") / "local"
    pretrain(recipe(shards), path)
    return path


def test_two_trainers_and_a_cluster_worker_on_three_nodes_do_what_local_ranks_do(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path
) -> None:
    end(begin(nodes, recipe(shards), tmp_path / "run"))
    assert_same_run(tmp_path / "run", local)
    members = events(tmp_path / "run", "placed")[0]["members"]
    assert [m["who"] for m in members] == ["rank 0", "rank 1", "cluster worker"]
    assert len({m["node"] for m in members}) == 3
    assert status.status(Run(tmp_path / "run")).state == "SUCCEEDED"
    for log in ("rank-00000.log", "rank-00001.log", "cluster-worker.log", "controller.log"):
        assert (tmp_path / "run" / "logs" / log).exists()


def in_training(nodes: Nodes, shards: Path, run: Path) -> subprocess.Popen[str]:
    """A run on Ray in the middle of its second round."""
    process = begin(nodes, recipe(shards), run)
    until(process, lambda: training(run))
    return process


FAULTS: list[tuple[str, int, Moment, str]] = [
    ("cluster worker", signal.SIGKILL, clustering, "death"),
    ("rank 1", signal.SIGSTOP, training, "hang"),
]


@pytest.mark.parametrize(("who", "number", "moment", "cause"), FAULTS)
def test_a_group_that_loses_a_member_restarts_without_losing_work(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path, who: str, number: int,
    moment: Moment, cause: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    process = begin(nodes, recipe(shards, "data.extract_batch=8"), run)
    until(process, lambda: moment(run))
    send(run, who, number)
    end(process)
    fault = events(run, "fault")
    assert [(f["who"], f["cause"]) for f in fault] == [(who, cause)], fault
    assert stages_done_twice(run) == []
    assert redone_steps(run) <= 12
    assert all(
        np.array_equal(a, b) for a, b in zip(assignments(run), assignments(local), strict=True)
    )


def test_a_lost_node_leaves_fewer_ranks_and_a_new_one_brings_more_at_the_next_round(
    shards: Path, tmp_path: Path
) -> None:
    nodes, run = Nodes(3), tmp_path / "run"
    elastic = recipe(shards, "train.epochs=6", "ray.ranks={min: 1, max: 2}", "ray.settle=1")
    elastic = elastic.replace("cluster.where=worker")
    try:
        process = begin(nodes, elastic, run)
        until(process, lambda: training(run))
        nodes.remove(placed_at(run, "rank 1")["node"])
        until(process, lambda: len(events(run, "placed")) == 2)
        nodes.add()
        end(process)
    finally:
        nodes.close()
    assert [f["cause"] for f in events(run, "fault")] == ["node"]
    assert [e["ranks"] for e in events(run, "started")] == [2, 1, 2]
    assert len(events(run, "growing")) == 1
    assert stages_done_twice(run) == []
    assert Run(run).rounds() == list(range(6))


def test_a_cluster_that_is_too_small_is_waited_for_and_then_refused_by_name(
    nodes: Nodes, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = begin(nodes, recipe(shards, "ray.cpus=2", "ray.wait=3"), run)
    until(process, lambda: events(run, "waiting"))
    state = status.status(Run(run))
    assert state.state == "PENDING"
    assert "4 CPU more than the cluster has" in state.reason
    assert "2 ranks (2 CPU each) and the cluster worker (1 CPU)" in end(process, code=4)
    assert status.status(Run(run)).state == "FAILED"


def test_a_second_controller_is_refused_with_the_name_of_the_first(
    nodes: Nodes, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = begin(nodes, recipe(shards), run)
    until(first, lambda: events(run, "started"))
    assert f"is held by process {first.pid} on" in end(controller(nodes, run), code=7)
    end(first)


def test_a_dead_controllers_lock_is_taken_over_and_its_group_is_gone(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = in_training(nodes, shards, run)
    first.kill()
    first.communicate()
    end(controller(nodes, run))
    assert_same_run(run, local)
    assert stages_done_twice(run) == []


def test_a_request_to_cancel_stops_at_a_step_and_resume_continues(
    nodes: Nodes, shards: Path, local: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = in_training(nodes, shards, run)
    job_file.ask_to_cancel(run)
    end(process, code=75)
    state = status.status(Run(run))
    assert state.state == "STOPPED"
    assert "on request" in state.reason
    assert not job_file.stopping(run, [])
    end(controller(nodes, run))
    assert_same_run(run, local)


def test_bad_data_end_the_run_at_once_with_their_own_exit_code(
    nodes: Nodes, shards: Path, tmp_path: Path
) -> None:
    few = recipe(shards, "cluster.k=400")
    assert "400" in end(begin(nodes, few, tmp_path / "run"), code=3)
    assert events(tmp_path / "run", "fault") == []


def test_three_attempts_without_progress_are_enough(
    nodes: Nodes, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    prepare_run(recipe(shards, "train.timeout=0.001"), run)
    output = end(controller(nodes, run), code=4)
    assert "3 attempts in a row made no progress on disk" in output
    assert len(events(run, "started")) == 3


def test_a_submitted_run_is_a_ray_job_that_continues_after_its_submitter_is_killed(
    shards: Path, local: Path, tmp_path: Path
) -> None:
    nodes, run = Nodes(3, dashboard=True), tmp_path / "run"
    recipe(shards).save(tmp_path / "tiny.yaml")
    try:
        submit = ["submit", tmp_path / "tiny.yaml", "--on", "ray", "--address", nodes.address]
        waiting = start(*submit, "--run", run, "--wait")
        until(waiting, lambda: training(run))
        waiting.kill()
        waiting.wait()
        # here, since a command would take longer than the rest of the run
        assert status.status(Run(run)).state == "RUNNING"
        deepclust("logs", run, "-f")
        assert status.status(Run(run)).state == "SUCCEEDED"
        assert job_file.read(run)["submission"].startswith("deepclust-run-")
        assert "is not running" in deepclust("cancel", run).stderr
        deepclust("resume", run, "--on", "ray")
    finally:
        nodes.close()
    assert_same_run(run, local)


def test_without_an_address_a_run_gets_a_ray_of_its_own_on_loopback(
    shards: Path, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", tmp_path / "tiny.yaml"
    recipe(shards, "train.epochs=12").save(file)
    deepclust("submit", file, "--on", "ray", "--run", run)
    while not training(run):
        assert status.status(Run(run)).state in ("PENDING", "RUNNING")
        time.sleep(0.05)
    opened = [address for pid in family(owner_pid(run) or 0) for address in listening(pid)]
    assert opened
    assert [address for address in opened if not address.is_loopback] == []
    deepclust("cancel", run)
    assert status.status(Run(run)).state == "STOPPED"
    deepclust("resume", run, "--on", "ray")
    deepclust("logs", run, "-f")
    assert Run(run).rounds() == list(range(12))
    assert len(events(run, "started")) == 2
    assert stages_done_twice(run) == []


@pytest.mark.mount
def test_a_node_that_does_not_see_the_run_directory_is_named(shards: Path, tmp_path: Path) -> None:
    """The node is real: its raylet runs where another file system hides the folder of the runs."""
    hidden = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount (root)")
    nodes = Nodes(2)
    try:
        blind = nodes.add_process([*hidden, RAY, "start", "--num-cpus=1", "--block"])
        output = end(begin(nodes, recipe(shards), tmp_path / "run"), code=4)
    finally:
        blind.terminate()
        blind.wait()
        nodes.close()
    assert (
        f"it cannot use {tmp_path / 'run'}: {tmp_path / 'run' / 'lock.json'} is missing" in output
    )
    assert "Every node must see the run directory" in output
