#!/usr/bin/env python3
"""Seconds until the tasks of a large job have met, and until all have answered, without torch.

    python tools/bench/slurm/rendezvous.py [--tasks 256 1024] [--times 5] [--out FILE]

The tasks are forks of this process that call `join` of cluster_jobs/slurm/rendezvous.py, as the
tasks of a job do. Half of them come before the head listens, and look for its file. "met" is from
the head's start to its knowing all of them, "answered" until each has had a word and sent one back.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from cluster_jobs.slurm.allocation import Allocation
from cluster_jobs.slurm.rendezvous import hosting, join

PATIENCE_S = 120.0


def main() -> None:
    """Measure each number of tasks, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-rendezvous.json"))
    options = parser.parse_args()
    rows = [{"tasks": n, **meeting(n)} for n in options.tasks for _ in range(options.times)]
    print("| tasks | met, s (median, largest) | answered, s |\n| --- | --- | --- |")
    for n in options.tasks:
        own = [row for row in rows if row["tasks"] == n]
        print(f"| {n} | {spread(own, 'met')} | {spread(own, 'answered')} |")
    options.out.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


def spread(rows: list[dict[str, float]], key: str) -> str:
    """Return the median and the largest."""
    values = [row[key] for row in rows]
    return f"{statistics.median(values):.2f}, {max(values):.2f}"


def meeting(tasks: int) -> dict[str, float]:
    """Let a head and its tasks meet once."""
    nodes = [f"n{number:05d}" for number in range(tasks)]
    with tempfile.TemporaryDirectory() as folder:
        early = [fork(Path(folder), nodes, task) for task in range(1, tasks // 2)]
        began = time.perf_counter()
        with hosting(Path(folder), Allocation("7", 0, nodes, 0, 0, 1, 0), "127.0.0.1") as head:
            late = [fork(Path(folder), nodes, task) for task in range(tasks // 2, tasks)]
            expected = {task: nodes[task] for task in range(1, tasks)}
            peers = head.gather(expected, PATIENCE_S, lambda: False)
            met = time.perf_counter() - began
            for peer in peers:
                peer.line.send(go=True)
            head.await_all("ready", PATIENCE_S, lambda: False)
            answered = time.perf_counter() - began
        for pid in (*early, *late):
            os.waitpid(pid, 0)
    return {"met": met, "answered": answered}


def fork(folder: Path, nodes: list[str], task: int) -> int:
    """Start a task: it joins, waits for a word, answers, and waits for the head to leave."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        line = join(folder, Allocation("7", 0, nodes, task, task, 1, 0), PATIENCE_S)
        if line is not None and line.first(PATIENCE_S):
            line.send(ready=True)
            line.first(PATIENCE_S)
            code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
