"""Verbs that measure a finished run, label images with it and take it elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster_jobs.cli import going_on
from cluster_jobs.cli.common import Json, Out, RunDir, begun, examples, log
from deepclust.errors import RecipeError, redact

if TYPE_CHECKING:
    from deepclust.evaluate import Scores

PANEL = "Results"
verbs = typer.Typer()
Best = Annotated[
    bool, typer.Option("--best", help="The best checkpoint by kNN (train.evaluate), not the last.")
]


NOTHING_FITTED = (
    "without --train and --test nothing is fitted: leave --with, --layers, --labels, --backbone, "
    "--size and --sobel out"
)
BOTH = (
    "give --train SHARDS and --test SHARDS, both with labels. A run needs neither: leave both out"
)


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "evaluate runs/a --train shards/train --test shards/test",
        "evaluate runs/a",
        "evaluate torchvision:resnet50 --train shards/train --test shards/test",
        "evaluate moco.pth --backbone resnet50 --train shards/train --test shards/test",
        "evaluate runs/a --train voc --test voc_test --labels json.classes --with multi_label",
    ),
)
def evaluate(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|WEIGHTS", help="A run, a file of weights, torchvision:NAME."),
    ],
    train_shards: Annotated[
        str | None, typer.Option("--train", help="The labelled shards, or images, to fit on.")
    ] = None,
    test_shards: Annotated[
        str | None, typer.Option("--test", help="The labelled shards, or images, to score on.")
    ] = None,
    with_: Annotated[
        str | None,
        typer.Option("--with", help="Evaluators or their modules: knn,my.module (default: all)."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Score pixels, random weights and the commonest class too.")
    ] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="A linear probe of every layer or block too.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="The network of WEIGHTS that do not say it.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of images for WEIGHTS.")] = None,
    sobel: Annotated[bool, typer.Option("--sobel", help="WEIGHTS see Sobel gradients.")] = False,
    best: Best = False,
    labels: Annotated[
        str | None, typer.Option(help="The labels, as data.labels: txt, json.labels, ...")
    ] = None,
    finetune: Annotated[
        str,
        typer.Option(
            help="Settings of --with finetune, with commas between: epochs=10 lr=0.01 head_lr=0.1 "
            "batch=64 weight_decay=0.0001 seeds=1 least=100."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Score a frozen network: kNN, linear probes, retrieval, clusters, a run's own classifier.

    Pixels, random weights and the commonest class are scored beside it. Without --train and --test
    the run is scored without labels, on its own images: crops, neighbours, rounds.
    """
    begun(f"evaluating {redact(source)}")
    from cluster_jobs.results.baselines import Beside
    from cluster_jobs.results.evaluate import evaluate_run
    from cluster_jobs.results.evaluate_weights import evaluate_weights, is_weights
    from deepclust.evaluate.finetune import parse_settings
    from deepclust.trained.weights import Network

    def show(scores: Scores) -> None:
        if as_json:
            typer.echo(json.dumps(scores))
            return
        from cluster_jobs.display import scores_lines

        typer.echo("\n".join(scores_lines(scores)))

    names = None if with_ is None else [name.strip() for name in with_.split(",") if name.strip()]
    beside = Beside(baselines, layers, parse_settings(finetune), labels)
    network = Network(backbone, size, sobel)
    if train_shards is None and test_shards is None and not is_weights(source):
        from cluster_jobs.results.evaluate_unlabelled import evaluate_unlabelled

        if names or layers or labels or network != Network():
            raise RecipeError(NOTHING_FITTED)
        evaluate_unlabelled(Path(source), log, show, best)
        return
    if train_shards is None or test_shards is None:
        raise RecipeError(f"{source}: {BOTH}")
    shards = (train_shards, test_shards)
    if is_weights(source):
        if best:
            raise RecipeError(f"{source} is not a run: leave --best out")
        show(evaluate_weights(source, *shards, network, names, log, beside))
        return
    if network != Network():
        raise RecipeError(
            f"{source} is not a file of weights: leave --backbone, --size and --sobel out"
        )
    evaluate_run(Path(source), *shards, names, log, show, beside, best)


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
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
    begun(f"reading the clusters of {run_dir}")
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
        assignments.export_assignments(run_dir, out, round_, remote=remote, emit=log)
    elif out is not None and format_ is not None:
        viewers.write_json_of(run_dir, out, format_, round_, remote=remote, emit=log)
    if out is not None:
        log(f"wrote {out}")
    if folders is not None:
        how = "link" if link else "copy" if copy else None
        count = of_images.write_folders(run_dir, folders, how, round_, remote=remote, emit=log)
        log(f"wrote {folders}: {count} images")


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples("duplicates runs/a --out duplicates.csv --similarity 0.9"),
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
    log(f"comparing the images of {run_dir}")
    from cluster_jobs.display import Display
    from cluster_jobs.results.duplicates import write_duplicates

    with Display() as display:
        counts = write_duplicates(run_dir, out, similarity, deviations, emit=log, show=display)
    if as_json:
        typer.echo(json.dumps(counts))
    log(
        f"wrote {out}: {counts['duplicates']} near duplicates in {counts['groups']} groups, "
        f"{counts['outliers']} outliers of {counts['images']} images"
    )


Images = Annotated[
    str, typer.Option("--data", help="Shards, a folder of images, or a list of them.")
]


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "embed runs/a --data photos --out features",
        "embed net.safetensors --data shards --out features --dtype float32",
        "embed runs/a --data shards --out features --ranks 8 --best",
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
    ranks: Annotated[int, typer.Option(help="Processes of this machine that share the work.")] = 1,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Write features of any images, by sample id, with their keys and paths.

    Given again, the command goes on where it was stopped.
    """
    log(f"features of {redact(data)} by {source}")
    from cluster_jobs.display import Display
    from cluster_jobs.results.embed import EmbedOptions, Given
    from cluster_jobs.results.embed import embed as embed_images

    options = EmbedOptions(layer, whiten, dtype, format_)
    with going_on.resumed_by(going_on.typed_again), Display() as display:
        manifest = embed_images(
            source, data, out, options, emit=log, show=display, given=Given(ranks, best)
        )
    if as_json:
        typer.echo(json.dumps(manifest))
    n, dim = manifest["shape"]
    log(f"wrote {out}: {n} rows of {dim} numbers, {manifest['excluded']} without an image")


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
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
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Write the cluster and class of images that the run has never seen, as Parquet or CSV.

    Columns: cluster, distance, second-best cluster, margin; with seeds class and confidence.
    """
    log(f"clusters of {redact(data)} by {run_dir}")
    from cluster_jobs.display import Display
    from cluster_jobs.results.predict import predict as predict_images

    if best and round_ is not None:
        raise RecipeError("give --best or --round, not both")
    with Display() as display:
        counts = predict_images(run_dir, data, out, round_, emit=log, show=display, best=best)
    if as_json:
        typer.echo(json.dumps(counts))
    log(
        f"wrote {out}: {counts['images']} images in {counts['used']} of {counts['k']} "
        f"{counts['unit']}, {counts['excluded']} without an image that can be read"
    )


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "export runs/a --format torchvision --out resnet50.pth",
        "export runs/a --out clusters.onnx --classifier",
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
    best: Best = False,
    classifier: Annotated[
        bool,
        typer.Option("--classifier", help="The clusters too: images to clusters in one ONNX file."),
    ] = False,
    card: Annotated[
        Path | None,
        typer.Option("--card", help="A file for the model card (of hf it is README.md)."),
    ] = None,
) -> None:
    """Write the backbone of the newest checkpoint, and compare the file with it."""
    begun(f"exporting {run_dir}")
    from cluster_jobs.results.export import export_run

    exported = export_run(
        run_dir, out, format_, emit=log, best=best, classifier=classifier, card=card
    )
    log(f"wrote {exported.path} ({exported.hash})\n{exported.usage}")


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples("report runs/a", "report runs/k=50 runs/k=100 runs/k=200 --out k.html"),
)
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run; several: a page compares them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file; default: RUN/report.html, of several report.html."),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Read images behind URLs too, which the recipe names.")
    ] = False,
) -> None:
    """Write one static HTML page: curves, clusters, images; or several runs side by side."""
    begun(f"reporting on {' '.join(map(str, run_dirs))[:200]}")
    from cluster_jobs.report import write_comparison, write_report
    from deepclust.files import target_of

    several = len(run_dirs) > 1
    file = target_of(out or Path("report.html" if several else run_dirs[0] / "report.html"))
    if several:
        write_comparison(run_dirs, file)
    else:
        write_report(run_dirs[0], file, remote=remote, emit=log)
    log(f"wrote {out or file}")
