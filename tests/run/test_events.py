"""The table of events: it has what the code writes, and what runs on disk hold."""

from __future__ import annotations

import ast
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepclust.files import read_jsonl
from deepclust.run.events import FIELDS, NAMES, OPEN, OPTIONAL

ROOT = Path(__file__).parents[2]
WRITERS = ("event", "_event", "tell", "emit")


def written() -> Iterator[tuple[str, str, set[str]]]:
    """Yield place, event and fields of every call that writes an event."""
    for file in [*ROOT.glob("deepclust/**/*.py"), *ROOT.glob("cluster_jobs/**/*.py")]:
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            event = call.args[-1]
            if name in WRITERS and isinstance(event, ast.Constant) and call.keywords:
                fields = {keyword.arg for keyword in call.keywords if keyword.arg}
                yield f"{file.relative_to(ROOT)}:{call.lineno}", event.value, fields


def find_problem(record: dict[str, Any]) -> str | None:
    """Return what is wrong with a record of events.jsonl by the table, or None."""
    name = record.get("event")
    if name not in NAMES:
        return f"there is no event {name!r}"
    fields = {
        key: value
        for key, value in record.items()
        if key not in ("time", "attempt", "incarnation", "event")
    }
    for key, kind in FIELDS[name].items():
        if key not in fields and (name, key) not in OPTIONAL:
            return f"{name} lacks {key}"
        if key in fields and fields[key] is not None and not isinstance(fields[key], kind):
            return f"{name} has {key}={fields[key]!r}"
    unknown = sorted(fields.keys() - FIELDS[name])
    return f"{name} has an unknown field {unknown[0]}" if unknown and name not in OPEN else None


def test_the_table_has_every_event_that_the_code_writes_with_its_fields() -> None:
    calls = list(written())
    for place, event, fields in calls:
        assert event in NAMES, f"{place}: {event}"
        assert event in OPEN or fields <= FIELDS[event].keys(), f"{place}: {event} {fields}"
    assert FIELDS.keys() == set(NAMES)
    assert {event for _, event, _ in calls} >= {"started", "fault", "training", "stopped"}


def test_the_events_of_an_older_run_are_those_of_the_table(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "fixtures" / "run-of-10d50d1.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    files = list(tmp_path.rglob("events.jsonl"))
    records = [record for file in files for record in read_jsonl(file)]
    assert records
    assert [problem for record in records if (problem := find_problem(record))] == []


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"event": "resumed"}, "no event 'resumed'"),
        ({"event": "checkpoint"}, "lacks step"),
        ({"event": "checkpoint", "step": "7"}, "has step='7'"),
        ({"event": "checkpoint", "step": 7, "where": 1}, "unknown field where"),
    ],
)
def test_a_record_that_is_not_in_the_table_is_recognised(record: dict, problem: str) -> None:
    assert problem in (find_problem(record) or "")
