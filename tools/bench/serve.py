"""What `deepclust serve` holds: random requests, a thousand runs, and fifty who follow one.

    python -m tools.bench.serve requests RUNS [--count 2000]    schemathesis on the OpenAPI document
    python -m tools.bench.serve list RUN --out DIR              a folder of 1,000 copies of a run
    python -m tools.bench.serve follow SHARDS --out DIR         is a followed run slower? in pairs

Each prints what it has measured as JSON. `requests` exits 1 after an answer of 500 or more.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-the-bench"
NICE = ["nice", "-n", "-19"]  # neighbours on the machine disturb less; needs root


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Serve a folder as the command does, and yield the address and the process."""
    command = ["-m", "cluster_jobs.cli", "serve", str(folder), "--port", "0", "--token", TOKEN]
    with subprocess.Popen(
        [*_nice(), sys.executable, *command], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            address = ""
            while "?token=" not in address:
                address = process.stderr.readline()
            # nobody may wait for a full pipe
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield address.strip().partition("/?token=")[0], process.pid
        finally:
            process.terminate()


def _nice() -> list[str]:
    return NICE if os.geteuid() == 0 else []


def get(address: str, path: str) -> bytes:
    """Return the answer to a request with the token."""
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return bytes(answer.read())


def timed(address: str, path: str, times: int = 5) -> float:
    """Return the median of the seconds of a request."""
    took = []
    for _ in range(times):
        start = time.monotonic()
        get(address, path)
        took.append(time.monotonic() - start)
    return round(statistics.median(took), 3)


def memory(pid: int, field: str = "VmHWM") -> float:
    """Return megabytes of a process: the largest that were resident, or those that are."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def requests(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Send random requests made from the OpenAPI document, and return how many had which status.

    A request may name any run, cluster or key; half of them name those that exist.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from starlette.testclient import TestClient

    from cluster_jobs.web.serve import make_app

    app: Any = make_app(folder, "", allowed=["testserver"])
    web = TestClient(app, "http://localhost")
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    names = [one["name"] for one in web.get("/api/runs").json()["runs"]]
    statuses: collections.Counter[int] = collections.Counter()
    failed: list[str] = []

    def ask(case: Any, name: str | None, number: int) -> None:
        # a run that exists must not be resumed: it would go on after the bench
        if (
            name is not None
            and "name" in (case.path_parameters or {})
            and "resume" not in case.path
        ):
            known = {"name": name, "cluster": number, "sample": number}
            case.path_parameters |= {
                key: known[key] for key in known if key in case.path_parameters
            }
        what = f"{case.method} {case.formatted_path} {case.query}"
        try:
            answer = case.call()
        except Exception as error:  # nothing may leave the server as an exception
            failed.append(f"{what}: {type(error).__name__}: {error}"[:500])
            return
        statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            failed.append(f"{what}: {answer.text[:200]}")

    for operation in operations:
        drawn = given(
            case=operation.as_strategy(),
            name=st.sampled_from([None, *names]),
            number=st.integers(0, 5),
        )
        limits = settings(
            max_examples=-(-count // len(operations)), deadline=None, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        seeded(seed)(limits(drawn(ask)))()
    return {"requests": statuses.total(), "statuses": dict(statuses), "failed": failed[:10]}


def many_runs(run: Path, out: Path, count: int = 1000) -> dict[str, Any]:
    """Copy a run into a folder of so many, and time its list."""
    for number in range(count):
        if not (out / f"run-{number:04d}").exists():
            shutil.copytree(run, out / f"run-{number:04d}")
    with served(out) as (address, pid):
        start = memory(pid)  # most of it are torch's libraries
        paths = {"page of 100": "/api/runs", "all": f"/api/runs?limit={count}",
                 "by loss": "/api/runs?sort=loss", "HTML": "/"}  # fmt: skip
        first = timed(address, paths["all"], 1)
        took = {name: timed(address, path) for name, path in paths.items()}
        peak = memory(pid)
    return {"runs": count, "first_s": first, "then_s": took, "start_mb": round(start),
            "peak_mb": round(peak)}  # fmt: skip


def follow(shards: Path, out: Path, clients: int = 50, pairs: int = 3) -> dict[str, Any]:
    """Train the same run unwatched and followed by many clients, in turn; compare images/s."""
    found: list[dict[str, Any]] = []
    with served(out) as (address, pid):
        for pair in range(pairs):
            speeds = {}
            for watched in (pair % 2 == 0, pair % 2 == 1):
                name = f"pair{pair}-{'followed' if watched else 'alone'}"
                speeds[watched], lines = one_run(shards, out / name, address, clients * watched)
                if watched:
                    received = lines
            found.append({"alone": speeds[False], "followed": speeds[True], "lines": received})
            print(found[-1], file=sys.stderr)
        peak = memory(pid)
    ratios = [one["followed"] / one["alone"] for one in found]
    return {
        "clients": clients, "pairs": found, "ratio": round(statistics.median(ratios), 4),
        "peak_mb": round(peak),
    }  # fmt: skip


def one_run(shards: Path, run: Path, address: str, clients: int) -> tuple[float, int]:
    """Train a run while so many follow it.

    Return its images/s, the median of what it logs, and the lines that all clients got.
    """
    shutil.rmtree(run, ignore_errors=True)
    keys = ["backbone.name=conv4", "data.size=48", "data.resize=48", "cluster.k=200",
            "data.workers=1", "train.epochs=4", "train.log=5"]  # fmt: skip
    command = ["-m", "cluster_jobs.cli", "pretrain", "small-photos", f"data.shards={shards}", *keys]
    with subprocess.Popen(
        [*_nice(), sys.executable, *command, "--run", str(run)], stderr=subprocess.DEVNULL
    ) as process:
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        received = [0] * clients
        threads = [
            threading.Thread(target=listen, args=(address, run.name, received, number))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if process.wait():
            raise RuntimeError(f"{run} failed")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(one["images_per_s"] for one in lines if "images_per_s" in one)
    return speed, sum(received)


def listen(address: str, name: str, received: list[int], number: int) -> None:
    """Read the stream of a run's events to its end, and count the lines."""
    request = urllib.request.Request(
        f"{address}/api/runs/{name}/events/stream", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=300) as stream:
        for line in stream:
            received[number] += line.startswith(b"data:")


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["requests", "list", "follow"])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "requests":
        found = requests(given.source, given.count)
    elif given.what == "list":
        found = many_runs(given.source, given.out)
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        found = follow(given.source, given.out)
    print(json.dumps(found, indent=2))
    return 1 if found.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
