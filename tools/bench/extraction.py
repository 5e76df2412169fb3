#!/usr/bin/env python3
"""What does an extraction cost beside the forward pass alone?

    python tools/bench/extraction.py --shards S [--pairs 5] [--recipe demo-fashion] [a.b=c ...]

`run` is a real run of two epochs: images a second of its first extraction, which reads and decodes,
and of the second, whose crops are kept. `bare` is the same network over the same crops, all in
memory before the clock starts, in the batches and with the threads of the run, and a rank for each
of its ranks. Separate processes take turns, and each pair gives a ratio. Rates of a run are between
the reports of its chunks, so start-up is not in them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepclust import Recipe  # noqa: E402
from deepclust.data.read.loader import Loader  # noqa: E402
from deepclust.run.directory import Run  # noqa: E402
from deepclust.stages.data_index import open_data_index  # noqa: E402
from deepclust.stages.extract import _request  # noqa: E402
from deepclust.trained.saved import fresh_embedder  # noqa: E402

COLUMNS = ("bare", "first", "second")


def main() -> None:
    """Run pairs, print the table and write the facts."""
    args = arguments()
    if args.bare:
        print(json.dumps(bare(args)))
        return
    pairs = []
    for number in range(args.pairs):
        turns = (whole, alone) if number % 2 else (alone, whole)
        facts: dict[str, float] = {}
        for turn in turns:
            facts |= turn(args)
        pairs.append(facts)
        print(json.dumps(facts), flush=True)
    print(table(pairs))
    args.out.write_text(json.dumps({"recipe": args.recipe, "pairs": pairs}, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--recipe", default="demo-fashion")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/tmp/deepclust-extraction"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/deepclust-extraction.json"))
    parser.add_argument("--bare", action="store_true", help="only the bare pass, in this process")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of both: short, and two extractions."""
    short = ("train.epochs=1", "cluster.final=true", "train.threads=1")
    return Recipe.load(args.recipe, f"data.shards={args.shards}", *short, *args.overrides)


def whole(args: argparse.Namespace) -> dict[str, float]:
    """A real run: images a second of its extractions."""
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    recipe(args).save(args.work / "recipe.yaml")
    command = [sys.executable, "-m", "cluster_jobs.cli", "pretrain", args.work / "recipe.yaml"]
    subprocess.run(
        [*command, "--run", args.work / "run"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    return {name: rate(Run(args.work / "run"), n) for n, name in enumerate(("first", "second"))}


def rate(run: Run, number: int) -> float:
    """Images a second of a round's extraction, between the reports of its first and last chunk."""
    at = [e["time"] for e in run.events() if e["event"] == "unit" and e["round"] == number]
    n = len(open_data_index(run.recipe.data))
    # a rank reports a chunk when its next one is extracted
    between = len(at) - 2 * run.recipe.train.ranks
    return n * between / len(at) / float(at[-1] - at[0])


def alone(args: argparse.Namespace) -> dict[str, float]:
    """The forward pass in a process for each rank: images a second of all."""
    command = [sys.executable, __file__, "--bare", *sys.argv[1:]]
    ranks = recipe(args).train.ranks
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(ranks)]
    return {"bare": sum(float(process.communicate()[0]) for process in started)}


def bare(args: argparse.Namespace) -> float:
    """Images a second of the network over crops in memory."""
    chosen = recipe(args)
    torch.set_num_threads(chosen.train.threads or 1)
    index = open_data_index(chosen.data)
    step, n = chosen.data.extract_batch, min(len(index), 20_000)
    loader = Loader(index, 0)
    ids = [np.arange(start, min(start + step, n)) for start in range(0, n, step)]
    loaded = loader.stream(_request(chosen.data, some) for some in ids)
    batches = [one.images[0].clone() for one in loaded]
    loader.close()
    embedder = fresh_embedder(chosen)
    embedder.clustered(batches[0])
    began = time.perf_counter()
    for batch in batches:
        embedder.clustered(batch)
    return n / (time.perf_counter() - began)


def table(pairs: list[dict[str, float]]) -> str:
    """Medians, and the ratio of each extraction's time to that of the bare pass."""
    lines = ["| | images/s | time / bare |", "|---|---|---|"]
    for name in COLUMNS:
        ratio = median(pair["bare"] / pair[name] for pair in pairs)
        lines.append(f"| {name} | {median(pair[name] for pair in pairs):,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
