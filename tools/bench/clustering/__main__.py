"""Benchmarks of the clustering, each against its peers: same rows, same first centroids.

    python tools/bench/clustering kmeans-cpu [--busy]     # k-means on a CPU against FAISS, sklearn
    python tools/bench/clustering kmeans-grid             # the same for 72 sizes
    python tools/bench/clustering step-cpu                # DeepCluster's step: PCA, L2, k-means
    python tools/bench/clustering empties                 # inputs that leave clusters empty
    python tools/bench/clustering out-of-core             # rows larger than we may allocate
    python tools/bench/clustering fixed                   # centroids that must not move
    python tools/bench/clustering gpu --peak-tflops 60    # ImageNet's size on a GPU

Every contender runs in its own process, from one memory-mapped file in --work. Each bench prints a
Markdown table and writes all runs, versions, threads and the data's hash as JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import empties
import fixed
import gpu
import kmeans_cpu
import kmeans_grid
import out_of_core
import processes
import report
import step_cpu

BENCHES = {
    "kmeans-cpu": kmeans_cpu, "kmeans-grid": kmeans_grid, "step-cpu": step_cpu, "empties": empties,
    "out-of-core": out_of_core, "fixed": fixed, "gpu": gpu,
}  # fmt: skip

OPENBLAS = "kernels: auto (SkylakeX where the CPU has AVX-512), as-is, or a name like Zen"


def main() -> None:
    """Run one bench, print its table, write its JSON."""
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    machine = processes.machine()
    found = BENCHES[options.bench].run(options)
    print(report.markdown(found["table"]))
    setting = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    facts = {"bench": options.bench, "command": sys.argv, "setting": setting, "machine": machine}
    out = options.out or Path(f"/tmp/bench-clustering-{options.bench}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    print(f"wrote {out}", file=sys.stderr)


def parse() -> argparse.Namespace:
    """One subcommand a bench, with what they share."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        one = benches.add_parser(name, description=bench.__doc__.split("\n\n")[0])
        one.add_argument("--work", type=Path, default=Path("/tmp/deepclust-bench"), help="cache")
        one.add_argument("--out", type=Path, help="JSON (/tmp/bench-clustering-BENCH.json)")
        one.add_argument("--threads", type=int, help="of every contender (default: its own)")
        one.add_argument("--openblas", default="auto", metavar="CORE", help=OPENBLAS)
        bench.add_arguments(one)
    return parser.parse_args()


if __name__ == "__main__":
    main()
