"""A lock, a job and events that came with somebody else's run, or are damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster_jobs import job_file, runs, status
from cluster_jobs.data_places import places_of, remember_places, require_known_places
from cluster_jobs.executors import background, executor
from cluster_jobs.report import write_report
from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.slurm.create import create as create_for_slurm
from deepclust.data.process_identity import start_time
from deepclust.data.shards.index import open_index
from deepclust.errors import DataError, DiskError, MissingError, RecipeError, ResourceError
from deepclust.files import read_json, write_json
from deepclust.launch.start import prepare_run, resume
from deepclust.run import lock
from deepclust.run.directory import Run, create
from deepclust.run.lock import check_token, hold
from deepclust.run.reporting import Board, log_to
from tests.images import make_shards
from tests.tiny import tiny_recipe

DAMAGED = ["", "{", "{}", "[]", "null", '"x"', "12", "[" * 99_999, "\udcff", '{"pid": 1}']
LINES = [*DAMAGED, '{"kind": "train"}', '{"event": "clustered", "time": 1}', '{"event": 1}']
LINES += ['{"event": "stopped", "time": 1, "kind": "X", "text": ""}', '{"time": "x", "event": "y"}']


@pytest.fixture
def run(tmp_path: Path) -> Path:
    create(tmp_path / "a", tiny_recipe(tmp_path))
    create(tmp_path / "b", tiny_recipe(tmp_path))
    return tmp_path / "a"


def write(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("name", ["lock.json", "job.json", "recipe.yaml"])
def test_status_shows_a_broken_run_beside_the_others(run: Path, name: str, text: str) -> None:
    write(run / name, text)
    a, b = (status.status(one) for one in status.find_runs(run.parent))
    assert (a.name, a.state) == ("a", "FAILED")
    assert name in a.reason
    assert b.state == "PENDING"


@pytest.mark.parametrize("text", LINES)
def test_status_survives_any_line_of_events_and_metrics(run: Path, text: str) -> None:
    for name in ("events.jsonl", "metrics.jsonl"):
        write(run / name, text + "\n")
    states = [status.status(one) for one in status.find_runs(run.parent)]
    json.dumps([one.as_dict() for one in states])
    assert all("Error" not in one.reason for one in states)


@pytest.mark.parametrize("name", ["lock.json", "job.json", "events.jsonl", "metrics.jsonl"])
def test_a_pipe_or_a_huge_file_in_a_run_does_not_hold_up_status(run: Path, name: str) -> None:
    os.mkfifo(run / name)
    with open(run.parent / "b" / name, "wb") as file:
        file.truncate(2**41)
    states = [status.status(one) for one in status.find_runs(run.parent)]
    assert [one.state for one in states] == ["FAILED", "FAILED"]
    assert all(name in one.reason for one in states)


def test_a_process_that_does_not_work_on_the_run_is_not_stopped(run: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with hold(run):
        mine = read_json(run / "lock.json")
        started = start_time(other.pid)
        write_json(run / "lock.json", {**mine, "pid": other.pid, "started": started})
        assert lock.owner_pid(run) == other.pid
        with pytest.raises(ResourceError, match="not its controller"):
            background.stop(run, other.pid)
        assert lock.works_on(run, os.getpid())
    assert other.poll() is None
    other.communicate(b"\n")


@pytest.mark.parametrize("name", [".lock-guard", "events.jsonl", "logs/rank-00000.log", "cancel"])
def test_no_file_of_a_run_is_written_through_a_link(run: Path, name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run / name).symlink_to(precious)

    def tell() -> None:
        with hold(run) as token:
            Run(run, token).event("warning", text="x")

    writers = {"cancel": lambda: job_file.ask_to_cancel(run)}
    writers["logs/rank-00000.log"] = lambda: log_to(run / name, 0)
    with pytest.raises(DiskError, match=Path(name).name):
        writers.get(name, tell)()
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["logs", "rounds", "rounds/0000/raw", "checkpoints", ".x", "gone"])
def test_a_run_with_a_folder_that_leads_out_of_it_is_not_written(
    run: Path, name: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / ".old.tmp").mkdir(parents=True)
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(mine if name != "gone" else "../../nothing")
    before = sorted(run.rglob("*"))
    writers: list[Callable[[], object]] = [
        lambda: resume(run),
        lambda: resume(run, "keep.checkpoints=1"),
        lambda: executor("local").resume(run, []),
        lambda: create_for_slurm("small-photos", run, []),
    ]
    for write in writers:
        with pytest.raises(DiskError, match=f"{name} is a link that leads out of the run"):
            write()
    assert (sorted(run.rglob("*")), [*mine.iterdir()]) == (before, [mine / ".old.tmp"])


def test_links_that_stay_in_a_run_or_lead_to_a_run_or_a_file_are_left(
    run: Path, tmp_path: Path
) -> None:
    (run / "newest").symlink_to("logs")
    (run / "notes").symlink_to(__file__)
    (tmp_path / "short").symlink_to(run)
    with hold(tmp_path / "short"):
        assert lock.owner(run)


def test_a_run_that_is_gone_is_not_said_to_be_taken_over(run: Path) -> None:
    with hold(run) as token:
        run.rename(run.parent / "moved")
        with pytest.raises(MissingError, match="moved or deleted"):
            check_token(run, token)
        (run.parent / "moved").rename(run)


def test_rounds_that_cannot_be_read_are_not_taken_for_none(run: Path) -> None:
    (run / "rounds").symlink_to("rounds")  # a circle
    with pytest.raises(DataError, match="rounds"):
        Run(run).rounds()


def test_tensorboard_never_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    board = Board(tmp_path / "file" / "tensorboard")
    for step in range(100):
        board.write(step, {"a": 1.0})
    board.close()
    good = Board(tmp_path / "tensorboard")
    good.write(3, {"a": 1.5, "b": 2.0})
    good.close()
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    file = next((tmp_path / "tensorboard").iterdir())
    events = list(EventFileLoader(str(file)).Load())
    assert [(v.tag, e.step) for e in events for v in e.summary.value] == [("a", 3), ("b", 3)]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ask = "deepclust.data.shards.remote._filesystem"
    monkeypatch.setattr(ask, lambda url: pytest.fail("asked the network"))


FOREIGN = "http://bob:pw@elsewhere/{0..1}.tar?sig=secret"


@pytest.mark.parametrize("url", [FOREIGN, "s3://bucket/x", f"zip://a.tar::{FOREIGN}"])
def test_no_place_that_only_a_run_names_is_asked_for_data(
    tmp_path: Path, no_network: None, url: str
) -> None:
    run = tmp_path / "run"
    create(run, tiny_recipe(Path("/shards")).replace(f"data.shards={url}"))
    ways: list[Callable[[], object]] = [
        lambda: runs.resume_here(run, [], show=print),
        lambda: runs.resume(run, [], "local"),
        *(partial(runs.run_stage, run, stage, print) for stage in ("extract", "cluster", "train")),
    ]
    for way in ways:
        with pytest.raises(RecipeError, match=r"have not named before.*--remote") as caught:
            way()
        assert "pw" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_no_hub_that_only_a_run_names_is_asked_for_weights(
    tmp_path: Path, no_network: None
) -> None:
    run, hub = tmp_path / "run", "init.weights=hf-hub:them/net"
    create(run, tiny_recipe(Path("/shards")).replace(hub))
    for overrides in ([], ["data.shards=/mine"]):  # which names its own place alone
        with pytest.raises(RecipeError, match=r"hf-hub:them/net, which you have not named"):
            require_known_places(Run(run), overrides, remote=False)
    remember_places(Run(run).recipe)  # as `pretrain` does with what the user has given
    require_known_places(Run(run), [], remote=False)


def test_a_place_that_the_user_has_named_is_known(tmp_path: Path, no_network: None) -> None:
    run = Run(tmp_path / "run")
    create(run.path, tiny_recipe(Path("/shards")).replace(f"data.shards={FOREIGN}"))
    require_known_places(run, [], remote=True)
    require_known_places(run, ["train.epochs=9"], remote=False)
    assert "secret" not in (tmp_path / "state" / "deepclust" / "data-places").read_text()
    other = run.recipe.replace("data.shards=[s3://mine/a, s3://mine/b, /local]")
    assert places_of(other) == ["s3://mine"]
    remember_places(other)
    assert "s3://mine" in (tmp_path / "state" / "deepclust" / "data-places").read_text()


def test_assignments_of_shards_behind_a_url_are_written_without_asking_for_them(
    tmp_path: Path, shards: Path, no_network: None
) -> None:
    run, index = Run(tmp_path / "run"), open_index(shards)
    create(run.path, tiny_recipe(shards).replace(f"data.shards={FOREIGN}"))
    shutil.copytree(index.folder, run.path / "index")
    stage = run.round(0) / "assignments"
    run.path.joinpath("rounds", "0000").mkdir(parents=True)

    def fill(folder: Path) -> None:
        np.save(folder / "assignments.npy", np.zeros((1, len(index)), np.int32))
        np.save(folder / "distances.npy", np.zeros((1, len(index)), np.float32))

    with hold(run.path) as token:
        Run(run.path, token).commit(stage, fill, {"data": index.fingerprint})
    export_assignments(run.path, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert table["key"] == list(index.keys)
    assert table["shard"][0] == index.shards[0].name
    shutil.rmtree(run.path / "index")
    with pytest.raises(DataError, match="no index in"):
        export_assignments(run.path, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "\u65e5\u672c".encode(), b"a\nb\x1b[2J"])
def test_a_run_of_any_name_is_shown_where_the_locale_lacks_its_letters(
    tmp_path: Path, run: Path, name: bytes
) -> None:
    odd = run.rename(tmp_path / os.fsdecode(name))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "cluster_jobs.cli", "status", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert write_report(odd, tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"caf\\udce9 is not UTF-8, so a run cannot be there"):
        prepare_run(tiny_recipe(tmp_path), odd)
    assert not odd.exists()
    create(odd, tiny_recipe(tmp_path))
    with pytest.raises(RecipeError, match="not UTF-8"):
        resume(odd)
    make_shards(odd / "shards", n=4, shards=1, size=8)
    with pytest.raises(RecipeError, match="not UTF-8, so an index cannot be there"):
        open_index(odd / "shards")
    assert len(open_index(odd / "shards", tmp_path / "index")) == 4
