"""The `deepclust` command.

Every verb is a few lines on top of a function that does the work.
Imports of torch and of all that is heavy happen inside the verbs, so that `--help` is instant.
Results go to stdout, everything else to stderr. Exit codes are those of `deepclust.errors`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster_jobs.terminal import visible
from deepclust import __version__
from deepclust.errors import (
    DeepclustError,
    DiskError,
    RecipeError,
    lack_of_memory,
    redact,
    shown,
)
from deepclust.files import path_of

if TYPE_CHECKING:
    from rich.table import Table

    from deepclust.evaluate import Scores

app = typer.Typer(
    help="Pretrain image backbones by clustering.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
BEGIN, DATA, RUNS, STAGES, RESULTS = (  # the groups of verbs in `deepclust --help`
    "Begin here", "Data", "Runs", "One stage", "Results",
)  # fmt: skip
WIDE = 200  # columns of a table where there is no terminal
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="The path of a recipe, or the name of a shipped one."),
]
RunOption = Annotated[
    Path,
    typer.Option(
        "--run",
        help="The run directory to create.",
        metavar="DIRECTORY",
        parser=lambda text: path_of(text, "--run"),  # an empty one would be the present folder
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c ...]", help="Keys of the recipe and their new values."),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def main() -> None:
    """Run a verb, and turn our errors into a message and an exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stderr
        # a file that is cut short while it is mapped ends with a signal, also while an image is
        # decoded, when descriptor 2 is another one (`complaints.py`)
        faulthandler.enable(os.dup(2))
    for stream in (sys.stdout, sys.stderr):  # names of runs have letters that a locale may lack
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except DeepclustError as error:
        _log(f"error: {redact(str(error))}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        raise
    except Exception as error:
        lacks = lack_of_memory(error)
        if lacks is not None:
            sys.stderr.write(redact(f"error: {lacks}\n"))
            sys.exit(lacks.exit_code)
        if isinstance(error, OSError):  # of a file that nobody expected to be refused
            text = f"error: {error.filename or 'a file'}: {error.strerror or error}\n"
            sys.stderr.write(redact(text))
            sys.exit(DiskError.exit_code)
        sys.stderr.write(redact(traceback.format_exc()))
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            sys.stderr.write("interrupted; finished work is kept\n")
        raise


def _examples(*commands: str) -> str:
    """Return the text under a verb's help."""
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n\n".join([title, *(f"deepclust {command}" for command in commands)])


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"deepclust {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Pretrain image backbones by clustering."""


@app.command(rich_help_panel=BEGIN, epilog=_examples("demo", "demo --run runs/demo train.epochs=2"))
def demo(
    run_dir: Annotated[Path, typer.Option("--run", help="The run directory.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("datasets"),
    overrides: Overrides = None,
) -> None:
    """Pretrain on Fashion-MNIST in a few minutes, and show clusters, scores and a report."""
    from cluster_jobs.demo.demo import run_demo

    run_demo(run_dir, data, overrides or [])


@app.command(
    rich_help_panel=DATA,
    epilog=_examples(
        "pack photos shards --workers 8",
        "pack photos.zip more/ shards --classes last",
        "pack labels.csv shards --range 0:4095",
        "pack idx:fashion/train shards",
    ),
)
def pack(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images; lists (.txt, .csv) or .parquet of them; a .zip or .tar.gz; "
            "idx:DIR/train; torchvision:NAME:SPLIT@DIR."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    workers: Annotated[
        int, typer.Option(help="The threads; the bytes are the same for any number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="The seed of the shuffle.")] = 0,
    resize_short: Annotated[
        int | None, typer.Option(help="The short side of every image, in pixels.")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="The samples of a shard.")] = None,
    classes: Annotated[
        str,
        typer.Option(help="none, first, last or full folder, or a file with a class name a line."),
    ] = "",
    range_: Annotated[
        str,
        typer.Option("--range", help="Black and white of more than 8 bits: auto, full, LOW:HIGH."),
    ] = "auto",
) -> None:
    """Write images as shuffled tar shards, index them, and say what was left out."""
    from deepclust.data.pack.pack import pack as pack_images

    shape = {"resize_short": resize_short, "shard_size": shard_size}
    rules = {"classes": classes, "range": range_}
    index = pack_images(sources, out, emit=_log, workers=workers, seed=seed, **shape, **rules)
    _log(f"{len(index)} samples in {len(index.shards)} shards: {out}")


@app.command(
    rich_help_panel=DATA,
    epilog=_examples(
        "index shards",
        "index 's3://bucket/train-{000..146}.tar' --index i",
        "index 'shards/**/*.tar' --image input.jpg --labels json.class",
        "index photos --labels last",
    ),
)
def index(
    shards: Annotated[
        list[str],
        typer.Argument(help="Folders of tar shards or images, lists, patterns with *, or URLs."),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read headers and labels again; compare with every row."),
    ] = False,
    bodies: Annotated[
        bool,
        typer.Option("--bodies", help="Hash all bytes too, so that --verify compares images."),
    ] = False,
    at: Annotated[
        Path | None, typer.Option("--index", help="The folder of the index; default: the shards'.")
    ] = None,
    image: Annotated[str, typer.Option(help="As data.image: auto, or input.jpg.")] = "auto",
    labels: Annotated[
        str, typer.Option(help="As data.labels: auto, none, folder, cls, json.KEY; last, FILE.")
    ] = "auto",
) -> None:
    """Index WebDataset shards of any origin, or image files, and say what is left out."""
    from deepclust.data.shards import summary
    from deepclust.data.shards.index import build_index

    built = build_index(
        shards[0] if len(shards) == 1 else shards,
        at,
        verify=verify,
        bodies=bodies,
        image=image,
        labels=labels,
    )
    for note in built.notes():
        _log(f"note: {note}")
    labelled = summary.describe_labels(built.manifest)
    _log(f"{len(built)} samples in {len(built.shards)} shards, {labelled}, {built.fingerprint}")
    if verify:
        _log(summary.describe_check(built.manifest))


@app.command(
    rich_help_panel=RUNS,
    epilog=_examples("pretrain small-photos --run runs/a data.shards=shards cluster.k=50"),
)
def pretrain(recipe: RecipeName, run_dir: RunOption, overrides: Overrides = None) -> None:
    """Pretrain in the foreground, on this machine."""
    from cluster_jobs import runs
    from cluster_jobs.display import Display

    with Display() as display:
        runs.pretrain(recipe, run_dir, overrides or [], display)
    _log_finished(run_dir)


@app.command(
    rich_help_panel=RUNS,
    epilog=_examples(
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
    from cluster_jobs import runs

    changes = [*(overrides or []), *([f"ray.address={address}"] if address else [])]
    if sweep and wait:
        raise RecipeError("--wait follows one run: use deepclust logs RUN -f for one of the sweep")
    if sweep:
        planned = runs.submit_sweep(recipe, run_dir, on, changes, sweep, dry_run)
        done = f"submitted {len(planned.plans)} runs\n  deepclust status {run_dir}"
        typer.echo(str(planned)) if dry_run else _log(done)
        return
    plan = runs.submit(recipe, run_dir, on, changes, dry_run)
    if dry_run:
        typer.echo(str(plan))
        return
    _log(f"submitted {run_dir}\n  deepclust logs {run_dir} -f\n  deepclust status {run_dir}")
    if wait:
        _follow(run_dir)


@app.command(rich_help_panel=RUNS, epilog=_examples("status", "status runs/a --json"))
def status(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show the state of runs."""
    from cluster_jobs import status

    states = [status.status(run) for run in status.find_runs(folder)]
    if as_json:
        typer.echo(json.dumps([state.as_dict() for state in states]))
        return
    from cluster_jobs.display import status_table

    _print(status_table(states) if states else f"{folder} has no runs")


@app.command(rich_help_panel=RUNS, epilog=_examples("logs runs/a -f -n 20", "logs runs/a --rank 3"))
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
        _log(f"detached; {run_dir} continues")


@app.command(rich_help_panel=RUNS, epilog=_examples("cancel runs/a"))
def cancel(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a folder of runs.")],
) -> None:
    """Stop a run at its next step; it can be resumed."""
    from cluster_jobs import runs

    for text in runs.cancel(folder):
        _log(text)


@app.command(
    rich_help_panel=RUNS,
    epilog=_examples("resume runs/a", "resume runs/a --on slurm slurm.nodes=4"),
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
    overrides: Overrides = None,
) -> None:
    """Continue a run from what is on disk; a finished one is left as it is."""
    from cluster_jobs import runs
    from cluster_jobs.display import Display

    if on is not None:
        runs.resume(run_dir, overrides or [], on, remote)
        _log(f"resuming {run_dir}\n  deepclust logs {run_dir} -f")
        return
    with Display() as display:
        runs.resume_here(run_dir, overrides or [], display, remote)
    _log_finished(run_dir)


@app.command(rich_help_panel=STAGES, epilog=_examples("extract runs/a"))
def extract(run_dir: RunDir) -> None:
    """Do one stage of a run: extract the features of the round that is due."""
    _run_stage(run_dir, "extract")


Clusters = Annotated[int | None, typer.Option("--k", help="The number of clusters.")]
Whiten = Annotated[int | None, typer.Option(help="PCA-whiten the rows to this many dimensions.")]
Iterations = Annotated[int, typer.Option(help="The number of updates of the centroids.")]
Seed = Annotated[int, typer.Option(help="The seed of the initial centroids.")]
Init = Annotated[str, typer.Option(help="The initial centroids: random, k-means++ or two-level.")]
Spherical = Annotated[
    bool, typer.Option("--spherical", help="Compare unit rows by their inner product.")
]
Empty = Annotated[str, typer.Option(help="How an empty cluster is refilled: split or relocate.")]
MinSize = Annotated[int, typer.Option(help="The smallest number of rows of a cluster.")]
Backend = Annotated[str, typer.Option(help="auto, torch or faiss.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Ids = Annotated[Path | None, typer.Option(help="The names of the rows: a text file or Parquet.")]
NewFolder = Annotated[Path | None, typer.Option(help="The new folder for the result.")]
Source = Annotated[
    Path, typer.Argument(metavar="RUN|FEATURES.npy", help="A run, or a file of features.")
]


@app.command(
    rich_help_panel=STAGES,
    epilog=_examples("cluster runs/a", "cluster features.npy --k 1000 --whiten 256 --out clusters"),
)
def cluster(
    source: Source,
    k: Clusters = None,
    out: NewFolder = None,
    whiten: Whiten = None,
    iterations: Iterations = 20,
    seed: Seed = 0,
    init: Init = "random",
    spherical: Spherical = False,
    empty: Empty = "split",
    min_size: MinSize = 1,
    backend: Backend = "auto",
    device: Device = "auto",
    ids: Ids = None,
    as_json: Json = False,
) -> None:
    """Cluster any features by k-means, or do the clustering stage of a run.

    The options are for a file of features. A run has them in its recipe.
    """
    from cluster_jobs.results import cluster_file

    options = cluster_file.Options(
        k, whiten, iterations, seed, init, spherical, empty, min_size, backend, device, ids
    )
    if not cluster_file.is_features(source):
        cluster_file.refuse_options(source, options, out)
        _run_stage(source, "cluster")
        return
    statistics = cluster_file.cluster_features(source, out, options)
    if as_json:
        typer.echo(json.dumps(statistics))
        return
    _print(cluster_file.summary(statistics))
    _log(f"wrote {out}")


@app.command(
    rich_help_panel=STAGES,
    epilog=_examples(
        "vae resnet.npy vit.npy --out latents",
        "cluster latents/features.npy --k 1000 --whiten 64 --out clusters",
        "vae runs/a/rounds/0003/features/rows.npy --latent 16 --out latents",
    ),
)
def vae(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FEATURES.npy|RUN ...",
            help="Rows [n, d] of the same images, a file for each network; a run: its last round.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder for the result.")],
    latent: Annotated[int, typer.Option(help="The latents of each VAE.")] = 32,
    hidden: Annotated[int, typer.Option(help="The units of its hidden layers; 0: linear.")] = 128,
    beta: Annotated[float, typer.Option(help="The weight of the divergence from N(0, 1).")] = 1.0,
    epochs: Annotated[
        int, typer.Option(help="The passes over the rows; 0: 3000 steps, but 10 passes at least.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="The rows of a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Adam's rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="The seed of weights, order and noise.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Turn features of one or several networks into latent means of VAEs, to cluster those.

    Given again, the command goes on where it was stopped.
    """
    from cluster_jobs.results import vae_files
    from deepclust.clustering.vae import VaeOptions

    options = VaeOptions(latent, hidden, beta, epochs, batch, lr, seed)
    manifest = vae_files.build_vaes(sources, out, options, device)
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    _print(vae_files.summary(manifest, out))
    _log(f"wrote {out / vae_files.FEATURES}")


@app.command(rich_help_panel=STAGES, epilog=_examples("train runs/a"))
def train(run_dir: RunDir) -> None:
    """Do one stage of a run: train until the next round is due."""
    _run_stage(run_dir, "train")


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples("evaluate runs/a --train shards/train --test shards/test"),
)
def evaluate(
    run_dir: RunDir,
    train_shards: Annotated[
        str, typer.Option("--train", help="The labelled shards, or images, to fit on.")
    ],
    test_shards: Annotated[
        str, typer.Option("--test", help="The labelled shards, or images, to score on.")
    ],
    with_: Annotated[
        str | None,
        typer.Option("--with", help="Evaluators or their modules: knn,my.module (default: all)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score the run's frozen network: kNN, linear probe, clusters, prototypes, own classifier."""
    from cluster_jobs.results.evaluate import evaluate_run

    def show(scores: Scores) -> None:
        if as_json:
            typer.echo(json.dumps(scores))
            return
        from cluster_jobs.display import scores_line

        for name, values in scores.items():
            typer.echo(scores_line(name, values))

    names = None if with_ is None else [name.strip() for name in with_.split(",") if name.strip()]
    evaluate_run(run_dir, train_shards, test_shards, names, emit=_log, show=show)


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples(
        "assignments runs/a --out clusters.parquet",
        "assignments runs/a --folders clusters",
        "assignments runs/a --out clusters.fiftyone.json",
    ),
)
def assignments(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write.")] = None,
    round_: Annotated[
        int | None, typer.Option("--round", help="The round; default: the last.")
    ] = None,
    folders: Annotated[
        Path | None, typer.Option("--folders", help="A new folder: one folder of images a cluster.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Links to image files (default; shards are extracted).")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copies of image files.")] = False,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="fiftyone or label-studio: JSON for it; default: by the suffix."
        ),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Compare with the shards, if they are behind URLs.")
    ] = False,
) -> None:
    """Write which image is in which cluster: a table, folders of images, or JSON for a viewer.

    A method without rounds (swav, dino, dac) answers with the weights of its newest checkpoint.
    """
    from cluster_jobs.results import assignments, viewers
    from cluster_jobs.results import folders as of_images

    if out is None and folders is None:
        raise RecipeError("give --out FILE.parquet or .csv, --folders DIRECTORY, or both")
    if link and copy:
        raise RecipeError("give --link or --copy, not both")
    if (link or copy) and folders is None:
        raise RecipeError("--link and --copy belong to --folders DIRECTORY")
    if format_ is not None and out is None:
        raise RecipeError(f"--format {format_} needs --out FILE.json")
    if out is not None:
        format_ = format_ or viewers.form_of(out)
    if out is not None and format_ is None:
        assignments.export_assignments(run_dir, out, round_, remote=remote, emit=_log)
    elif out is not None and format_ is not None:
        viewers.write_json_of(run_dir, out, format_, round_, remote=remote, emit=_log)
    if out is not None:
        _log(f"wrote {out}")
    if folders is not None:
        how = "link" if link else "copy" if copy else None
        count = of_images.write_folders(run_dir, folders, how, round_, remote=remote, emit=_log)
        _log(f"wrote {folders}: {count} images")


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples("duplicates runs/a --out duplicates.csv --similarity 0.9"),
)
def duplicates(
    run_dir: RunDir,
    out: Out,
    similarity: Annotated[
        float, typer.Option(help="The smallest cosine of features of near duplicates.")
    ] = 0.95,
    deviations: Annotated[
        float, typer.Option(help="Standard deviations that make an outlier of its cluster.")
    ] = 4.0,
    as_json: Json = False,
) -> None:
    """Write near duplicates and outliers, from the features of the last round."""
    from cluster_jobs.display import Display
    from cluster_jobs.results.duplicates import write_duplicates

    with Display() as display:
        counts = write_duplicates(run_dir, out, similarity, deviations, emit=_log, show=display)
    if as_json:
        typer.echo(json.dumps(counts))
    _log(
        f"wrote {out}: {counts['duplicates']} near duplicates in {counts['groups']} groups, "
        f"{counts['outliers']} outliers of {counts['images']} images"
    )


Images = Annotated[
    str, typer.Option("--data", help="Shards, a folder of images, or a list of them.")
]


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples(
        "embed runs/a --data photos --out features",
        "embed net.safetensors --data shards --out features --dtype float32",
        "embed runs/a --data shards --out whitened --whiten --format parquet",
    ),
)
def embed(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|WEIGHTS", help="A run, or an exported backbone.")
    ],
    data: Images,
    out: Annotated[Path, typer.Option("--out", help="The new folder for the features.")],
    layer: Annotated[
        str | None,
        typer.Option(help="A module of the backbone, averaged over places; default: the features."),
    ] = None,
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Whitened unit rows, as the last round clustered them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    format_: Annotated[str, typer.Option("--format", help="npy or parquet.")] = "npy",
    as_json: Json = False,
) -> None:
    """Write features of any images, by sample id, with their keys and paths.

    Given again, the command goes on where it was stopped.
    """
    from cluster_jobs.display import Display
    from cluster_jobs.results.embed import EmbedOptions
    from cluster_jobs.results.embed import embed as embed_images

    options = EmbedOptions(layer, whiten, dtype, format_)
    with Display() as display:
        manifest = embed_images(source, data, out, options, emit=_log, show=display)
    if as_json:
        typer.echo(json.dumps(manifest))
    n, dim = manifest["shape"]
    _log(f"wrote {out}: {n} rows of {dim} numbers, {manifest['excluded']} without an image")


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples(
        "predict runs/a --data new_photos --out clusters.csv",
        "predict runs/a --data shards --out clusters.parquet --round 3",
    ),
)
def predict(
    run_dir: RunDir,
    data: Images,
    out: Out,
    round_: Annotated[
        int | None, typer.Option("--round", help="The round; default: the last.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the cluster of images that the run has never seen, as Parquet or CSV.

    Columns: cluster, distance, second-best cluster and margin, and the class where seeds give one.
    """
    from cluster_jobs.display import Display
    from cluster_jobs.results.predict import predict as predict_images

    with Display() as display:
        counts = predict_images(run_dir, data, out, round_, emit=_log, show=display)
    if as_json:
        typer.echo(json.dumps(counts))
    _log(
        f"wrote {out}: {counts['images']} images in {counts['used']} of {counts['k']} clusters, "
        f"{counts['excluded']} without an image that can be read"
    )


@app.command(
    rich_help_panel=RESULTS,
    epilog=_examples(
        "export runs/a --format torchvision --out resnet50.pth",
        "export runs/a --out net.onnx",
        "export runs/a --format hf --out my-backbone",
    ),
)
def export(
    run_dir: RunDir,
    out: Out,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="torchvision, safetensors, timm, hf (a folder), onnx or torch-export; default: "
            "by the suffix.",
        ),
    ] = None,
) -> None:
    """Write the backbone of the newest checkpoint, and compare the file with it."""
    from cluster_jobs.results.evaluate import export_run

    exported = export_run(run_dir, out, format_, emit=_log)
    _log(f"wrote {exported.path} ({exported.hash})\n{exported.usage}")


@app.command(
    rich_help_panel=RESULTS, epilog=_examples("report runs/a", "report runs/a --out report.html")
)
def report(
    run_dir: RunDir,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default: RUN/report.html.")
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Read images behind URLs too, which the recipe names.")
    ] = False,
) -> None:
    """Write one static HTML page: curves, clusters, images."""
    from cluster_jobs.report import write_report
    from deepclust.files import target_of

    file = target_of(out) if out else run_dir / "report.html"
    write_report(run_dir, file, remote=remote)
    _log(f"wrote {out or file}")


@app.command(
    rich_help_panel=BEGIN,
    epilog=_examples(
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


@app.command(
    "list",
    rich_help_panel=BEGIN,
    epilog=_examples("list recipes", "list keys share", "list methods --json"),
)
def list_(
    kind: Annotated[
        str, typer.Argument(help="recipes, methods, terms, backbones or keys of a recipe.")
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


@app.command(
    rich_help_panel=BEGIN,
    epilog=_examples("doctor", "doctor --runs /scratch/runs", "doctor --json"),
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


@app.command(rich_help_panel=BEGIN, epilog=_examples("guide", "guide imagenet-on-slurm"))
def guide(
    name: Annotated[
        str | None, typer.Argument(help="The name of a guide; default: the list of guides.")
    ] = None,
) -> None:
    """Show a guide, or list the guides."""
    from cluster_jobs import guides

    typer.echo(guides.contents() if name is None else guides.read(name))


def _follow(run_dir: Path) -> None:
    """Print the log until the run has ended, and exit as it did."""
    from cluster_jobs import runs

    try:
        ending = runs.follow(run_dir, typer.echo)
    except KeyboardInterrupt:
        _log(f"detached; {run_dir} continues")
        return
    _log(f"{run_dir}: {ending.state} {ending.reason}".rstrip())
    sys.exit(ending.exit_code)


def _run_stage(run_dir: Path, stage: str) -> None:
    from cluster_jobs import runs
    from cluster_jobs.display import Display

    with Display() as display:
        runs.run_stage(run_dir, stage, display)
    _log(f"{stage} is done: {run_dir}")


def _log_finished(run_dir: Path) -> None:
    from cluster_jobs.display import command_line
    from deepclust.run.directory import open_run

    commands = [command_line("report", run_dir)]
    if open_run(run_dir).recipe.assigns:
        commands.append(command_line("assignments", run_dir, "--out", "clusters.parquet"))
    following = "\n           ".join(commands)
    if replaced := sum({e["step"]: e["count"] for e in _replaced(run_dir)}.values()):
        _log(
            f"{replaced} samples could not be read and were replaced: {run_dir}/logs/replaced.jsonl"
        )
    _log(
        f"finished: {run_dir}\n  weights  {run_dir / 'export' / 'backbone.safetensors'}\n"
        f"  next     {following}"
    )


def _replaced(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of samples that were replaced, of which the last for a step counts."""
    from deepclust.run.directory import Run

    return [event for event in Run(run_dir).events() if event["event"] == "replaced"]


def _print(content: Table | str) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE).print(content)


def _log(text: str) -> None:
    sys.stderr.write(visible(text) + "\n")


if __name__ == "__main__":
    main()
