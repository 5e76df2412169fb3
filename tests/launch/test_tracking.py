"""Trackers show a run in their own stores, go on with it after a stop, and never end it."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deepclust import pretrain
from deepclust.errors import RequeueWanted, ResourceError
from deepclust.launch import tracking
from deepclust.launch.start import resume
from deepclust.recipe.sealed import check_seal
from deepclust.run.directory import Run
from deepclust.run.varying import Varying
from tests.tiny import stop_at, tiny_recipe, tiny_shards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BLOCK = 2**15
CONSTANT = {"train/lr", "train/segment", "train/round", "round/k", "round/n", "round/round"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


def warnings_of(seen: list[dict[str, Any]]) -> list[str]:
    return [record["text"] for record in seen if record.get("event") == "warning"]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that all trackers show, stopped at a step and resumed."""
    path = tmp_path_factory.mktemp("runs") / "a"
    names = "track=[tensorboard,mlflow,wandb]"
    words = ("cluster.final=true", "train.log=1", "notify.webhook=http://127.0.0.1:1/S3cr3tW0rd")
    recipe = tiny_recipe(shards, names, *words, "notify.on=[failure]")
    seen: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "PATIENCE_S", {True: 300.0, False: 300.0})  # this machine is busy
        with pytest.raises(RequeueWanted):
            pretrain(recipe, path, show=stop_at(3))
        resume(path, show=seen.append)
    assert not warnings_of(seen)
    return path


@pytest.mark.slow
def test_mlflow_has_one_run_with_parameters_curves_and_pictures(run: Path):
    with closing(sqlite3.connect(run.parent / "mlflow.db")) as store:
        check_mlflow(store, Run(run))
    assert len(list(run.parent.glob("mlartifacts/*/artifacts/clusters/*.png"))) == 3


def check_mlflow(store: sqlite3.Connection, run: Run) -> None:
    runs = store.execute("select run_uuid, name, status from runs").fetchall()
    assert [(name, status) for _, name, status in runs] == [("a", "FINISHED")]
    parameters = dict(store.execute("select key, value from params").fetchall())
    assert parameters["cluster.k"] == "8"
    assert parameters["notify.webhook"] == "http://127.0.0.1:1/***"
    points = store.execute("select step, value from metrics where key = 'train/loss'").fetchall()
    known = [(line["step"], line["loss"]) for line in run.metrics("train")]
    assert len(points) == len(known)
    assert dict(points) == pytest.approx(dict(known))
    names = {key for (key,) in store.execute("select distinct key from metrics")}
    assert "round/nmi_labels" in names
    assert not names & CONSTANT


@pytest.mark.slow
def test_wandb_has_one_offline_run_in_a_folder_for_each_attempt(run: Path):
    files = sorted(run.parent.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    rows = [row for file in files for row in wandb_rows(file)]
    points = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    known = [(line["step"], line["loss"]) for line in Run(run).metrics("train")]
    assert len(points) == len(known)
    assert dict(points) == pytest.approx(dict(known))
    assert sum(any(key.startswith("clusters") for key in row) for row in rows) == 3
    assert not {key for row in rows for key in row} & CONSTANT


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The history of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: in blocks of 32 KB, each piece after its CRC, size and kind."""
    at, whole = 7, b""  # wandb's own header is in the first block
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is empty
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.mark.slow
def test_tensorboard_has_hyperparameters_pictures_and_the_projector(run: Path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata

    files = [file for file in (run / "tensorboard").iterdir() if "tfevents" in file.name]
    values = [v for f in files for e in EventFileLoader(str(f)).Load() for v in e.summary.value]
    tags = [value.tag for value in values]
    assert tags.count(metadata.SESSION_START_INFO_TAG) == 1
    assert tags.count("clusters") == 3
    assert "train/loss" in tags
    assert not set(tags) & CONSTANT
    assert "features" in (run / "tensorboard" / "projector_config.pbtxt").read_text()
    folder = run / "tensorboard" / "00000" / "features"
    assert len((folder / "tensors.tsv").read_text().splitlines()) == 300
    assert (folder / "sprite.png").stat().st_size > 1000


@pytest.mark.slow
def test_no_store_holds_a_secret_and_a_finished_run_is_sent_once(run: Path):
    stores = [file for file in run.parent.rglob("*") if file.is_file()]
    holders = {file.name for file in stores if b"S3cr3tW0rd" in file.read_bytes()}
    assert holders == {"recipe.yaml"}
    before = (run / "tracking.json").stat().st_mtime_ns
    resume(run)
    assert (run / "tracking.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_what_a_tracker_has_missed_is_sent_when_the_run_is_resumed(shards, tmp_path, monkeypatch):
    seen: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "PATIENCE_S", {True: 0.01, False: 0.01})
        pretrain(tiny_recipe(shards, "track=[mlflow]"), tmp_path / "a", show=seen.append)
    assert "`deepclust resume` sends them the rest" in warnings_of(seen)[-1]
    resume(tmp_path / "a")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        count = store.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    assert count[0] == len(Run(tmp_path / "a").metrics("train"))


@pytest.mark.slow
def test_a_tracker_that_fails_is_named_and_the_run_ends_well(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE_S", {True: 300.0, False: 300.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # else it tries for two minutes
    seen: list[dict[str, Any]] = []
    names = "track=[mlflow,tensorboard]"
    pretrain(tiny_recipe(shards, names), tmp_path / "a", show=seen.append)
    (text,) = warnings_of(seen)
    assert text.startswith("mlflow shows the run no longer: ")
    assert Run(tmp_path / "a").events()[-1]["event"] == "finished"
    assert (tmp_path / "a" / "tensorboard" / "projector_config.pbtxt").exists()


def test_a_missing_package_is_named_before_anything_is_done(shards, tmp_path, monkeypatch):
    honest = importlib.util.find_spec
    missing = {"wandb", "alembic"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else honest(name)
    )
    recipe = tiny_recipe(shards, "track=[tensorboard,mlflow,wandb]")
    with pytest.raises(ResourceError, match=r"needs wandb and alembic: pip install 'deepclust\["):
        pretrain(recipe, tmp_path / "run")
    events = [event["event"] for event in Run(tmp_path / "run").events()]
    assert events == ["stopped"]
    monkeypatch.setattr(importlib.util, "find_spec", honest)
    resume(tmp_path / "run", "track=[]")
    check_seal(tmp_path / "run" / "recipe.yaml")


def test_a_process_that_cannot_start_or_dies_ends_no_run(shards, tmp_path, monkeypatch):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(tracking, "PROGRAM", "no.such.module")
    pretrain(tiny_recipe(shards, "track=[tensorboard]"), tmp_path / "a", show=seen.append)
    assert "ended with exit code 1: see logs/tracking.out" in warnings_of(seen)[-1]
    monkeypatch.setattr(tracking.sys, "executable", str(tmp_path / "none"))
    pretrain(tiny_recipe(shards, "track=[tensorboard]"), tmp_path / "b", show=seen.append)
    assert "nothing is tracked" in warnings_of(seen)[-1]


def test_a_number_has_a_curve_once_it_varies():
    varying = Varying()
    assert varying.curves("train", 1, {"lr": 0.1, "loss": 2.0, "epoch": 1, "kind": "x"}) == {}
    assert varying.curves("train", 2, {"lr": 0.1, "loss": 1.0}) == {
        "train/loss": [(1, 2.0), (2, 1.0)]
    }
    again = Varying(json.loads(json.dumps(varying.held)))  # of a later attempt
    assert again.curves("train", 3, {"lr": 0.2, "loss": 1.0}) == {
        "train/lr": [(1, 0.1), (3, 0.2)], "train/loss": [(3, 1.0)]
    }  # fmt: skip
    assert os.environ.get("MLFLOW_TRACKING_URI") is None
