"""Alarms: a real command and a real server hear of an incident once, and no run waits for them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster_jobs import data_places, known, status
from cluster_jobs.executors import background
from deepclust import Recipe, errors, pretrain
from deepclust.errors import NumericalError, RecipeError, RequeueWanted, shown
from deepclust.launch import alarms
from deepclust.launch.alarms import Alarms, incident_of
from deepclust.launch.start import resume
from deepclust.run import lock
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from tests.tiny import stop_at, tiny_recipe, tiny_shards

SECRET = "S3cr3tW0rd"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(errors, "_secrets", {})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


class Server(ThreadingHTTPServer):
    """A server that keeps what is posted, and answers with the codes in turn."""

    daemon_threads = True

    def __init__(self, *codes: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.codes, self.bodies = list(codes), list[Any]()
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/{SECRET}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.bodies.append(json.loads(body))
        server.paths.append(self.path)
        code = server.codes.pop(0) if server.codes else 200
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(*codes: int) -> Iterator[Server]:
    server = Server(*codes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def dripping() -> Iterator[int]:
    """Listen on a port, and answer with a letter now and then, which never is a whole line."""
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip() -> None:
        peer, _ = listening.accept()
        with peer:
            while not over.wait(0.05):
                peer.send(b"H")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        over.set()
        thread.join()
        listening.close()


def notified(run: Path) -> list[dict[str, Any]]:
    return [event for event in Run(run).events() if event["event"] == "notified"]


def with_notify(shards: Path, **keys: Any) -> Recipe:
    return tiny_recipe(
        shards, *(f"notify.{key}={json.dumps(value)}" for key, value in keys.items())
    )


def keep(file: Path) -> str:
    return f"cat >> {file}; echo $DEEPCLUST_INCIDENT >> {file}.word"


def test_a_run_that_ends_says_so_to_a_command_and_a_server(shards, tmp_path):
    with serving() as server:
        recipe = with_notify(shards, command=keep(tmp_path / "said"), webhook=server.url)
        pretrain(recipe, tmp_path / "run")
        resume(tmp_path / "run")  # finished: it says nothing more
    said = json.loads((tmp_path / "said").read_text())
    assert server.bodies == [said]
    assert said["incident"] == "end"
    assert said["run"] == str(tmp_path / "run")
    assert "has finished its 2 epochs" in said["text"]
    assert (tmp_path / "said.word").read_text() == "end\n"
    assert {(e["by"], e["sent"], e["text"]) for e in notified(tmp_path / "run")} == {
        ("command", True, ""), ("webhook", True, "")
    }  # fmt: skip
    assert status.status(Run(tmp_path / "run")).state == "SUCCEEDED"


def test_a_preemption_and_a_failure_are_said_once_however_often_the_run_is_resumed(
    shards, tmp_path, monkeypatch
):
    file = tmp_path / "said.word"
    recipe = with_notify(shards, command=keep(tmp_path / "said"))
    with pytest.raises(RequeueWanted):
        pretrain(recipe, tmp_path / "run", show=stop_at(3))
    assert file.read_text().split() == ["preemption"]
    assert status.status(Run(tmp_path / "run")).state == "STOPPED"

    def fail(*_: Any) -> None:
        raise NumericalError("the loss is not finite")

    with monkeypatch.context() as patched:
        patched.setattr("deepclust.stages.train.check_finite", fail)
        for _ in range(3):
            with pytest.raises(NumericalError):
                resume(tmp_path / "run")
    assert file.read_text().split() == ["preemption", "failure"]
    assert status.status(Run(tmp_path / "run")).state == "FAILED"
    resume(tmp_path / "run")
    assert file.read_text().split() == ["preemption", "failure", "end"]


def test_only_what_is_asked_for_is_said(shards, tmp_path):
    recipe = with_notify(shards, command=keep(tmp_path / "said"), on=["failure"])
    pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "said").exists()
    assert not notified(tmp_path / "run")


def test_a_clustering_that_collapses_is_a_collapse(shards, tmp_path):
    recipe = with_notify(shards, command=keep(tmp_path / "said"))
    with pytest.raises(NumericalError, match="has collapsed"):
        pretrain(recipe.replace("cluster.max_share=0.0001"), tmp_path / "run")
    assert (tmp_path / "said.word").read_text() == "collapse\n"


def in_time(recipe: Recipe, run: Path) -> float:
    """Run it, and return how long its end waited for its alarms."""
    pretrain(recipe, run)
    ends = [event["time"] for event in Run(run).events() if event["event"] == "finished"]
    return time.time() - ends[0]


def test_a_server_that_hangs_costs_the_run_its_time_limit_and_no_more(shards, tmp_path):
    with dripping() as port:
        recipe = with_notify(shards, webhook=f"http://127.0.0.1:{port}/{SECRET}", timeout=0.5)
        waited = in_time(recipe, tmp_path / "run")
    (event,) = notified(tmp_path / "run")
    assert not event["sent"]
    assert "no answer within" in event["text"]
    assert 0.5 < waited < 0.5 + alarms.LATE_S + 2


def test_a_command_that_never_ends_is_killed_with_its_children(shards, tmp_path):
    command = f"sleep 1000 & echo $! > {tmp_path / 'child'}; wait"
    in_time(with_notify(shards, command=command, timeout=0.5), tmp_path / "run")
    (event,) = notified(tmp_path / "run")
    assert (event["sent"], event["text"]) == (False, "it did not end within 0.5 s and was killed")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("codes", "sent", "text", "tries"),
    [
        ((500, 200), True, "", 2),
        ((429, 503, 200), True, "", 3),
        ((404,), False, "the server answered 404", 1),
        ((302,), False, "the server answered 302", 1),
    ],
)
def test_a_server_that_fails_is_asked_again_where_that_may_help(
    shards, tmp_path, monkeypatch, codes, sent, text, tries
):
    monkeypatch.setattr(alarms, "PAUSE_S", 0.01)
    with serving(*codes) as server:
        pretrain(with_notify(shards, webhook=server.url), tmp_path / "run")
    (event,) = notified(tmp_path / "run")
    assert (event["sent"], event["text"], len(server.bodies)) == (sent, text, tries)


def test_a_server_that_is_not_there_is_named_without_its_secret(shards, tmp_path, capfd):
    port = _free_port()
    recipe = with_notify(shards, webhook=f"http://127.0.0.1:{port}/{SECRET}", timeout=0.5)
    pretrain(recipe, tmp_path / "run")
    (event,) = notified(tmp_path / "run")
    assert "refused" in event["text"]
    for file in (file for file in (tmp_path / "run").rglob("*") if file.is_file()):
        assert SECRET.encode() not in file.read_bytes() or file.name == "recipe.yaml"
    assert SECRET not in "".join(capfd.readouterr())
    assert (tmp_path / "run" / "recipe.yaml").stat().st_mode & 0o777 == 0o600


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_address_may_be_in_the_environment(shards, tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("OUR_HOOK", server.url)
        recipe = with_notify(shards, webhook="$OUR_HOOK")
        pretrain(recipe, tmp_path / "run")
        assert server.paths == [f"/hooks/{SECRET}"]
    monkeypatch.delenv("OUR_HOOK")
    pretrain(recipe, tmp_path / "other")
    assert notified(tmp_path / "other")[0]["text"] == "the variable $OUR_HOOK is not set"


def test_no_run_sends_without_bound(shards, tmp_path):
    recipe = with_notify(shards, command=keep(tmp_path / "said"))
    pretrain(recipe, tmp_path / "run")
    (tmp_path / "said.word").unlink()
    with hold(tmp_path / "run") as token:
        run = Run(tmp_path / "run", token)
        for number in range(30):
            sender = Alarms(lambda: run)
            sender.see({"event": "finished", "epochs": 100 + number})
            sender.settle()
    assert len((tmp_path / "said.word").read_text().split()) == alarms.MOST_AN_HOUR - 1
    assert "are the most" in notified(tmp_path / "run")[-1]["text"]


def test_what_somebody_wanted_is_no_incident(shards, tmp_path):
    run = Run(tmp_path)
    wanted = {"event": "stopped", "kind": "KeyboardInterrupt", "text": "interrupted"}
    assert incident_of(run, wanted) is None
    stopped = {"event": "stopped", "kind": "RequeueWanted", "text": "at step 3"}
    assert incident_of(run, stopped) is not None
    (tmp_path / "cancel").touch()
    assert incident_of(run, stopped) is None


def test_a_cancelled_run_is_seen_as_cancelled_and_leaves_no_request(tmp_path, monkeypatch):
    seen: list[bool] = []
    monkeypatch.setattr(lock, "works_on", lambda *_: True)
    monkeypatch.setattr(lock, "owner_pid", lambda *_: None)
    monkeypatch.setattr(os, "kill", lambda *_: seen.append((tmp_path / "cancel").exists()))
    background.stop(tmp_path, signal.SIGTERM)
    assert seen == [True]
    assert not (tmp_path / "cancel").exists()


@pytest.mark.parametrize(
    ("key", "value", "visible"),
    [
        ("notify.webhook", f"https://bob:{SECRET}@h.org/services/{SECRET}?x={SECRET}", "https://h.org/***"),
        ("notify.webhook", "$OUR_HOOK", "$OUR_HOOK"),
        ("notify.command", f"curl https://h.org/{SECRET}", "curl ***"),
        ("notify.command", f"TOKEN={SECRET} curl x", "TOKEN=*** ***"),
        ("notify.command", "beep", "beep"),
    ],
)  # fmt: skip
def test_people_see_where_an_alarm_goes_and_not_its_secret(key, value, visible):
    assert shown({"notify": {key.partition(".")[2]: value}}) == {
        "notify": {key.partition(".")[2]: visible}
    }
    assert errors.argument(f"{key}={value}") == f"{key}={visible}"


def test_a_wrong_webhook_is_named_without_its_secret(shards):
    with pytest.raises(RecipeError, match=r"notify.webhook") as caught:
        with_notify(shards, webhook=f"htp://h.org/{SECRET}")
    assert SECRET not in str(caught.value)
    with pytest.raises(RecipeError, match=r"set notify\.command or notify\.webhook"):
        with_notify(shards, on=["end"])


def test_the_key_on_of_yaml_is_a_word(shards, tmp_path):
    file = tmp_path / "my.yaml"
    text = tiny_recipe(shards).dump().replace(
        "notify: null", "notify:\n  command: beep\n  on: [end, failure]"
    )  # fmt: skip
    file.write_text(text)
    recipe = Recipe.load(file)
    assert recipe.notify is not None
    assert recipe.notify.on == ("end", "failure")
    file.write_text(recipe.dump())
    assert Recipe.load(file) == recipe


def test_alarms_may_change_at_a_resume_and_those_of_others_are_asked_about(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(RequeueWanted):
        pretrain(tiny_recipe(shards), tmp_path / "run", show=stop_at(3))
    word = f"notify.command={keep(tmp_path / 'said')}"
    resume(tmp_path / "run", word)
    assert (tmp_path / "said.word").read_text() == "end\n"
    run = Run(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"cat \*\*\* \(notify.command, .*--remote"):
        data_places.require_known_places(run, (), remote=False)
    data_places.require_known_places(run, (word,), remote=False)
    data_places.require_known_places(run, (), remote=False)
    assert SECRET not in "".join(known.known(data_places.KIND))


def test_an_alarm_that_breaks_ends_no_run(shards, tmp_path, monkeypatch, caplog):
    def broken(*_: Any) -> Callable[[], None]:
        raise RuntimeError("broken")

    monkeypatch.setattr(alarms, "message_of", broken)
    with caplog.at_level(logging.WARNING):
        pretrain(with_notify(shards, command="true"), tmp_path / "run")
    assert "no alarm: RuntimeError: broken" in caplog.text
