"""Verbs to begin with: the demo, recipes and their keys, guides, the state of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster_jobs.cli import complete, going_on
from cluster_jobs.cli.common import Json, Overrides, RecipeName, begun, examples
from cluster_jobs.terminal import visible
from deepclust.errors import shown

PANEL = "Begin here"
verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PANEL, epilog=examples("demo", "demo --run runs/demo train.epochs=2")
)
def demo(
    run_dir: Annotated[Path, typer.Option("--run", help="The run directory.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("datasets"),
    overrides: Overrides = None,
) -> None:
    """Pretrain on Fashion-MNIST in a few minutes, and show clusters, scores and a report."""
    from cluster_jobs.demo.demo import run_demo

    with going_on.resumed_by(going_on.typed_again):
        run_demo(run_dir, data, overrides or [], begun)


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "recipe small-photos",
        "recipe swav-fashion train.lr=0.1 > my.yaml",
        "recipe dino-fashion --schema",
    ),
)
def recipe(
    name: RecipeName,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of its keys instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a recipe with all of its keys, as YAML that `pretrain` takes."""
    from deepclust.recipe import Recipe

    chosen = Recipe.load(name, *(overrides or []))
    if schema:
        typer.echo(json.dumps(type(chosen).model_json_schema(), indent=None if as_json else 2))
    elif as_json:
        typer.echo(json.dumps(shown(chosen.model_dump(mode="json"))))
    else:
        typer.echo(chosen.show(), nl=False)


@verbs.command(
    "list",
    rich_help_panel=PANEL,
    epilog=examples("list recipes", "list keys share", "list methods --json"),
)
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="recipes, methods, terms, backbones or keys of a recipe.",
            autocompletion=complete.kinds,
        ),
    ],
    pattern: Annotated[
        str, typer.Argument(help="Letters in the name or the description; default: all.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List what a recipe can name: a line for each, with its paper."""
    from dataclasses import asdict

    from cluster_jobs import listing

    chosen = listing.items(kind, pattern)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in chosen]))
        return
    typer.echo("\n".join(listing.lines(chosen)))


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples("doctor", "doctor --runs /scratch/runs", "doctor --json"),
)
def doctor(
    runs_dir: Annotated[
        Path, typer.Option("--runs", help="The folder that shall hold the runs.")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check this machine: software, GPUs, limits, disk, clock, Ray and Slurm, each with its fix.

    The exit code is 4 when something that a run needs is red.
    """
    from dataclasses import asdict

    from cluster_jobs import doctor
    from deepclust.errors import ResourceError

    records = []
    for name, finding in doctor.examine(runs_dir):
        records.append({"name": name, **asdict(finding)})
        if not as_json:
            typer.secho(visible(doctor.line(name, finding)), fg=finding.state)
    red = [record["name"] for record in records if record["state"] == doctor.RED]
    if as_json:
        typer.echo(json.dumps({"ok": not red, "checks": records}))
    if red:
        raise ResourceError(f"red: {', '.join(map(str, red))}")


@verbs.command(rich_help_panel=PANEL, epilog=examples("guide", "guide imagenet-on-slurm"))
def guide(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The name of a guide; default: the list of guides.",
            autocompletion=complete.guides,
        ),
    ] = None,
) -> None:
    """Show a guide, or list the guides."""
    from cluster_jobs import guides

    typer.echo(guides.contents() if name is None else guides.read(name))
