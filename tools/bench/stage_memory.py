"""Peak memory and time of every clustering stage, each in its own process, from a file on disk.

The original DeepCluster holds all features as float32 [n, D], copies them for PCA, and clusters in
the same process. Here each stage streams a memory-mapped float16 file. The stage `vae` fits and
encodes, as `deepclust vae` does. Measured is RssAnon, what the process allocates beyond file pages
that the kernel can drop, sampled every 2 ms, above its value after the imports and one small
warm-up product.

    python tools/bench/stage_memory.py --n 200000 --D 2048 --out memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

BLOCK = 4096
STAGES = ("moments", "solve", "project", "kmeans", "vae")


def main() -> None:
    """Parse, make the features, run every stage in a process, print the table."""
    args = parse()
    if args.stage:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        args.folder = folder
        make_features(Path(folder) / "features.npy", args.n, args.D)
        rows = [run_stage(args, stage) for stage in STAGES]
    report(args, rows)


def parse() -> argparse.Namespace:
    """Arguments; --stage and --folder are for the processes that we start."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"n": 200_000, "D": 2048, "dim": 256, "k": 1000, "iterations": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scratch", help="folder for the features file (default: TMPDIR)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_features(path: Path, n: int, dim: int) -> None:
    """Seeded rectified mixture of 1,000 groups, float16, written block by block."""
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((1000, dim), dtype=np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, dim))
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        rows = centres[draws.integers(0, 1000, size)]
        out[start : start + size] = np.maximum(rows + draws.standard_normal(rows.shape), 0)
    out.flush()


def run_stage(args: argparse.Namespace, stage: str) -> dict[str, float | str]:
    """One stage in a fresh interpreter."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", args.folder]
    for name in ("n", "D", "dim", "k", "iterations"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def measure(args: argparse.Namespace) -> dict[str, float | str]:
    """Run one stage here and watch its anonymous memory."""
    import torch

    import cluster_jobs.results.vae_files  # noqa: F401
    import deepclust.clustering.kmeans
    import deepclust.clustering.whiten  # noqa: F401

    torch.ones(256, 256) @ torch.ones(256, 256)
    before, peak = anonymous(), [0]
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    began = time.monotonic()
    RUN[args.stage](args, Path(args.folder))
    seconds = time.monotonic() - began
    stop.set()
    watcher.join()
    return {"stage": args.stage, "peak_MB": (peak[0] - before) / 1e6, "seconds": seconds}


def watch(peak: list[int], stop: threading.Event) -> None:
    """Keep the largest value seen."""
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)


def anonymous() -> int:
    """RssAnon of this process in bytes (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def moments(args: argparse.Namespace, folder: Path) -> None:
    """What extraction does beside the forward pass."""
    import torch

    from deepclust.clustering.moments import Moments
    from deepclust.files import write_tensors

    rows = np.load(folder / "features.npy", mmap_mode="r")
    total = Moments.zero(torch.from_numpy(rows[:BLOCK].astype(np.float32)).mean(0))
    for start in range(0, len(rows), BLOCK):
        total.add(torch.from_numpy(np.array(rows[start : start + BLOCK])))
    tensors = {"pivot": total.pivot, "sum": total.sum, "outer": total.outer}
    write_tensors(folder / "moments.safetensors", tensors)


def solve(args: argparse.Namespace, folder: Path) -> None:
    """Top eigenvectors of the covariance."""
    from safetensors.torch import load_file

    from deepclust.clustering.moments import Moments
    from deepclust.clustering.whiten import solve as solve_whitening

    moments = Moments(args.n, **load_file(folder / "moments.safetensors"))
    found = solve_whitening(moments, args.dim)
    found.save(folder / "whitening.safetensors")


def project(args: argparse.Namespace, folder: Path) -> None:
    """Raw rows to whitened unit rows in float16."""
    from deepclust.clustering.whiten import Whitening

    whitening = Whitening.load(folder / "whitening.safetensors")
    rows = np.load(folder / "features.npy", mmap_mode="r")
    shape = (len(rows), args.dim)
    out = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, shape)
    for start in range(0, len(rows), BLOCK):
        out[start : start + BLOCK] = whitening(rows[start : start + BLOCK])


def kmeans(args: argparse.Namespace, folder: Path) -> None:
    """Lloyd on the memory-mapped whitened rows."""
    from deepclust.clustering.kmeans import kmeans as cluster

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    cluster(rows, args.k, iterations=args.iterations)


def vae(args: argparse.Namespace, folder: Path) -> None:
    """What `deepclust vae` does, for one epoch: those after it take no more memory."""
    from cluster_jobs.results.vae_files import build_vaes
    from deepclust.clustering.vae import VaeOptions

    build_vaes([folder / "features.npy"], folder / "latents", VaeOptions(epochs=1), "cpu")


RUN = {"moments": moments, "solve": solve, "project": project, "kmeans": kmeans, "vae": vae}


def report(args: argparse.Namespace, rows: list[dict[str, float | str]]) -> None:
    """Print a table, and write the same as JSON."""
    whole = args.n * args.D * 4 / 1e6
    print(f"n={args.n} D={args.D} dim={args.dim} k={args.k}; float32 [n, D] = {whole:.0f} MB")
    print(f"{'stage':10} {'peak MB':>9} {'share of n x D':>15} {'seconds':>9}")
    for row in rows:
        peak = float(row["peak_MB"])
        print(f"{row['stage']:10} {peak:9.0f} {peak / whole:15.3f} {float(row['seconds']):9.1f}")
    if args.out:
        setting = {name: getattr(args, name) for name in ("n", "D", "dim", "k", "iterations")}
        facts = {**setting, "float32_nD_MB": whole, "cpus": os.cpu_count(), "stages": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
