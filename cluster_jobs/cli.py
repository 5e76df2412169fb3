"""The `deepclust` command. Every verb is a few lines on top of a function that does the work.

Imports of torch and of everything heavy happen inside the verbs, so that `--help` is instant.
Results go to stdout, everything else to stderr; exit codes are those of `deepclust.errors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from deepclust.errors import DeepclustError, RecipeError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help="Pretrain image backbones by clustering.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

INTERRUPTED = 130
WIDE = 200  # columns of a table that no terminal bounds
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation
    typer.Argument(metavar="[a.b=c ...]", help="recipe values"),
]
Out = Annotated[Path, typer.Option("--out", help="file to write")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def main() -> None:
    """Entry point: run a verb, and turn our errors into a message and an exit code."""
    try:
        app(standalone_mode=True)
    except DeepclustError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            sys.stderr.write("interrupted; what was finished is kept\n")
        raise


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="where the images go")] = Path("datasets"),
    overrides: Overrides = None,
) -> None:
    """Fashion-MNIST, a few minutes: run, table, report, export."""
    from cluster_jobs.demo.demo import run_demo

    run_demo(run, data, overrides or [])


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(help="image folder, idx:DIR/train, torchvision:NAME@DIR")
    ],
    out: Annotated[Path, typer.Argument(help="folder for the shards")],
    workers: Annotated[int, typer.Option(help="threads; they change no byte")] = 1,
    seed: Annotated[int, typer.Option(help="of the shuffle")] = 0,
    resize_short: Annotated[Optional[int], typer.Option(help="short side, pixels")] = None,  # noqa: UP045
    shard_size: Annotated[Optional[int], typer.Option(help="samples a shard")] = None,  # noqa: UP045
) -> None:
    """Write images as shuffled tar shards, and index them."""
    from deepclust.data.pack.pack import pack as pack_images

    index = pack_images(
        source, out, workers=workers, seed=seed, resize_short=resize_short, shard_size=shard_size
    )
    _say(f"{len(index)} samples in {len(index.shards)} shards: {out}")


@app.command()
def index(
    shards: Annotated[str, typer.Argument(help="folder of tar shards, brace pattern, or URL")],
    verify: Annotated[bool, typer.Option(help="read every header again and compare")] = False,
    at: Annotated[Optional[Path], typer.Option("--index", help="where the index lies")] = None,  # noqa: UP045
) -> None:
    """Index anyone's WebDataset shards."""
    from deepclust.data.shards.index import build_index

    built = build_index(shards, at, verify=verify)
    labels = "no labels" if built.labels is None else "labels"
    _say(f"{len(built)} samples in {len(built.shards)} shards, {labels}, {built.fingerprint}")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="a path or a shipped name")],
    run: Annotated[Path, typer.Option("--run", help="run directory")],
    overrides: Overrides = None,
) -> None:
    """Pretrain in the foreground, on this machine."""
    from cluster_jobs import job_file
    from cluster_jobs.display import Display
    from cluster_jobs.executors import refuse_queued
    from deepclust.launch.start import pretrain as start
    from deepclust.recipe import Recipe

    refuse_queued(run)
    job_file.is_local_now(run)
    with Display() as display:
        start(Recipe.load(recipe, *(overrides or [])), run, display)
    _finished(run)


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="a path or a shipped name")],
    run: Annotated[Path, typer.Option("--run", help="run directory")],
    on: Annotated[str, typer.Option("--on", help="local, ray or slurm")] = "local",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="of a standing Ray cluster; same as ray.address=..."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print what would be done, do nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="follow the log until the end")] = False,
    sweep: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="cluster.k=1000,3000: a run for each in the folder --run"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start a run in the background, on this machine or on a cluster."""
    from cluster_jobs.executors import executor, refuse_queued
    from deepclust.recipe import Recipe

    where = executor(on)
    given = [*(overrides or []), *([f"ray.address={address}"] if address else [])]
    if sweep and wait:
        raise RecipeError("--wait follows one run: deepclust logs RUN -f, for a run of the sweep")
    if sweep:
        _submit_sweep(where, recipe, run, given, sweep, dry_run)
        return
    plan = where.prepare(Recipe.load(recipe, *given), run)
    if dry_run:
        typer.echo(str(plan))
        return
    refuse_queued(run)
    where.submit(plan)
    _say(f"submitted {run}\n  deepclust logs {run} -f\n  deepclust status {run}")
    if wait:
        _follow(run)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="a run, or a folder of runs")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """How runs are doing."""
    from cluster_jobs import status

    found = [status.status(run) for run in status.find_runs(folder)]
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in found]))
        return
    from cluster_jobs.display import status_table

    _print(status_table(found) if found else f"no runs in {folder}")


@app.command()
def logs(
    run: RunPath,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on until the end")] = False,
    rank: Annotated[int, typer.Option(help="whose log")] = 0,
) -> None:
    """Print the log of a run; Ctrl-C detaches and stops nothing."""
    from cluster_jobs.status import tail

    try:
        for line in tail(run, rank, follow):
            typer.echo(line)
    except KeyboardInterrupt:
        _say(f"detached; {run} goes on")


@app.command()
def cancel(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a folder of runs")],
) -> None:
    """Stop a run at its next step; it can be resumed."""
    from cluster_jobs.executors import executor_of
    from cluster_jobs.status import find_runs
    from deepclust.run.directory import open_run

    for found in find_runs(folder) or [open_run(folder)]:
        _say(executor_of(found.path).cancel(found.path))


@app.command()
def resume(
    run: RunPath,
    on: Annotated[
        str | None, typer.Option("--on", help="local, ray or slurm: in the background")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Continue a run from what is on disk; a finished one is left as it is."""
    from cluster_jobs import job_file
    from cluster_jobs.display import Display
    from cluster_jobs.executors import executor, refuse_queued
    from deepclust.launch.start import resume as start

    refuse_queued(run)
    if on is not None:
        executor(on).resume(run, overrides or [])
        _say(f"resuming {run}\n  deepclust logs {run} -f")
        return
    job_file.is_local_now(run)
    with Display() as display:
        start(run, *(overrides or []), show=display)
    _finished(run)


@app.command()
def extract(run: RunPath) -> None:
    """One stage: the features of the round that is due."""
    _stage(run, "extract")


@app.command()
def cluster(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|FEATURES.npy", help="a run, or rows of features")
    ],
    k: Annotated[Optional[int], typer.Option(help="clusters")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="new folder for the result")] = None,  # noqa: UP045
    whiten: Annotated[Optional[int], typer.Option(help="PCA-whiten to so many dimensions")] = None,  # noqa: UP045
    iterations: Annotated[int, typer.Option(help="updates of the centroids")] = 20,
    seed: Annotated[int, typer.Option(help="of the start")] = 0,
    init: Annotated[str, typer.Option(help="random, k-means++ or two-level")] = "random",
    spherical: Annotated[bool, typer.Option(help="unit rows, inner product")] = False,
    empty: Annotated[str, typer.Option(help="empties become: split or relocate")] = "split",
    min_size: Annotated[int, typer.Option(help="rows that every cluster ends with")] = 1,
    backend: Annotated[str, typer.Option(help="auto, torch or faiss")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    ids: Annotated[Optional[Path], typer.Option(help="names of the rows: text, .parquet")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """One stage of a run: the assignments that are due. Or k-means over any features.

    The options are for a file of features; a run has them in its recipe.
    """
    from cluster_jobs.results import cluster_file

    options = cluster_file.Options(
        k, whiten, iterations, seed, init, spherical, empty, min_size, backend, device, ids
    )
    if not cluster_file.is_features(source):
        cluster_file.refuse_options(source, options, out)
        _stage(source, "cluster")
        return
    found = cluster_file.cluster_features(source, out, options)
    if as_json:
        typer.echo(json.dumps(found))
        return
    _print(cluster_file.summary(found))
    _say(f"wrote {out}")


@app.command()
def train(run: RunPath) -> None:
    """One stage: training until the next round is due."""
    _stage(run, "train")


@app.command()
def evaluate(
    run: RunPath,
    train_shards: Annotated[str, typer.Option("--train", help="labelled shards to fit on")],
    test_shards: Annotated[str, typer.Option("--test", help="labelled shards to score on")],
    as_json: Json = False,
) -> None:
    """Weighted kNN, linear probe and clusters of the run's frozen backbone."""
    from cluster_jobs.results.evaluate import evaluate_run

    scores = evaluate_run(
        run, train_shards, test_shards, tell=lambda text: typer.echo(text, err=True)
    )
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, values in scores.items():
        typer.echo(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))


@app.command()
def assignments(
    run: RunPath,
    out: Out,
    round_: Annotated[Optional[int], typer.Option("--round", help="default: the last")] = None,  # noqa: UP045
) -> None:
    """Which image is in which cluster, as Parquet or CSV."""
    from cluster_jobs.results.assignments import export_assignments

    export_assignments(run, out, round_)
    _say(f"wrote {out}")


@app.command()
def export(
    run: RunPath,
    out: Out,
    format_: Annotated[
        str, typer.Option("--format", help="torchvision or safetensors")
    ] = "safetensors",
) -> None:
    """The backbone of the newest checkpoint, read back and compared before it counts."""
    from cluster_jobs.results.evaluate import export_run

    done = export_run(run, out, format_)
    _say(f"wrote {done.path} ({done.hash})\n{done.usage}")


@app.command()
def report(run: RunPath, out: Out) -> None:
    """One static HTML page: curves, clusters, images."""
    from cluster_jobs.report import write_report

    _say(f"wrote {write_report(run, out)}")


@app.command()
def guide(
    name: Annotated[str | None, typer.Argument(help="a guide; without it, the list")] = None,
) -> None:
    """Show a guide, or list the guides."""
    from cluster_jobs import guides

    typer.echo(guides.contents() if name is None else guides.read(name))


def _follow(run: Path) -> None:
    """Print the log until the run has ended, and end as it did; Ctrl-C detaches."""
    from cluster_jobs.executors import executor_of
    from cluster_jobs.status import follow

    where = executor_of(run)
    try:
        ending = follow(run, typer.echo, lambda: bool(where.is_pending(run)))
    except KeyboardInterrupt:
        _say(f"detached; {run} goes on")
        return
    _say(f"{run}: {ending.state} {ending.reason}".rstrip())
    sys.exit(ending.exit_code)


def _submit_sweep(
    where: ModuleType, recipe: str, folder: Path, given: list[str], sweep: list[str], dry_run: bool
) -> None:
    """Every point of the sweep as a run of its own, in that folder."""
    from cluster_jobs.executors import refuse_queued
    from cluster_jobs.sweep import places
    from deepclust.recipe import Recipe
    from deepclust.run import directory

    plans = [
        where.prepare(Recipe.load(recipe, *given, *point), run)
        for run, point in places(folder, sweep).items()
    ]
    whole = where.prepare_sweep(plans, folder)
    if dry_run:
        typer.echo(str(whole))
        return
    if directory.exists(folder):
        raise RecipeError(f"{folder} is a run, not a folder for runs: choose another --run")
    for plan in plans:
        refuse_queued(plan.run)
    where.submit_sweep(whole)
    _say(f"submitted {len(plans)} runs\n  deepclust status {folder}")


def _stage(run: Path, stage: str) -> None:
    from cluster_jobs import job_file
    from cluster_jobs.display import Display
    from cluster_jobs.executors import refuse_queued
    from deepclust.launch.start import run_stage

    refuse_queued(run)
    job_file.is_local_now(run)
    with Display() as display:
        run_stage(run, stage, show=display)
    _say(f"{stage} is done: {run}")


def _finished(run: Path) -> None:
    from cluster_jobs.display import typed
    from deepclust.run.directory import open_run

    commands = [typed("report", run, "--out", run / "report.html")]
    if open_run(run).recipe.cluster is not None:
        commands.append(typed("assignments", run, "--out", "clusters.parquet"))
    following = "\n           ".join(commands)
    _say(
        f"finished: {run}\n  weights  {run / 'export' / 'backbone.safetensors'}\n"
        f"  next     {following}"
    )


def _print(what: Table | str) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE).print(what)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
