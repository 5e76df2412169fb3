"""Verbs for whole runs: begin, submit, watch, cancel and resume them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster_jobs.cli import going_on
from cluster_jobs.cli.common import (
    Json,
    Overrides,
    RecipeName,
    RunDir,
    RunOption,
    begun,
    examples,
    log,
    print_out,
    terminal_width,
)
from cluster_jobs.terminal import visible
from deepclust.errors import RecipeError

PANEL = "Runs"
verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples("pretrain small-photos --run runs/a data.shards=shards cluster.k=50"),
)
def pretrain(recipe: RecipeName, run_dir: RunOption, overrides: Overrides = None) -> None:
    """Pretrain in the foreground, on this machine."""
    log(f"starting {run_dir}")
    from cluster_jobs import runs
    from cluster_jobs.display import AtStart, Display

    with going_on.resumed_by(lambda: going_on.resume_command(run_dir)), Display() as display:
        show = AtStart(display, lambda: _estimated(recipe, overrides or [], run_dir))
        runs.pretrain(recipe, run_dir, overrides or [], show)
    _log_finished(run_dir)


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "estimate small-photos data.shards=shards",
        "estimate swav-resnet50-imagenet --device h100 --samples 1281167 train.ranks=64",
        "estimate my.yaml --on slurm --device h100 slurm.nodes=8 train.ranks=64",
    ),
)
def estimate(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="A GPU by name; default: a short run measures this machine.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="The number of images, instead of data.shards."),
    ] = None,
    on: Annotated[
        str, typer.Option("--on", help="local, ray or slurm: with the ranks that it would have.")
    ] = "local",
    as_json: Json = False,
) -> None:
    """Say what a run would take: time by stage, GPU-hours, memory, disk, network."""
    begun(f"estimating {recipe}")
    from cluster_jobs import runs
    from cluster_jobs.estimate import estimate as estimate_run
    from cluster_jobs.estimate.devices import device_of
    from cluster_jobs.estimate.show import lines
    from deepclust.stages.data_index import open_data_index

    if on != "local" and device is None:
        raise RecipeError(
            f"--on {on} needs --device: this machine is not the one that would run it"
        )
    known = None if device is None else device_of(device)
    where = [] if samples is None else ["data.shards=not-read"]
    chosen = runs.planned(recipe, Path("runs/estimate"), on, [*where, *(overrides or [])]).recipe
    source = samples if samples is not None else open_data_index(chosen.data)
    made = estimate_run(chosen, source, known)
    typer.echo(json.dumps(made.as_dict()) if as_json else "\n".join(lines(made)))


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "submit small-photos --run runs/a data.shards=shards",
        "submit my.yaml --on slurm --run runs/b slurm.nodes=2 --dry-run",
        "submit my.yaml --on ray --address http://head:8265 --run runs/c",
        "submit my.yaml --on slurm --run runs/sweep --sweep cluster.k=1000,3000",
    ),
)
def submit(
    recipe: RecipeName,
    run_dir: RunOption,
    on: Annotated[
        str, typer.Option("--on", help="local, ray, slurm, or the module of another executor.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="The address of a running Ray cluster (ray.address).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and do nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the end.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="cluster.k=1000,3000 submits a run for each into the folder --run."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start a run in the background, on this machine or on a cluster."""
    log(f"planning {run_dir}")
    from cluster_jobs import runs
    from cluster_jobs.estimate.line import line

    changes = [*(overrides or []), *([f"ray.address={address}"] if address else [])]
    if sweep and wait:
        raise RecipeError("--wait follows one run: use deepclust logs RUN -f for one of the sweep")
    if sweep:
        planned = runs.submit_sweep(recipe, run_dir, on, changes, sweep, dry_run)
        done = f"submitted {len(planned.plans)} runs\n  deepclust status {run_dir}"
        typer.echo(str(planned)) if dry_run else log(done)
        return
    plan = runs.submit(recipe, run_dir, on, changes, dry_run)
    if dry_run:
        typer.echo(str(plan))
        log(line(plan.recipe, recipe, changes, on))
        return
    log(f"submitted {run_dir}\n  deepclust logs {run_dir} -f\n  deepclust status {run_dir}")
    if wait:
        _follow(run_dir)


@verbs.command(rich_help_panel=PANEL, epilog=examples("status", "status runs/a --json"))
def status(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show the state of runs."""
    from cluster_jobs import status

    states = status.statuses(status.find_runs(folder))
    if as_json:
        typer.echo(json.dumps([state.as_dict() for state in states]))
        return
    from cluster_jobs.display import status_table

    print_out(status_table(states, terminal_width()) if states else f"{folder} has no runs")


@verbs.command(
    rich_help_panel=PANEL, epilog=examples("logs runs/a -f -n 20", "logs runs/a --rank 3")
)
def logs(
    run_dir: RunDir,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")
    ] = False,
    rank: Annotated[int, typer.Option(help="The rank whose log is printed.")] = 0,
    lines: Annotated[
        int | None,
        typer.Option("-n", "--lines", min=0, help="The last lines of each log; default: all."),
    ] = None,
) -> None:
    """Print the log of a run, until Ctrl-C, which does not stop the run."""
    from cluster_jobs.status import tail

    try:
        for line in tail(run_dir, rank, follow, lines):
            typer.echo(visible(line))
    except KeyboardInterrupt:
        log(f"detached; {run_dir} continues")


@verbs.command(
    rich_help_panel=PANEL, epilog=examples("serve runs", "serve runs --port 9000 --read-only")
)
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of runs, or a run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines.")] = "127.0.0.1",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Refuse to submit, cancel and resume.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            help="Of the link; who has it acts as you. Default: a new one.", show_default=False
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name of this machine that links may use, as behind a proxy."),
    ] = None,
) -> None:
    """Show runs and their clusters in a browser, and answer programs, until Ctrl-C."""
    from cluster_jobs.web.serve import serve

    serve(folder, host, port, token, read_only, log, allow_host or ())


@verbs.command(rich_help_panel=PANEL, epilog=examples("cancel runs/a"))
def cancel(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a folder of runs.")],
) -> None:
    """Stop a run at its next step; it can be resumed."""
    from cluster_jobs import runs

    for text in runs.cancel(folder):
        log(text)


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples("resume runs/a", "resume runs/a --on slurm slurm.nodes=4"),
)
def resume(
    run_dir: RunDir,
    on: Annotated[
        str | None,
        typer.Option("--on", help="local, ray or slurm, in the background; default: foreground."),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Read data behind URLs that only the run names.")
    ] = False,
    accept_decoder: Annotated[
        bool,
        typer.Option("--accept-decoder", help="Go on where GPUs decode otherwise than before."),
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Continue a run from what is on disk; a finished one is left as it is."""
    from cluster_jobs import runs
    from cluster_jobs.display import Display

    if on is not None:
        runs.resume(run_dir, overrides or [], on, remote, accept_decoder)
        log(f"resuming {run_dir}\n  deepclust logs {run_dir} -f")
        return
    log(f"resuming {run_dir}")
    with going_on.resumed_by(going_on.typed_again), Display() as display:
        runs.resume_here(run_dir, overrides or [], display, remote, accept_decoder)
    _log_finished(run_dir)


def _estimated(recipe: str, overrides: list[str], run_dir: Path) -> str:
    """Return the line on what a run takes that has just made its index."""
    from cluster_jobs.estimate.line import line
    from deepclust.run.directory import Run

    return line(Run(run_dir).recipe, recipe, overrides, "local", run_dir)


def _follow(run_dir: Path) -> None:
    """Print the log until the run has ended, and exit as it did."""
    from cluster_jobs import runs

    try:
        ending = runs.follow(run_dir, typer.echo)
    except KeyboardInterrupt:
        log(f"detached; {run_dir} continues")
        return
    log(f"{run_dir}: {ending.state} {ending.reason}".rstrip())
    sys.exit(ending.exit_code)


def _log_finished(run_dir: Path) -> None:
    from cluster_jobs.display import command_line
    from deepclust.launch.torchrun import is_follower
    from deepclust.run.directory import open_run

    if is_follower():
        return
    commands = [command_line("report", run_dir)]
    if open_run(run_dir).recipe.assigns:
        commands.append(command_line("assignments", run_dir, "--out", "clusters.parquet"))
    following = "\n           ".join(commands)
    if replaced := sum({e["step"]: e["count"] for e in _replaced(run_dir)}.values()):
        log(
            f"{replaced} samples could not be read and were replaced: {run_dir}/logs/replaced.jsonl"
        )
    log(
        f"finished: {run_dir}\n  weights  {run_dir / 'export' / 'backbone.safetensors'}\n"
        f"  next     {following}"
    )


def _replaced(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of samples that were replaced, of which the last for a step counts."""
    from deepclust.run.directory import Run

    return [event for event in Run(run_dir).events() if event["event"] == "replaced"]
