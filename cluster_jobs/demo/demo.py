"""The demo: from nothing to clusters, weights and a report of Fashion-MNIST, in a few minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console

from cluster_jobs.demo.fashion_mnist import fetch
from cluster_jobs.display import Display, command_line, round_table, scores_lines
from deepclust.data.pack.pack import pack
from deepclust.launch.start import pretrain, resume
from deepclust.recipe import Recipe
from deepclust.run import directory


def run_demo(run_dir: Path, data: Path, overrides: list[str], begun: Callable[[str], None]) -> None:
    """Fetch, pack, pretrain (or resume), evaluate, report, and print the next commands.

    `begun` is given what begins without a display, and says that it goes on.
    """
    shards = {split: _packed(data, split) for split in ("train", "t10k")}
    with Display() as display:
        if directory.exists(run_dir):
            sys.stderr.write(f"continuing {run_dir}\n")
            resume(run_dir, *overrides, show=display)
        else:
            recipe = Recipe.load("demo-fashion", f"data.shards={shards['train']}", *overrides)
            pretrain(recipe, run_dir, display)
    begun("evaluating on the test images (the only use of the labels)")
    _conclude(run_dir, shards)


def _packed(data: Path, split: str) -> Path:
    out = data / "fashion-mnist-shards" / split
    if not out.exists():
        sys.stderr.write(f"packing {out}\n")
        source = fetch(data / "fashion-mnist")
        pack(f"idx:{source}/{split}", out, class_names=CLASSES)
    return out


def _conclude(run_dir: Path, shards: dict[str, Path]) -> None:
    from cluster_jobs.report import write_report
    from cluster_jobs.results.evaluate import evaluate_run

    scores = evaluate_run(run_dir, str(shards["train"]), str(shards["t10k"]))
    page = write_report(run_dir, run_dir / "report.html")
    console = Console()
    console.print(round_table(directory.Run(run_dir).metrics("round")))
    for line in scores_lines(scores):
        console.print(line)
    commands = (
        command_line("status", run_dir),
        command_line("assignments", run_dir, "--out", "clusters.parquet"),
        command_line("pack", "YOUR_IMAGES", "shards", "--resize-short", 72),
        command_line("pretrain", "small-photos", "--run", "runs/mine", "data.shards=shards"),
    )
    typer.echo(
        f"\nreport   {page}\nweights  {run_dir / 'export' / 'backbone.safetensors'}\n\nnext:"
    )
    typer.echo("".join(f"  {command}\n" for command in commands))


CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
