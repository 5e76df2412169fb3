"""How soon each verb says something, on data that keep it busy: 60,000 images by default.

    python tools/bench/first_progress.py --source idx:/usr/share/datasets/fashion-mnist/train \
        --work /tmp/first --out first.json

Every verb is a new process. Its time counts from the command to the first line on stderr, or on
stdout where the verb prints results as they come (doctor). So the interpreter and its imports are
in it. A verb that takes longer than `--longest` is stopped. The limit is 5 s on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT_S = 5.0
CLI = [sys.executable, "-m", "cluster_jobs.cli"]


def verbs(source: str, shards: Path, run: Path, work: Path) -> dict[str, list[str]]:
    """Return the command of each verb that can take longer than five seconds."""
    data, of = f"data.shards={shards}", str(run)
    return {
        "pack": ["pack", source, f"{work}/packed"],
        "index": ["index", f"{shards}", "--index", f"{work}/index", "--bodies"],
        "estimate": ["estimate", "demo-fashion", data],
        "doctor": ["doctor", "--runs", f"{work}/runs"],
        "pretrain": ["pretrain", "demo-fashion", "--run", f"{work}/new", data],
        "submit": ["submit", "demo-fashion", "--run", f"{work}/background", data],
        "evaluate": ["evaluate", of, "--train", f"{shards}", "--test", f"{shards}"],
        "embed": ["embed", of, "--data", f"{shards}", "--out", f"{work}/features"],
        "predict": ["predict", of, "--data", f"{shards}", "--out", f"{work}/clusters.csv"],
        "assignments --folders": ["assignments", of, "--folders", f"{work}/folders"],
        "duplicates": ["duplicates", of, "--out", f"{work}/duplicates.csv"],
        "export": ["export", of, "--out", f"{work}/net.onnx"],
        "report": ["report", of, "--out", f"{work}/report.html"],
        "cluster": ["cluster", f"{work}/rows.npy", "--k", "1000", "--out", f"{work}/clusters"],
        "vae": ["vae", f"{work}/rows.npy", "--out", f"{work}/latents"],
    }


def first_line(words: list[str], longest: float) -> tuple[float | None, float, str]:
    """Return the seconds to the first line and to the end, and that line."""
    began, first, text = time.perf_counter(), None, b""
    process = subprocess.Popen(
        [*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with selectors.DefaultSelector() as streams:
        for stream in (process.stdout, process.stderr):
            streams.register(stream, selectors.EVENT_READ)
        while streams.get_map() and time.perf_counter() - began < longest:
            for key, _ in streams.select(0.05):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    streams.unregister(key.fileobj)
                elif first is None:
                    first, text = time.perf_counter() - began, data.split(b"\n")[0]
    taken = time.perf_counter() - began
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return first, taken, text.decode(errors="replace")


def prepare(source: str, shards: Path, run: Path, rows: Path) -> None:
    """Make the shards, a run of one epoch over them, and 60,000 rows of 256 numbers."""
    if not shards.exists():
        subprocess.run([*CLI, "pack", source, str(shards)], check=True)
    if not run.exists():
        words = ["pretrain", "demo-fashion", "--run", str(run), f"data.shards={shards}"]
        subprocess.run([*CLI, *words, "train.epochs=1", "cluster.iterations=5"], check=True)
    if not rows.exists():
        numbers = np.random.default_rng(0).normal(size=(60_000, 256)).astype(np.float32)
        np.save(rows, numbers)


def main() -> int:
    """Time the verbs, print a table, write JSON; 1 where one is later than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="what `deepclust pack` takes")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("first_progress.json"))
    parser.add_argument("--longest", type=float, default=20.0)
    parser.add_argument("--only", default="", help="verbs, with commas between")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shards, run = args.work / "shards", args.work / "run"
    prepare(args.source, shards, run, args.work / "rows.npy")
    new = Path(tempfile.mkdtemp(dir=args.work))
    (new / "rows.npy").symlink_to(args.work.absolute() / "rows.npy")
    chosen = verbs(args.source, shards, run, new)
    wanted = args.only.split(",") if args.only else list(chosen)
    records = []
    for name in wanted:
        first, taken, text = first_line(chosen[name], args.longest)
        if name == "submit":
            subprocess.run([*CLI, "cancel", str(new / "background")], check=True)
        late = first is None or first > LIMIT_S
        records.append(
            {"verb": name, "first_s": first, "taken_s": taken, "line": text, "late": late}
        )
        shown = "nothing" if first is None else f"{first:5.2f} s"
        print(f"{name:<22} {shown:>8} of {taken:5.1f} s  {text[:60]}", flush=True)
    shutil.rmtree(new)
    load = os.getloadavg()
    args.out.write_text(json.dumps({"limit_s": LIMIT_S, "load": load, "verbs": records}, indent=1))
    print(f"load {load[0]:.1f}")
    return int(any(record["late"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
