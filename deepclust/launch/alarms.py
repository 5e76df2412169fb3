"""Alarms: the message that `notify` of a recipe sends when a run fails, collapses, ends or stops.

The process that holds the run sends it, from threads. So a run never waits for a server or a
command, save at its end, and there for `notify.timeout` seconds at most. What goes wrong is written
down and nothing else comes of it. The events `notified` say what was sent, and how it went. By them
an incident that was reported is not reported again by a later attempt, and no run sends more than
`MOST_AN_HOUR` messages an hour.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from deepclust.errors import RunHeldError, hide, redact
from deepclust.launch.policy import progress_on_disk
from deepclust.recipe.beside import Incident, NotifySection
from deepclust.run.directory import Run

MOST_AN_HOUR = 20
MOST_TEXT = 1500  # letters of a message
PAUSE_S = 1.0  # between two tries of a webhook that fails
LATE_S = 2.0  # for a killed command, and for the event
QUIET = ("KeyboardInterrupt", "Stage")  # ends that somebody wanted
log = logging.getLogger("deepclust.launch")


@dataclass(frozen=True)
class Message:
    """What is sent. `key` names the incident, and is the same for one that happens again."""

    incident: Incident
    key: str
    run: str
    text: str
    host: str
    time: float


class Alarms:
    """The alarms of a run; `run` returns it with the token that holds now."""

    def __init__(self, run: Callable[[], Run]) -> None:
        self.run = run
        self._threads: list[threading.Thread] = []
        self._begun: set[tuple[str, str]] = set()

    def see(self, record: dict[str, Any]) -> None:
        """Take an event of the run, and begin to send a message if it is an incident."""
        try:
            run = self.run()
            config = run.recipe.notify if "event" in record else None
            message = message_of(run, record) if config else None
            if config and message and message.incident in config.on:
                self._begin(config, message)
        except Exception as error:  # an alarm never ends a run
            log.warning("no alarm: %s: %s", type(error).__name__, error)

    def settle(self) -> None:
        """Wait for the messages that are under way, each as long as its section allows."""
        for thread in self._threads:
            thread.join()  # bounded: see `_within`
        self._threads.clear()

    def _begin(self, config: NotifySection, message: Message) -> None:
        ways: dict[str, Callable[[], None]] = {}
        if config.command is not None:
            command = config.command
            ways["command"] = lambda: run_command(command, message, config.timeout)
        if config.webhook is not None:
            url = config.webhook
            ways["webhook"] = lambda: post(url, message, config.timeout)
        for name, send in ways.items():
            if (message.key, name) in self._begun or is_sent(self.run(), message, name):
                continue
            self._begun.add((message.key, name))
            work = (name, send, message, config.timeout)
            thread = threading.Thread(target=self._deliver, args=work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _deliver(
        self, name: str, send: Callable[[], None], message: Message, timeout: float
    ) -> None:
        if sent_lately(self.run()) >= MOST_AN_HOUR:
            problem = f"not sent: {MOST_AN_HOUR} messages in an hour are the most"
        else:
            problem = _within(timeout + LATE_S, send)
        fields = {"incident": message.key, "by": name, "sent": not problem, "text": problem}
        for _ in range(2):  # a new attempt may have renewed the token meanwhile
            with suppress(RunHeldError, OSError):
                self.run().event("notified", **fields)
                break
        if problem:
            log.warning("%s: the %s of notify: %s", message.key, name, redact(problem))


def message_of(run: Run, record: dict[str, Any]) -> Message | None:
    """Return the message for an event, or None for any other event."""
    found = incident_of(run, record)
    if found is None:
        return None
    incident, key, what = found
    host, path = platform.node(), str(run.path.absolute())
    text = redact(f"deepclust: {run.path.absolute().name} on {host} {what}")[:MOST_TEXT]
    return Message(incident, key, path, text, host, time.time())


def incident_of(run: Run, record: dict[str, Any]) -> tuple[Incident, str, str] | None:
    """Return an event's incident, its key and what happened, or None."""
    match record["event"]:
        case "finished":
            epochs = record["epochs"]
            return "end", f"end-{epochs}", f"has finished its {epochs} epochs"
        case "warning" if record.get("about") == "collapse":
            return "collapse", "collapse", f"may have collapsed: {record['text']}"
        case "fault" if record["cause"] == "preemption":
            what = f"was preempted ({record['who']}) and goes on: {record['text']}"
            return "preemption", f"preemption-{run.attempt}", what
        case "stopped" if record["kind"] not in QUIET:
            return _stopped(run, record["kind"], record["text"])
    return None


def _stopped(run: Run, kind: str, text: str) -> tuple[Incident, str, str] | None:
    """Return the incident of a run that ended before it was finished."""
    again = f"deepclust resume {run.path.absolute()}"
    if kind == "RequeueWanted":
        if (run.path / "cancel").exists():  # somebody wanted it
            return None
        what = f"was stopped at a step: {text} ({again})"
        return "preemption", f"preemption-{run.attempt}", what
    # the same end without any progress since is the same incident
    place = "-".join(map(str, progress_on_disk(run)))
    if kind == "NumericalError" and "collapsed" in text:
        return "collapse", f"collapse-{place}", f"has collapsed: {text}"
    return "failure", f"failure-{kind}-{place}", f"has failed: {kind}: {text} (then {again})"


def is_sent(run: Run, message: Message, by: str) -> bool:
    """Return whether this or an earlier attempt has sent the message in that way."""
    return any(
        event["event"] == "notified"
        and (event["incident"], event["by"], event["sent"]) == (message.key, by, True)
        for event in run.events()
    )


def sent_lately(run: Run) -> int:
    """Return how many messages the run has sent in the last hour."""
    since = time.time() - 3600
    events = (event for event in run.events() if event["event"] == "notified")
    return sum(event["sent"] and event["time"] > since for event in events)


def run_command(command: str, message: Message, timeout: float) -> None:
    """Give the message to a shell command, or raise `OSError` when it fails or does not end.

    It is killed then, with all that it has started. What it prints is not kept: it may be secret.
    """
    variables = {
        "DEEPCLUST_INCIDENT": message.incident,
        "DEEPCLUST_RUN": message.run,
        "DEEPCLUST_TEXT": message.text,
    }
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **variables},
    )  # fmt: skip
    try:
        process.communicate(json.dumps(asdict(message)).encode(), timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it did not end within {timeout:g} s and was killed") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise OSError(f"it ended with exit code {process.returncode}")


def post(webhook: str, message: Message, timeout: float) -> None:
    """Post the message as JSON, and try again while there is time and the server may recover.

    Raises `OSError` with what the server said. Nothing is sent on to where it redirects.
    """
    url = os.environ.get(webhook[1:], "") if webhook.startswith("$") else webhook
    if not url:
        raise OSError(f"the variable {webhook} is not set")
    _hide_parts(url)
    opener = urllib.request.build_opener(_Straight)
    headers = {"Content-Type": "application/json", "User-Agent": "deepclust"}
    request = urllib.request.Request(url, json.dumps(asdict(message)).encode(), headers)
    deadline = time.monotonic() + timeout
    while True:
        try:
            opener.open(request, timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code}"
            error.close()
            if error.code < 500 and error.code != 429:
                raise OSError(problem) from None
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() + PAUSE_S >= deadline:
            raise OSError(problem)
        time.sleep(PAUSE_S)


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the address is a secret, and its message is for that server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Take the answer as it is, an error."""


def _hide_parts(url: str) -> None:
    """Hide all of a URL but its server from everything that is shown from now on."""
    parts = urlsplit(url)
    for secret in (url, parts.path, parts.query, parts.password or "", *parts.path.split("/")):
        hide(secret)


def _within(seconds: float, send: Callable[[], None]) -> str:
    """Return "" for a message that was sent in time, else what went wrong.

    A name that is looked up, or a server that sends a letter a second, has no time limit itself.
    """
    problems: list[str] = []
    over = threading.Event()

    def work() -> None:
        try:
            send()
        except Exception as error:
            problems.append(redact(str(error)) or type(error).__name__)
        over.set()

    threading.Thread(target=work, daemon=True).start()
    return "".join(problems) if over.wait(seconds) else f"no answer within {seconds:g} s"
