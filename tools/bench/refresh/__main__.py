"""A whole DeeperCluster refresh on synthetic features that are streamed in and never stored.

    python tools/bench/refresh [--n 250000 1000000] [--raw 2048] [--threads 2] [--json FILE]

With --device cuda all stages but the writing are on a GPU.

Moments, eigenvectors, projection to float16 [n, 256], m = 4 super-clusters, k = n / 300 clusters,
10 iterations a level, assignments written; each size in its own process (`stages.py`). The raw
rows are made twice instead of stored, and the time of making them is taken off (`stream.py`). Then
arithmetic for 96M rows and 320,000 clusters on named GPUs (`model.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent / "clustering"), str(HERE.parents[2])]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])

import model  # noqa: E402
import processes  # noqa: E402
import report  # noqa: E402

GPU_COUNTS = (1, 8, 64)
TYPES = {"moments": "float32", "projection": "float32", "eigenvectors": "float64"}
COLUMNS = {
    "moments": "moments", "eigenvectors": "eigenvectors (host)", "projection": "projection",
    "level one": "level one", "level two": "level two",
    "products of level two": "(its products alone)",
}  # fmt: skip


def main() -> None:
    """Measure, print both tables, write the JSON."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("refresh: torch sees no GPU here (--device cpu)", file=sys.stderr)
        sys.exit(4)
    machine, on_it = processes.machine(), {"device": options.device}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        rates = [processes.call("stages", "product_rates", on_it, options)]
        runs = [processes.call("stages", "refresh", job, options) for job in jobs(options, work)]
        rates.append(processes.call("stages", "product_rates", on_it, options))
    best = {kind: max(rate[kind] for rate in rates) for kind in rates[0]}
    found = {"machine": machine, "product_rates": rates, "runs": runs, "model": extrapolated()}
    print(f"load before: {machine['load_before']}; products, GFLOP/s:", end=" ")
    print(", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in best.items()))
    for run in runs:
        print(facts(run))
    for table in (
        [line for run in runs for line in measured(run, best)], on_cpu(runs[-1]),
        *([line(size, gpu, ranks) for gpu in model.GPUS for ranks in GPU_COUNTS]
          for size in model.SIZES),
        byte_lines(),
    ):  # fmt: skip
        print(f"\n{report.markdown(table)}")
    print(f"\n{model.LEGEND}")
    if options.json:
        found |= {"command": sys.argv, "load_after": os.getloadavg()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Sizes and where to work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[250_000, 1_000_000])
    for name, value in {"raw": 2048, "dim": 256, "m": 4, "iterations": 10, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: all stages but the writing"
    )
    parser.add_argument("--work", type=Path, help="folder for rows.npy (default: TMPDIR)")
    parser.add_argument("--threads", type=int, help="default: what the environment says")
    parser.add_argument(
        "--openblas", default="auto", metavar="CORE", help="see tools/bench/clustering"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def jobs(options: argparse.Namespace, work: str) -> list[dict]:
    """A refresh of every size; k is the multiple of m next below n / 300."""
    return [
        {"n": n, "k": n // 300 // options.m * options.m, "m": options.m, "D": options.raw,
         "d": options.dim, "iterations": options.iterations, "seed": options.seed, "work": work,
         "device": options.device}
        for n in options.n
    ]  # fmt: skip


def size_of(run: dict) -> model.Size:
    """The size that a run had."""
    return model.Size(*(run[name] for name in ("n", "k", "m", "D", "d", "iterations")))


def measured(run: dict, rates: dict) -> list[dict]:
    """A line for each stage of a run, and one for all."""
    if "error" in run:
        return [{"n": "", "stage": run["error"]}]
    work, stages = model.flops(size_of(run)), run["stages"]
    total = {"stage": "all", "peak_bytes": max(stage["peak_bytes"] for stage in stages)}
    for key in ("seconds", "cpu_s", "generator_s", "streamed", "read", "written"):
        total[key] = sum(stage[key] for stage in stages)
    total_line = stage_line(run, total, 0, 0)
    half = "bfloat16" if run["bf16_search"] else "float32"
    return [
        stage_line(run, stage, work.get(stage["stage"], 0), rates[TYPES.get(stage["stage"], half)])
        for stage in stages
    ] + [total_line]


def facts(run: dict) -> str:
    """What came out, so that one sees that it is a clustering."""
    if "error" in run:
        return run["error"]
    shares = ", ".join(f"{share:.1%}" for share in run["super_shares"])
    sizes = " / ".join(f"{run['statistics']['sizes'][key]:.0f}" for key in ("min", "median", "max"))
    return (
        f"n = {run['n']:,}: D = {run['D']}, rank {run['rank']}, super-clusters {shares}; clusters "
        f"min / median / max {sizes}; forced {run['forced']}; memory is above the "
        f"{run['base_bytes'] / 1e6:.0f} MB after imports, one peak for both levels"
    )


def stage_line(run: dict, stage: dict, work: float, rate: float) -> dict:
    """Cells of a stage; its FLOP/s also as a share of a large product's in the type it uses."""
    reached = work / stage["seconds"]
    return {
        "n, k": f"{run['n']:,}, {run['k']:,}",
        "stage": stage["stage"],
        "seconds": f"{stage['seconds']:.1f}",
        "CPU s": f"{stage['cpu_s']:.1f}",
        "load": f"{stage['load_after']:.1f}" if "load_after" in stage else "",
        "generator, s": f"{stage['generator_s']:.1f}",
        "GFLOP/s": f"{reached / 1e9:.0f}" if work else "",
        "of product's": f"{reached / rate:.0%}" if work else "",
        "peak MB": f"{stage['peak_bytes'] / 1e6:.0f}",
        **{f"{key} MB": f"{stage[key] / 1e6:.1f}" for key in ("streamed", "read", "written")},
    }


def on_cpu(run: dict) -> list[dict]:
    """Core time of the large sizes, at the FLOPs a CPU second of each stage of the last run."""
    if "error" in run:
        return []
    own = model.flops(size_of(run))
    seconds = {s["stage"]: s["cpu_s"] for s in run["stages"] if s["stage"] in own}
    lines = []
    for size in model.SIZES:
        scaled = {s: seconds[s] * work / own[s] for s, work in model.flops(size).items()}
        cells = {stage: span(value) for stage, value in scaled.items()}
        lines.append({"core time on this CPU": f"96M x 320k, d = {size.d}", **cells,
                      "all": span(sum(scaled.values()))})  # fmt: skip
    return lines


def line(size: model.Size, gpu: model.Gpu, ranks: int) -> dict:
    """Times of every stage on some GPUs, each with its limit's letter."""
    costs = model.costs(size, gpu, ranks)
    own = ("moments", "eigenvectors", "projection", "level one")
    before = sum(costs[stage].seconds for stage in own)  # the eigenvectors: on the host
    cells = {
        title: f"{span(costs[stage].seconds)} {costs[stage].limit}"
        for stage, title in COLUMNS.items()
    }
    return {
        f"d = {size.d}": f"{ranks} x {gpu.name}", **cells,
        "all": span(before + costs["level two"].seconds),
    }  # fmt: skip


def byte_lines() -> list[dict]:
    """Bytes at both dimensions."""
    small, large = (model.volumes(size) for size in model.SIZES)
    return [
        {"bytes": name, **{f"d = {size.d}": amount(part[name])
                           for size, part in zip(model.SIZES, (small, large), strict=True)}}
        for name in small
    ]  # fmt: skip


def extrapolated() -> list[dict]:
    """All figures of the model, for the JSON."""
    return [
        {"size": vars(size), "gpu": vars(gpu), "ranks": ranks,
         "stages": {name: {"seconds": cost.seconds, "reduce": cost.reduce, "limits": cost.limits}
                    for name, cost in model.costs(size, gpu, ranks).items()}}
        for size in model.SIZES for gpu in model.GPUS for ranks in GPU_COUNTS
    ]  # fmt: skip


def span(seconds: float) -> str:
    """Seconds, minutes or hours, two digits."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def amount(size: float) -> str:
    """Bytes in kB, MB, GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


if __name__ == "__main__":
    main()
