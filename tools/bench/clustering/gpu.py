"""k-means on a GPU at ImageNet's size, the whole clustering step, and a round of YFCC100M's size.

Three parts: `kmeans` 1.28M x 256, k = 10,000, 20 iterations; `step` from 1.28M x 2048 raw float16;
`large` 24M x 256 float16, k = 80,000, seconds a pass. TFLOP/s counts 2 n k d a pass, and its share
is of --peak-tflops (float32) or --peak-tflops-half, the rates of the card that it ran on.
"""

from __future__ import annotations

import argparse
import sys

import data
import processes
import report

CONTENDERS = (
    "ours-fp16", "ours-fp32", "faiss-gpu", "flash-fp16", "flash-fp32", "fast-pytorch", "cuml",
    "cuvs", "torch-loop",
)  # fmt: skip
LARGE = ("ours-fp16", "flash-fp16")
LIMIT_S = 900


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, parts and peaks."""
    sizes = {
        "n": 1_281_167, "dim": 256, "k": 10_000, "iterations": 20, "D": 2048, "seeds": 3,
        "large-n": 24_000_000, "large-k": 80_000, "large-iterations": 2,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parts = ["kmeans", "step", "large"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--peak-tflops", type=float, help="float32, of this card")
    parser.add_argument("--peak-tflops-half", type=float, help="float16 or bfloat16, of this card")


def run(options: argparse.Namespace) -> dict:
    """The parts asked for."""
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu: torch sees no GPU here; the other benches need none (see --help)", file=sys.stderr
        )
        sys.exit(4)
    parts = {"kmeans": kmeans, "step": step, "large": large}
    found = [parts[name](options) for name in options.parts]
    return {
        "data": [one["data"] for one in found],
        "table": [line for one in found for line in one["table"]],
        "runs": [line for one in found for line in one["runs"]],
    }


def kmeans(options: argparse.Namespace) -> dict:
    """Every contender in turn, every seed; the referee on all."""
    rows = data.whitened(options.work, options.n, options.dim, "float16")
    runs = []
    for seed in range(options.seeds):
        turn = seed % len(options.contenders)
        for name in options.contenders[turn:] + options.contenders[:turn]:
            runs.append(one(options, rows, options.k, options.iterations, seed, name, judged=True))
    shape = (options.n, options.k, options.dim)
    lines = [line(options, runs, name, "kmeans", shape) for name in options.contenders]
    return {"data": data.facts(rows), "table": lines, "runs": runs}


def large(options: argparse.Namespace) -> dict:
    """Few iterations on many rows: what a pass costs. No referee: it would take longer than all."""
    rows = data.mixture(options.work, options.large_n, options.dim, "float16", unit=True)
    shape = (options.large_n, options.large_k, options.dim)
    names = [name for name in LARGE if name in options.contenders]
    runs = [
        one(options, rows, options.large_k, options.large_iterations, 0, name, judged=False)
        for name in names
    ]
    lines = [line(options, runs, name, "large", shape) for name in names]
    return {"data": data.facts(rows), "table": lines, "runs": runs}


def one(options, rows, k: int, iterations: int, seed: int, name: str, judged: bool) -> dict:
    """One contender in its process."""
    job = {
        "name": name, "rows": str(rows), "iterations": iterations, "seed": seed,
        "ids": str(data.start_ids(options.work, rows, k, seed)),
        "centroids": str(options.work / f"centroids-{name}.npy"),
    }  # fmt: skip
    found = processes.call("gpu_contenders", "measure", job, options, LIMIT_S)
    if judged and "error" not in found:
        found |= processes.call("referee", "judge", job, options)
    if "error" not in found:
        found["pass_s"] = found["seconds"] / found["passes"]
    print(f"{name} seed {seed}: {found.get('error') or found['seconds']}", file=sys.stderr)
    return {"name": name, "seed": seed, **found}


def line(options, runs: list[dict], name: str, part: str, shape: tuple[int, int, int]) -> dict:
    """A line of the table; ratios are to the first contender."""
    ours = options.contenders[0]
    n, k, dim = shape
    passes = report.of(runs, name, "pass_s")
    speed = [2 * n * k * dim / seconds / 1e12 for seconds in passes]
    half = any(report.of(runs, name, "half"))
    peak = options.peak_tflops_half if half else options.peak_tflops
    return {
        "part": part, "contender": name,
        "seconds": report.spread(report.of(runs, name, "seconds")),
        "copy s": report.spread(report.of(runs, name, "transfer")),
        "s a pass": report.spread(passes, "{:.4f}"),
        "TFLOP/s": report.spread(speed, "{:.1f}"),
        "of peak": report.spread([s / peak for s in speed], "{:.0%}") if peak else "",
        f"time, {ours} / it": report.spread(report.ratios(runs, ours, name, "seconds")),
        f"inertia, {ours} / it": report.spread(
            report.ratios(runs, ours, name, "inertia"), "{:.5f}"),
        "empties": report.spread(report.of(runs, name, "empties"), "{:.0f}"),
        "GB": report.spread(report.of(runs, name, "torch_peak_GB"), "{:.1f}"),
        "error": report.errors(runs, name),
    }  # fmt: skip


def step(options: argparse.Namespace) -> dict:
    """From raw features to labels: the original (PCA on the CPU, FAISS), and ours on the GPU."""
    raw = data.mixture(options.work, options.n, options.D, "float16")
    job = {
        "raw": str(raw), "ids": str(data.start_ids(options.work, raw, options.k, 0)), "seed": 0,
        "dim": options.dim, "k": options.k, "iterations": options.iterations,
        "centroids": str(options.work / "centroids-step.npy"),
    }  # fmt: skip
    runs, lines = [], []
    for name, more in {"ours": {"device": "cuda"}, "original": {}}.items():
        found = processes.call("step", name, job | more, options, LIMIT_S)
        runs.append({"name": name, "seed": 0, **found})
        parts = {f"{part} s": f"{seconds:.2f}" for part, seconds in found.get("parts", {}).items()}
        whole = report.spread(report.of(runs, name, "seconds"))
        ratio = report.spread(report.ratios(runs, "ours", name, "seconds"))
        lines.append({
            "part": "step", "contender": name, "seconds": whole, "time, ours / it": ratio, **parts,
            "error": report.errors(runs, name),
        })  # fmt: skip
    return {"data": data.facts(raw), "table": lines, "runs": runs}
